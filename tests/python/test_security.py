# SPDX-License-Identifier: Apache-2.0
"""What SECURITY.md promises of the sources, and the audit of dependencies."""

import ast
import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import latte_ext
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "audit.py"
spec = importlib.util.spec_from_file_location("audit", TOOL)
assert spec is not None
assert spec.loader is not None
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

# Modules that run what they read, and calls that run text.
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen"}


def dangers(source: str) -> Iterator[str]:
    """What in a Python source could run code that it has read."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_MODULES:
            yield node.module
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield name
            safe = any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
                for keyword in node.keywords
            )
            if name == "torch.load" and not safe:
                yield "torch.load without weights_only=True"


def test_no_module_runs_what_it_reads() -> None:
    sources = list(Path(latte_ext.__file__).parent.rglob("*.py"))
    assert len(sources) > 40
    found = {path.name: [*dangers(path.read_text())] for path in sources}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("eval(text)", "eval"),
    ],
)
def test_a_danger_is_seen(source: str, danger: str) -> None:
    assert [*dangers(source)] == [danger]


def test_a_vulnerability_fails_and_silence_is_no_pass() -> None:
    clean = {"name": "a", "version": "1", "vulns": []}
    flawed = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    skipped = {"name": "c", "skip_reason": "not found"}
    assert audit.verdict([clean, skipped]) == (0, ["vulnerabilities: none known in 1 packages"])
    assert audit.verdict([clean, flawed]) == (1, ["FAILED: b 2: CVE-1, fixed in 3"])
    code, lines = audit.verdict([skipped])
    assert code == 0
    assert "NOT checked" in lines[0]


def test_an_index_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "warning\nConnectionError: no route\n")
    monkeypatch.setattr(audit.subprocess, "run", lambda *args, **kw: failed)
    assert audit.main() == 0
    printed = capsys.readouterr().out
    assert printed == "vulnerabilities: NOT checked: ConnectionError: no route\n"
