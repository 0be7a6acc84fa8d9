# SPDX-License-Identifier: Apache-2.0
"""The code of README.md, docs/ and examples/README.md runs, and shows what its comments say.

The Python blocks of a page run in order, in one namespace and an empty folder. A line that ends in
`# -> TEXT` is an expression whose repr is TEXT. A block may begin with a line that says how it
runs instead, which readers see too:

    # torchrun --nproc-per-node=4 FILE      a script of its own, launched so
    # Not run: REASON                       only compiled

C and C++ blocks compile against the installed headers.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latte_ext
import pytest

ROOT = Path(__file__).parents[2]
INCLUDE = Path(latte_ext._core.__file__).parent / "include"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *ROOT.glob("examples/*.md"),
    ]
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r"  # -> (.*)$")
TORCHRUN = re.compile(r"# torchrun (.*) FILE\n")
NOT_RUN = re.compile(r"# Not run: \S+")
# What a page may be written in; another name, or a fence that is indented, would not be tested.
LANGUAGES = {"bash", "c", "cmake", "cpp", "python", "text"}
COMPILERS = {"cpp": ("CXX", "c++", "-std=c++17"), "c": ("CC", "cc", "-std=c11")}


def blocks(language: str) -> list[Any]:
    """(page, line, source) of every block of a language, as parameters of a test."""
    return [
        pytest.param(page, text[: found.start(2)].count("\n"), found[2], id=f"{page}-{number}")
        for page, text in PAGES.items()
        for number, found in enumerate(BLOCK.finditer(text))
        if found[1] == language
    ]


def run(page: str, line: int, source: str, names: dict[str, Any]) -> int:
    """Runs a block; the number of results that it shows."""
    tree = ast.increment_lineno(ast.parse(source), line)
    shown = 0
    for node in tree.body:
        assert node.end_lineno is not None
        result = OUTPUT.search(source.splitlines()[node.end_lineno - line - 1])
        if result is None:
            exec(compile(ast.Module([node], []), page, "exec"), names)
        else:
            assert isinstance(node, ast.Expr), f"{page}:{node.lineno}: not an expression"
            value = eval(compile(ast.Expression(node.value), page, "eval"), names)
            assert repr(value) == result[1], f"{page}:{node.lineno}"
            shown += 1
    return shown


def llama(folder: Path) -> dict[str, Any]:
    """A model of transformers in a folder, and a prompt for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "pretrained")
    return {
        "folder": folder / "pretrained",
        "inputs": {"input_ids": torch.randint(3, 99, (1, 600))},
    }


def bert(folder: Path) -> dict[str, Any]:
    """An encoder of transformers in a folder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "encoder")
    return {"folder": folder / "encoder"}


# Pages whose code begins with what a reader has already: what it is.
GIVEN: dict[str, Callable[[Path], dict[str, Any]]] = {
    "docs/pretrained.md": llama,
    "docs/hf_encoders.md": bert,
}


def launched(page: str) -> list[str]:
    """The blocks of a page that are scripts of their own."""
    return [
        found[2] for found in BLOCK.finditer(PAGES[page])
        if found[1] == "python" and TORCHRUN.match(found[2])
    ]  # fmt: skip


PYTHON_PAGES = sorted({parameters.values[0] for parameters in blocks("python")})


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    opened = re.findall(r"^( *)```+(.*)$", PAGES[page], flags=re.MULTILINE)[::2]
    assert all(indent == "" and language in LANGUAGES for indent, language in opened), opened


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = GIVEN[page](tmp_path) if page in GIVEN else {}
    for parameters in blocks("python"):
        where, line, source = parameters.values
        if where != page or TORCHRUN.match(source):
            continue
        if NOT_RUN.match(source):
            compile(source, page, "exec")
        else:
            run(page, line, source, names)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PYTHON_PAGES if launched(page)])
def test_scripts_run_under_torchrun(page: str, tmp_path: Path) -> None:
    for number, source in enumerate(launched(page)):
        script = tmp_path / f"script{number}.py"
        script.write_text(source)
        found = TORCHRUN.match(source)
        assert found is not None
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        ran = subprocess.run(
            [*command, *found[1].split(), script],
            capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.mark.parametrize(("page", "line", "source"), [*blocks("cpp"), *blocks("c")])
def test_c_and_cpp_compile(
    page: str, line: int, source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    language = "cpp" if (page, line, source) in [p.values for p in blocks("cpp")] else "c"
    variable, default, standard = COMPILERS[language]
    file = tmp_path / f"block.{language}"
    file.write_text(f'#line {line + 1} "{page}"\n{source}')
    ran = subprocess.run(
        [
            os.environ.get(variable, default), standard, "-fsyntax-only", "-Wall", "-Wextra",
            "-Werror", "-I", INCLUDE, file,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    documented = set(re.findall(r"^::: (\S+)$", pages, flags=re.MULTILINE))
    # Modules have entries for what they hold, constants none.
    public = {f"latte_ext.{name}" for name in latte_ext.__all__}
    public -= {"latte_ext.__version__", "latte_ext.reference", "latte_ext.storage"}
    for package in ("nn", "distributed", "hf"):
        if package == "hf":
            pytest.importorskip("transformers")
        module = importlib.import_module(f"latte_ext.{package}")
        public |= {f"latte_ext.{package}.{name}" for name in module.__all__}
    assert public - documented <= {"latte_ext.nn.VARIANTS"}


@pytest.mark.slow
def test_figures_are_drawn(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, ROOT / "tools" / "draw_figures.py", "--steps", "2", "--out", tmp_path],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    drawn = {path.name: path.read_bytes()[:8] for path in tmp_path.iterdir()}
    assert drawn.keys() == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert set(drawn.values()) == {b"\x89PNG\r\n\x1a\n"}


def test_a_result_that_differs_is_found() -> None:
    assert run("page", 0, "x = 1\nx + 1  # -> 2\n", {}) == 1
    with pytest.raises(AssertionError, match="page:5"):
        run("page", 3, "x = 1\nx + 1  # -> 3\n", {})
