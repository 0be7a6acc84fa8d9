# SPDX-License-Identifier: Apache-2.0
"""Everything that a release has to pass, from a clean clone of the committed HEAD.

python tools/release_check.py              all stages, in a new clone
python tools/release_check.py lint wheel   these stages again, in the clone that is there

Writes logs to build/release-check and the table to docs/release.md, also after each stage, so that
a run that was cut off goes on with the stages that are left. The exit status is the number of
stages that failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 3 * 3600

# In the order of a full run. `make` gives every stage what it needs, so any may be run alone.
STAGES = {
    "lint": ("make", "lint"),
    "wheel": ("make", "wheel"),
    "test": ("make", "test"),
    "api": ("make", "test-some", "TESTS=tests/python/test_public_api.py"),
    "examples": ("make", "test-some", "TESTS=tests/python/test_examples.py"),
    "demo": ("make", "demo"),
    "docs": ("make", "docs"),
    "fuzz": ("make", "fuzz"),
    "clang": ("make", "test-clang"),
    "scalar": ("make", "test-scalar"),
    "emulated": ("make", "test-emulated"),
    "cuda-sanitized": ("make", "test-cuda-sanitized"),
    "stable": ("make", "test-stable"),
}
# What a shell, or the make that started this, must not pass on to a clean clone.
UNWANTED = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ONLY", "VIRTUAL_ENV",
            "PYTHONPATH", "LATTE_CPU_ISA", "LATTE_CUDA")  # fmt: skip

PAGE = """# Release check

`make release-check` clones what is committed into an empty folder and runs there everything \
that a release has to pass. `make release-check ONLY="lint wheel"` repeats stages. Logs: \
`build/release-check`.

Commit {commit}, on a machine with {cores} cores. A time is that of the wall clock, with \
whatever else the machine did.

| check | command | result | counted | time |
|---|---|---|---|---|
{rows}

{untested}
"""


@dataclass(frozen=True)
class Outcome:
    """What a stage came to."""

    passed: bool
    result: str
    seconds: float
    counted: str
    untested: list[str]


def counted(log: str) -> str:
    """The closing lines of test runners: passed / all, added up."""
    passed = failed = 0
    for line in log.splitlines():
        if match := re.search(r"\d+% tests passed, (\d+) tests failed out of (\d+)", line):
            failed += int(match[1])
            passed += int(match[2]) - int(match[1])
        elif re.search(r"\b\d+ (passed|failed|error).* in [\d.]+s", line):
            for number, word in re.findall(r"(\d+) (passed|failed|error)", line):
                passed += int(number) * (word == "passed")
                failed += int(number) * (word != "passed")
    total = passed + failed
    return f"{passed:,} of {total:,} tests" if total else ""


def untested(log: str) -> list[str]:
    """What a stage said that it left out, each once."""
    lines = [
        line.strip() for line in log.splitlines() if "NOT tested" in line or "NOT checked" in line
    ]
    return list(dict.fromkeys(lines))


def run_stage(name: str, command: tuple[str, ...], folder: Path, logs: Path) -> Outcome:
    """Runs a command in the clone; everything that it prints goes to a file."""
    environment = {key: value for key, value in os.environ.items() if key not in UNWANTED}
    begin = time.monotonic()
    path = logs / f"{name}.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(LIMIT_S)
            result = "passed" if code == 0 else f"FAILED, exit {code}"
        except BaseException as error:  # a keyboard interrupt must not leave the stage running
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code, result = -1, f"FAILED, more than {LIMIT_S} s"
    text = path.read_text(errors="replace")
    return Outcome(code == 0, result, time.monotonic() - begin, counted(text), untested(text))


def page(commit: str, outcomes: dict[str, Outcome], stages: dict[str, tuple[str, ...]]) -> str:
    """docs/release.md; a stage without outcome has not been run."""
    rows = []
    for name, command in stages.items():
        done = outcomes.get(name)
        cells = (
            (done.result, done.counted, f"{done.seconds:,.0f} s") if done else ("not run", "", "")
        )
        rows.append(f"| {name} | `{' '.join(command)}` | {' | '.join(cells)} |")
    left_out = list(dict.fromkeys(line for done in outcomes.values() for line in done.untested))
    return PAGE.format(
        commit=commit[:12],
        cores=os.cpu_count(),
        rows="\n".join(rows),
        untested="Left out, as the stages said:\n\n" + "\n".join(f"* {line}" for line in left_out)
        if left_out
        else "No stage left anything out.",
    )


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


class Check:
    """The outcomes of one commit, and the clone that they come from."""

    def __init__(self, stages: dict[str, tuple[str, ...]], out: Path, table: Path) -> None:
        self.stages, self.out, self.table = stages, out, table
        self.commit = git("rev-parse", "HEAD")
        self.clone = Path(tempfile.gettempdir()) / f"latte-release-check-{self.commit[:12]}"
        self.record = out / "outcomes.json"
        self.outcomes: dict[str, Outcome] = {}
        out.mkdir(parents=True, exist_ok=True)

    def prepare(self, anew: bool) -> None:
        """A clone; the one that is there, with its outcomes, if it is of this commit."""
        if anew or not (self.clone / ".git").is_dir():
            shutil.rmtree(self.clone, ignore_errors=True)
            git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(self.clone))
            git("-C", str(self.clone), "checkout", "--quiet", self.commit)
        elif self.record.is_file():
            stored = json.loads(self.record.read_text())
            if stored["commit"] == self.commit:
                self.outcomes = {k: Outcome(**v) for k, v in stored["outcomes"].items()}

    def run(self, names: list[str]) -> int:
        """The number of stages among `names` that failed."""
        for name in names:
            print(f"{name}: {' '.join(self.stages[name])}", flush=True)
            outcome = run_stage(name, self.stages[name], self.clone, self.out)
            print(f"  {outcome.result} {outcome.counted} {outcome.seconds:,.0f} s", flush=True)
            self.outcomes[name] = outcome
            stored = {k: asdict(v) for k, v in self.outcomes.items()}
            self.record.write_text(json.dumps({"commit": self.commit, "outcomes": stored}))
            self.table.write_text(page(self.commit, self.outcomes, self.stages))
        return sum(not self.outcomes[name].passed for name in names)


def main(arguments: list[str]) -> int:
    """The number of stages that failed."""
    unknown = set(arguments) - set(STAGES)
    if unknown:
        print(f"no stage {', '.join(sorted(unknown))}, expected some of {', '.join(STAGES)}")
        return 1
    if git("status", "--porcelain", "--untracked-files=no"):
        print("Note: what is not committed is not checked.")
    check = Check(STAGES, ROOT / "build" / "release-check", ROOT / "docs" / "release.md")
    check.prepare(anew=not arguments)
    failed = check.run(arguments or list(STAGES))
    print(check.table.read_text())
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
