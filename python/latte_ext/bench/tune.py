# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext bench --device cuda --tune FILE`: how long sequences are cut, measured.

The planner cuts a sequence where few of them would leave a device idle: into as many segments as
make `wanted_blocks`, none shorter than `min_segment_tokens`. Both decide the order of sums, so they
are constants of a build, `cuda/tuned.h`, which this writes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import _core
from .cuda import (
    ALLOWED,
    SIZES,
    Case,
    Clock,
    Sizes,
    attention_cases,
    device_clock,
    refusal,
)

# One block to four on each of the 132 multiprocessors of an H100.
WANTED_BLOCKS = (132, 264, 396, 528)
MIN_SEGMENT_TOKENS = (128, 256, 512)

HEADER = """\
// SPDX-License-Identifier: Apache-2.0
// Written by `python -m latte_ext bench --device cuda --tune FILE`: measured on
// {device}.
#pragma once

#include "latte/cuda.h"

namespace latte::cuda {{

inline constexpr Tuning kTuned = {{{wanted_blocks}, {min_segment_tokens}}};

}}  // namespace latte::cuda
"""


@dataclasses.dataclass
class Choice:
    """One choice of the planner: microseconds of every case, and what they come to.

    Args:
        slowdown: the geometric mean over cases of the time relative to that case's best choice.
    """

    wanted_blocks: int
    min_segment_tokens: int
    us: dict[str, float]
    slowdown: float = math.nan


def tune(
    sizes: Sizes,
    device: str,
    clock: Clock,
    choose: Callable[[int, int], None] = _core.set_cuda_tuning,
    note: Callable[[str], None] = print,
) -> list[Choice]:
    """Every choice, the fastest first. `choose` sets one; a wrong result is not timed.

    Raises:
        RuntimeError: no choice gives right results, or no case could be timed with all of them.
    """
    found = [Choice(*pair, {}) for pair in itertools.product(WANTED_BLOCKS, MIN_SEGMENT_TOKENS)]
    for case in attention_cases(sizes, device):
        for choice in found:
            choose(choice.wanted_blocks, choice.min_segment_tokens)
            _time(case, choice, clock, note)
    names = set.intersection(*(set(choice.us) for choice in found))
    if not names:
        raise RuntimeError("[bench] no case is right under every choice, expected one at least")
    for choice in found:
        ratios = [choice.us[name] / min(other.us[name] for other in found) for name in names]
        choice.slowdown = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return sorted(found, key=lambda choice: choice.slowdown)


def _time(case: Case, choice: Choice, clock: Clock, note: Callable[[str], None]) -> None:
    error = case.error()
    if error <= ALLOWED:
        choice.us[f"{case.name}, {case.shape}"] = clock(case.call)
    else:
        note(
            f"NOT timed: {case.name} {case.shape} with {choice.wanted_blocks} blocks of "
            f"{choice.min_segment_tokens} tokens is off by {error:.1e} of the largest value"
        )


def table(found: Sequence[Choice]) -> str:
    """A row per choice, times relative to the best of every case."""
    names = sorted(found[0].us)
    lines = [
        "| blocks | tokens at least | slower than the best | " + " | ".join(names) + " |",
        "|---:|---:|---:|" + "---:|" * len(names),
    ]
    for choice in found:
        cells = [
            f"{choice.us[name] / min(other.us[name] for other in found if name in other.us):.2f}"
            if name in choice.us
            else "wrong"
            for name in names
        ]
        lines.append(
            f"| {choice.wanted_blocks} | {choice.min_segment_tokens} | {choice.slowdown:.3f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def write(path: Path, device: str, found: Sequence[Choice]) -> None:
    """The header at `path`; beside it every time as .json and the table as .md."""
    best = found[0]
    path.write_text(
        HEADER.format(
            device=device,
            wanted_blocks=best.wanted_blocks,
            min_segment_tokens=best.min_segment_tokens,
        )
    )
    facts = {"device": device, "choices": [dataclasses.asdict(choice) for choice in found]}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(found))


def run(size: str, path: Path) -> int:
    """Measure, print and write; returns the exit code.

    Args:
        size: a key of SIZES.
        path: where the header goes.
    """
    if problem := refusal():
        print(problem)
        return 1
    torch.manual_seed(0)
    before = _core.cuda_tuning()
    try:
        found = tune(SIZES[size], "cuda", device_clock)
    finally:
        _core.set_cuda_tuning(*before)
    write(path, torch.cuda.get_device_name(), found)
    print(table(found))
    return 0
