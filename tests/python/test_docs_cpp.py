# SPDX-License-Identifier: Apache-2.0
"""The code of docs/cpp.md: C and C++ compile against the installed headers, Python runs."""

import os
import re
import subprocess
from pathlib import Path

import latte_ext
import pytest
from latte_ext import nn

PAGE = (Path(__file__).parents[2] / "docs" / "cpp.md").read_text()
INCLUDE = Path(latte_ext._core.__file__).parent / "include"
COMPILERS = {"cpp": ("CXX", "c++", "-std=c++17"), "c": ("CC", "cc", "-std=c11")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("language", COMPILERS)
def test_blocks_compile(language: str, tmp_path: Path) -> None:
    variable, default, standard = COMPILERS[language]
    (block,) = blocks(language)
    source = tmp_path / f"block.{language}"
    source.write_text(block)
    command = [
        os.environ.get(variable, default), standard, "-fsyntax-only", "-Wall", "-Wextra", "-Werror",
        "-I", INCLUDE, source,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_the_python_block_saves_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(block, "docs/cpp.md", "exec"), names)
    assert isinstance(names["model"], nn.LatteLM)
    assert (tmp_path / "model.safetensors").is_file()
