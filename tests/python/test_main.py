# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext`: information and self test, as a user calls them."""

import subprocess
import sys
from pathlib import Path

import latte_ext
import pytest
import torch
from latte_ext import __main__ as command
from latte_ext import _core, selftest


def test_info_names_what_a_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:16].strip(): line[17:] for line in lines}
    assert rows["threads"] == str(torch.get_num_threads())
    assert rows["CUDA"].startswith("built for" if _core.cuda_built() else "no (built without it)")
    assert rows["torch"] == torch.__version__


def test_cmake_dir_and_nothing_else_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--cmake-dir"]) == 0
    (folder,) = capsys.readouterr().out.splitlines()
    assert (Path(folder) / "latteConfig.cmake").is_file()


def test_an_installation_without_the_cpp_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(latte_ext._core, "__file__", str(tmp_path / "_core.so"))
    with pytest.raises(RuntimeError, match=r"has no latteConfig\.cmake, expected the C"):
        command.main(["--cmake-dir"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["demo", "--out", "FILE"], "[demo] FILE cannot be written to (File exists), expected a"),
        (["demo", "--out", "FILE/x"], "[demo] FILE/x cannot be written to"),
        (["bench", "--out", "FILE"], "[bench] FILE cannot be written to"),
        (["bench", "--json", "FILE/x"], "[bench] FILE cannot be written to"),
        (["bench", "--plot", "."], "[bench] . is a folder, expected the name of a file"),
    ],
)
def test_results_need_a_place_before_the_work(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    with pytest.raises(SystemExit) as stopped:
        command.main(options)
    assert str(stopped.value).startswith(message)


def test_an_interrupted_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "info", interrupt)
    assert command.main(["info"]) == 130
    assert "[info] interrupted" in capsys.readouterr().err


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([])
    assert "a command is required" in capsys.readouterr().err


def test_selftest_holds_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["selftest"]) == 0
    out = capsys.readouterr().out
    assert "all checks hold" in out
    assert "FAIL" not in out


def test_selftest_notices_a_wrong_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = latte_ext.latent_attention
    monkeypatch.setattr(
        selftest, "latent_attention", lambda *args, **kw: _off_by_a_percent(right(*args, **kw))
    )
    assert selftest.main() == 1
    assert "FAIL" in capsys.readouterr().out


def _off_by_a_percent(
    result: torch.Tensor | tuple[torch.Tensor, latte_ext.LatentState],
) -> torch.Tensor | tuple[torch.Tensor, latte_ext.LatentState]:
    return result * 1.01 if isinstance(result, torch.Tensor) else result


def test_unknown_instruction_set_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "latte_ext", "info"],
        env={"PATH": "/usr/bin:/bin", "LATTE_CPU_ISA": "abacus"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "LATTE_CPU_ISA is 'abacus', expected one of" in run.stderr


# `python -m latte_ext` where no package but this one can be found.
BARE = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else find(name, *a)
sys.modules["torch"] = None
sys.argv = ["latte_ext", *sys.argv[1:]]
runpy.run_module("latte_ext", run_name="__main__", alter_sys=True)
"""


def run_without_torch(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE, *args], capture_output=True, text=True, check=False
    )


def test_what_needs_no_torch_runs_without_it() -> None:
    info = run_without_torch("info")
    assert info.returncode == 0, info.stderr
    assert "torch            not installed" in info.stdout
    folder = run_without_torch("--cmake-dir")
    assert folder.returncode == 0, folder.stderr
    assert (Path(folder.stdout.strip()) / "latteConfig.cmake").is_file()
    demo = run_without_torch("demo")
    assert demo.returncode == 2
    assert "invalid choice: 'demo'" in demo.stderr


def test_operators_ask_for_torch() -> None:
    code = BARE.partition("sys.argv")[0] + "from latte_ext import latent_attention"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "[latte_ext] latent_attention needs torch, expected `pip install torch`" in run.stderr
