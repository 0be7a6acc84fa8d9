# SPDX-License-Identifier: Apache-2.0
"""docs/support.md: which operator works with which part of torch, read off the tests that ran.

A test marked `@pytest.mark.supports(feature, *operators)` stands for those cells of the table; with
no operators, for the one of its parameters `op` or `case`. A cell is "yes" where all its tests
passed. `pytest tests/python -m supports --support-matrix docs/support.md` writes the page, and the
same table between the marks in README.md.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
MARKS = ("<!-- support: begin -->\n", "<!-- support: end -->\n")

OPERATORS = (
    "latent_attention",
    "linear_recurrence",
    "rg_lru",
    "short_conv",
    "sliding_window_attention",
    "macchiato_attention",
    "rotate",
)
HEADER = """# What works with what

Written by `pytest tests/python -m supports --support-matrix docs/support.md` from the tests that carry the marker `supports`; do not edit.
"yes": every such test passed. "not run": its tests need what the machine that wrote this page lacks. Empty: no test says so; the pages beside this one say whether it raises.
With torch {torch}. What each row means in detail: [torch.md](torch.md).

"""  # noqa: E501


class Matrix:
    """The outcomes of the marked tests of one run."""

    def __init__(self) -> None:
        self.outcomes: defaultdict[tuple[str, str], set[str]] = defaultdict(set)

    def add(self, item: pytest.Item, outcome: str) -> None:
        for marker in item.iter_markers("supports"):
            feature, *operators = marker.args
            for operator in operators or [_parameter(item)]:
                self.outcomes[feature, operator].add(outcome)

    def write(self, path: Path, torch_version: str) -> None:
        features = sorted({feature for feature, _ in self.outcomes})
        lines = [
            f"| | {' | '.join(f'`{name}`' for name in OPERATORS)} |",
            f"|---|{'---|' * len(OPERATORS)}",
        ]
        for feature in features:
            cells = [_cell(self.outcomes.get((feature, name), ())) for name in OPERATORS]
            lines.append(f"| {feature} | {' | '.join(cells)} |")
        table = "\n".join(lines) + "\n"
        path.write_text(HEADER.format(torch=torch_version) + table)
        before, rest = README.read_text().split(MARKS[0])
        README.write_text(before + MARKS[0] + table + MARKS[1] + rest.split(MARKS[1])[1])


def _cell(outcomes: Iterable[str]) -> str:
    found = set(outcomes)
    if "failed" in found:
        return "fails"
    if "passed" in found:
        return "yes"
    return "not run" if found else ""


def _parameter(item: pytest.Item) -> str:
    """The operator of a parametrised test: cases are named after it, or are attention's."""
    parameters = item.callspec.params  # type: ignore[attr-defined]
    name = parameters.get("op") or parameters.get("case") or parameters["name"]
    short = {"window": "sliding_window_attention", "macchiato": "macchiato_attention"}
    for prefix in (*OPERATORS, *short):
        if name.startswith(prefix):
            return short.get(prefix, prefix)
    return "latent_attention"
