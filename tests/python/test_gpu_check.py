# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_check.sh where there is no GPU, and with stand-ins for what a GPU machine has."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_check.sh"
# What it needs of a machine in any case.
BASICS = (
    "bash", "cat", "cut", "date", "dirname", "env", "grep", "gzip", "mkdir", "mktemp", "nproc",
    "rm", "tail", "tar", "tee", "timeout",
)  # fmt: skip

INFO = """#!/bin/bash
last=${!#}
case "$*" in
  *"latte_ext info"*) echo "devices          NVIDIA Stand-in" ;;
  *"bench --device cuda --json"*) echo "# page" | tee "${last%.json}.md" >"$last" ;;
  "-m pytest"*) echo "3 failed"; exit 1 ;;
  *) echo "did $*" ;;
esac
"""
STANDINS = {
    "python3": INFO,
    "nvcc": "#!/bin/bash\necho release 13\n",
    "nvidia-smi": "#!/bin/bash\necho GPU 0\n",
    "compute-sanitizer": "#!/bin/bash\necho uses $2 cache $PYTORCH_NO_CUDA_MEMORY_CACHING\n",
    "ncu": "#!/bin/bash\necho '\"metric\"'\n",
}


def check(folder: Path, standins: dict[str, str]) -> tuple[int, list[str]]:
    """The exit status, and the lines of the summary."""
    tools = folder / "tools"
    tools.mkdir()
    for name in BASICS:
        path = next(p for p in (Path("/usr/bin") / name, Path("/bin") / name) if p.exists())
        (tools / name).symlink_to(path)
    for name, text in standins.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {"PATH": str(tools), "TMPDIR": str(folder), "HOME": os.environ["HOME"]}
    run = subprocess.run(
        [str(tools / "bash"), str(SCRIPT), str(folder / "out")],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert not [p for p in folder.iterdir() if p.name.startswith("tmp.")], "its folder stays"
    return run.returncode, (folder / "out" / "summary.txt").read_text().splitlines()


def test_without_anything_it_says_what_could_not_run(tmp_path: Path) -> None:
    status, lines = check(tmp_path, {"python3": "#!/bin/bash\nexit 1\n"})
    assert lines[0].startswith("commit: ")
    assert lines[1].startswith("env: FAILED (127)")
    assert lines[2] == "build: NOT RUN: no nvcc here"
    names = [line.partition(":")[0] for line in lines[3:9]]
    assert names == ["selftest", "pytest", "sanitizers", "bench", "tune", "ncu"]
    assert all("NOT RUN: no package with a usable GPU" in line for line in lines[3:9])
    assert lines[9].startswith("8 stages failed or did not run; ")
    assert status == 8


def test_a_stage_that_fails_stops_no_other(tmp_path: Path) -> None:
    status, lines = check(tmp_path, STANDINS)
    stages = dict(line.split(": ", 1) for line in lines[1:-1])
    assert status == 1
    assert stages["pytest"].startswith("FAILED (1), 0 s: 3 failed")
    ok = {name for name, line in stages.items() if line.startswith("ok, ")}
    assert ok == {
        "env", "build", "selftest", "memcheck", "racecheck", "initcheck", "synccheck", "bench",
        "tune", "ncu",
    }  # fmt: skip
    assert stages["racecheck"].endswith("uses racecheck cache 1")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "bench.json", "bench.md", "logs.tgz", "ncu.csv", "summary.txt",
    ]  # fmt: skip
    with tarfile.open(out / "logs.tgz") as logs:
        assert "./build.log" in logs.getnames()


def test_a_wheel_without_a_usable_gpu_is_noticed(tmp_path: Path) -> None:
    python = INFO.replace("NVIDIA Stand-in", "none (cudaGetDeviceCount: no driver)")
    status, lines = check(tmp_path, STANDINS | {"python3": python})
    assert status == 6
    assert "bench: NOT RUN: no package with a usable GPU; see env and build" in lines


@pytest.mark.parametrize("arguments", [[], [""]])
def test_it_needs_a_folder(arguments: list[str]) -> None:
    run = subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0
    assert "usage: tools/gpu_check.sh OUT_DIR" in run.stderr
