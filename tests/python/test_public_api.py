# SPDX-License-Identifier: Apache-2.0
"""The public API is the one of tests/python/public_api.txt, which a change has to change too."""

import difflib
import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "public_api.py"
spec = importlib.util.spec_from_file_location("public_api", TOOL)
assert spec is not None
assert spec.loader is not None
public_api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(public_api)


def test_the_public_api_is_the_one_recorded() -> None:
    recorded = public_api.SNAPSHOT.read_text()
    found = public_api.public_api()
    if found != recorded:
        difference = difflib.unified_diff(
            recorded.splitlines(), found.splitlines(), "recorded", "found", n=0, lineterm=""
        )
        pytest.fail(
            "\n".join(difference) + "\nIf this change is meant: `python tools/public_api.py "
            "--update`, and a line in CHANGELOG.md (removed or changed: under Changed)."
        )


class Sample:
    """What the signatures of a class are made of."""

    __module__ = "latte_ext.sample"

    def __init__(self, x: "int", *, y: "float" = 1.0) -> None: ...

    def method(self, z: "str" = "a") -> str | None:
        return z

    @classmethod
    def build(cls, n: "int") -> "Sample":
        return cls(n)

    @property
    def size(self) -> int:
        return 0

    def _private(self) -> None: ...


def test_what_is_recorded_of_a_class() -> None:
    assert list(public_api.members(Sample)) == [
        "(x: int, *, y: float = 1.0) -> None",
        "  .build(n: int) -> Sample [classmethod]",
        "  .method(self, z: str = 'a') -> str | None",
        "  .size",
    ]


def test_what_is_recorded_of_a_header() -> None:
    header = """#pragma once
/* A block { of } text; */
#define DECLARE(X) \\
  int latte_##X(int)
struct Pair {
  int a;  // one
  float b = 1.0;
};
LATTE_EXPORT void run(const Pair& pair,
                      int threads);
"""
    assert public_api.declarations(header) == [
        "#define DECLARE(X) int latte_##X(int)",
        "struct Pair {",
        "int a;",
        "float b = 1.0;",
        "};",
        "void run(const Pair& pair, int threads);",
    ]


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert public_api.main(["--unknown"]) == 2
    assert "--update" in capsys.readouterr().err
