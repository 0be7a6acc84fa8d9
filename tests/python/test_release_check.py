# SPDX-License-Identifier: Apache-2.0
"""The gate of a release: it fails where a stage does, goes on where it stopped, hides nothing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "release_check.py"
spec = importlib.util.spec_from_file_location("release_check", TOOL)
assert spec is not None
assert spec.loader is not None
release_check = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = release_check  # dataclasses look their module up
spec.loader.exec_module(release_check)

LOG = """== tests
3 passed, 1 warning in 2.31s
aarch64: NOT tested: no compiler
========= 2 failed, 5 passed, 1 error in 12.50s (0:00:12) =========
100% tests passed, 0 tests failed out of 34
aarch64: NOT tested: no compiler
98% tests passed, 1 tests failed out of 50
"""


def test_tests_are_counted_and_what_was_left_out_is_told() -> None:
    assert release_check.counted(LOG) == "91 of 95 tests"
    assert release_check.counted("built in 3 s") == ""
    assert release_check.untested(LOG) == ["aarch64: NOT tested: no compiler"]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> release_check.Check:
    """Stages on a repository with one file, and a second file that is not committed."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "committed").write_text("x")
    for arguments in (
        ["init", "--quiet"],
        ["add", "committed"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "-m", "one"],
    ):
        subprocess.run(["git", *arguments], cwd=root, check=True)
    (root / "loose").write_text("x")
    monkeypatch.setattr(release_check, "ROOT", root)
    monkeypatch.setattr(release_check.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("MAKEFLAGS", "-n")
    stages = {
        "good": ("sh", "-c", 'test -f committed && test -z "$MAKEFLAGS" && echo 3 passed in 1.0s'),
        "bad": ("sh", "-c", "test -f loose"),
        "late": ("sh", "-c", "touch late"),
    }
    return release_check.Check(stages, tmp_path / "out", tmp_path / "release.md")


def test_stages_run_in_a_clone_of_what_is_committed(
    check: release_check.Check, tmp_path: Path
) -> None:
    check.prepare(anew=True)
    assert check.run(["good", "bad"]) == 1
    table = check.table.read_text()
    assert "| good | `sh -c test -f committed" in table
    assert "| passed | 3 of 3 tests | 0 s |" in table
    assert "| FAILED, exit 1 |" in table
    assert "| late | `sh -c touch late` | not run |" in table
    assert "3 passed" in (tmp_path / "out" / "good.log").read_text()


def test_a_second_run_goes_on_in_the_same_clone(check: release_check.Check) -> None:
    check.prepare(anew=True)
    check.run(["good", "bad", "late"])
    again = release_check.Check(check.stages, check.out, check.table)
    again.prepare(anew=False)
    assert (again.clone / "late").exists()
    again.stages["bad"] = ("true",)
    assert again.run(["bad"]) == 0
    assert "FAILED" not in again.table.read_text()
    assert "not run" not in again.table.read_text()
    again.prepare(anew=True)
    assert not (again.clone / "late").exists()


def test_a_stage_that_hangs_is_ended(
    check: release_check.Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release_check, "LIMIT_S", 0.2)
    check.prepare(anew=True)
    check.stages["bad"] = ("sh", "-c", "sleep 60 & wait")
    assert check.run(["bad"]) == 1
    assert "FAILED, more than 0.2 s" in check.table.read_text()


def test_unknown_stages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert release_check.main(["lint", "everything"]) == 1
    assert "no stage everything, expected some of lint" in capsys.readouterr().out
