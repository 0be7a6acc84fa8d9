# SPDX-License-Identifier: Apache-2.0
"""The sweep of the planner's choices, with a clock and a planner of its own on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from latte_ext.bench import cuda, tune

TINY = cuda.SIZES["tiny"]


class Planner:
    """264 blocks of 512 tokens are the fastest, and choices far from them slow."""

    def __init__(self) -> None:
        self.now = (0, 0)
        self.calls = 0

    def choose(self, wanted_blocks: int, min_segment_tokens: int) -> None:
        self.now = (wanted_blocks, min_segment_tokens)

    def clock(self, call: Callable[[], object]) -> float:
        self.calls += 1
        blocks, tokens = self.now
        return 10 + abs(blocks - 264) / 100 + abs(tokens - 512) / 100


def test_the_fastest_choice_becomes_the_header(tmp_path: Path) -> None:
    planner = Planner()
    found = tune.tune(TINY, "cpu", planner.clock, planner.choose)
    choices = len(tune.WANTED_BLOCKS) * len(tune.MIN_SEGMENT_TOKENS)
    assert len(found) == choices
    assert planner.calls == 3 * choices
    assert (found[0].wanted_blocks, found[0].min_segment_tokens) == (264, 512)
    assert found[0].slowdown == pytest.approx(1)
    assert [choice.slowdown for choice in found] == sorted(c.slowdown for c in found)
    tune.write(tmp_path / "tuned.h", "Stand-in", found)
    header = (tmp_path / "tuned.h").read_text()
    assert "inline constexpr Tuning kTuned = {264, 512};" in header
    assert "// Stand-in." in header
    facts = json.loads((tmp_path / "tuned.json").read_text())
    assert facts["device"] == "Stand-in"
    assert len(facts["choices"]) == choices
    rows = (tmp_path / "tuned.md").read_text().splitlines()
    assert rows[2].startswith("| 264 | 512 | 1.000 | 1.00 | 1.00 | 1.00 |")


def test_the_header_is_that_of_the_sources_but_for_its_numbers() -> None:
    """What a sweep writes can take the place of cuda/tuned.h."""
    written = tune.HEADER.format(device="X", wanted_blocks=264, min_segment_tokens=256)
    kept = (Path(__file__).parents[2] / "cuda" / "tuned.h").read_text()
    assert written[written.index("#pragma once") :] == kept[kept.index("#pragma once") :]


def test_wrong_results_are_not_timed() -> None:
    planner = Planner()
    said: list[str] = []

    def choose(wanted_blocks: int, min_segment_tokens: int) -> None:
        planner.choose(wanted_blocks, min_segment_tokens)
        monkeypatch.setattr(tune, "ALLOWED", -1.0 if wanted_blocks == 132 else 1.0)

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(RuntimeError, match="no case"):
        tune.tune(TINY, "cpu", planner.clock, choose, said.append)
    assert any("with 132 blocks of 128 tokens is off by" in line for line in said)
