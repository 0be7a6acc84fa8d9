# SPDX-License-Identifier: Apache-2.0
"""What the project set out to reach, and whether the measured rows do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from .cases import Row


class Target(NamedTuple):
    """A limit for the worst of the rows whose key matches.

    Args:
        label: what is limited.
        pattern: of the keys, as in a shell.
        op: ">=" or "<=".
        limit: in the unit of the rows.
        isa: the instruction set that it is set for; None: any.
        from_tokens: leaves out "group/tokens/..." rows of fewer tokens.
    """

    label: str
    pattern: str
    op: str
    limit: float
    isa: str | None = None
    from_tokens: int = 0


class Outcome(NamedTuple):
    """A target and the number that decides it; None where it was not measured."""

    target: Target
    value: float | None

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        at_least = self.target.op == ">="
        return self.value >= self.target.limit if at_least else self.value <= self.target.limit


_V4, _V3 = "x86-64-v4", "x86-64-v3"

_RECURRENCES = tuple(
    Target(f"{op} {which}, float32, of copy bandwidth", f"recurrences/{op}/{which}/float32/copy/1",
           ">=", limit)
    for op in ("linear_recurrence", "rg_lru", "short_conv")
    for which, limit in (("forward", 0.6), ("backward", 0.5))
)  # fmt: skip

TARGETS = (
    *_RECURRENCES,
    Target("forward, L = 64, 1 thread", "causal/forward/1x8x*x64x64/1", ">=", 0.76, _V4),
    Target("forward, L = 64, all threads", "causal/forward/1x8x*x64x64/all", ">=", 0.74, _V4),
    Target("forward, L = 128", "causal/forward/1x8x*x128x64/1", ">=", 0.80, _V4),
    Target("forward, L = 32, 4 heads", "causal/forward/1x4x*x32x64/1", ">=", 0.72, _V4),
    Target("backward, L = 64", "causal/backward/1x8x*x64x64/1", ">=", 0.76, _V4),
    Target("forward + backward over forward", "training/1x8x*x64x64/*", "<=", 3.9),
    Target("x86-64-v3 forward, any alignment", f"{_V3}/alignment/forward/*/1", ">=", 0.74),
    Target("x86-64-v3 backward, any alignment", f"{_V3}/alignment/backward/*/1", ">=", 0.72),
    Target("forward, L = D = 43", "odd/forward/43x43/1", ">=", 0.60, _V4),
    Target("forward, L = 10, D = 32", "odd/forward/10x32/1", ">=", 0.35, _V4),
    Target("bidirectional forward", "bidirectional/forward/*/1", ">=", 0.72, _V4),
    Target("bidirectional backward", "bidirectional/backward/*/1", ">=", 0.72, _V4),
    Target("one long sequence, all threads over 1", "long/*", ">=", 1.6),
    Target("heads, all threads over 1", "heads/*", ">=", 1.95),
    Target("(B,T,H,.) over (B,H,T,.)", "order/*", "<=", 1.1),
    Target("keys that rise at every token", "rising/*", "<=", 1.35),
    Target("keys that rise once per chunk", "rising/0.25/*", "<=", 1.15),
    Target("bfloat16 and float16 over float32", "half/*", "<=", 1.0),
    Target("time per token, longest over shortest", "flat", "<=", 1.1),
    Target("decode step, us", "decode/latte", "<=", 8.0),
    Target("many states, of copy bandwidth", "states/*", ">=", 0.85),
    Target("faster than softmax attention, T = 8192", "peers/8192/sdpa", ">=", 60.0),
    Target("faster than the best torch form, T = 8192", "peers/8192/torch *", ">=", 6.0),
    Target("faster than softmax attention from T = 256", "peers/*/sdpa", ">=", 1.0, None, 256),
    Target(
        "forward + backward, faster than the best torch form", "training peers/*/torch *", ">=", 5.0
    ),
    Target("window forward, w = 128, of the band", "window/forward/128/1", ">=", 0.5, _V4),
    Target("window backward, w = 128, of the band", "window/backward/128/1", ">=", 0.5, _V4),
    Target("window, faster than FlexAttention", "window peers/*/flex", ">=", 3.0),
    Target(
        "window forward + backward, faster than blocks of softmax attention",
        "window training peers/*/blockwise",
        ">=",
        5.0,
    ),
    Target("macchiato over the sum of its branches", "macchiato/*", "<=", 1.05),
)


def outcomes(rows: Sequence[Row], isa: str) -> list[Outcome]:
    """Every target with the worst value among its rows."""
    return [Outcome(target, _value(target, rows, isa)) for target in TARGETS]


def _value(target: Target, rows: Sequence[Row], isa: str) -> float | None:
    values = [
        row.value
        for row in rows
        if fnmatchcase(row.key, target.pattern) and _tokens(row.key) >= target.from_tokens
    ]
    if not values or target.isa not in (None, isa):
        return None
    return min(values) if target.op == ">=" else max(values)


def _tokens(key: str) -> int:
    found = re.match(r"[^/]+/(\d+)/", key)
    return int(found[1]) if found else 0
