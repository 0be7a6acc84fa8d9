# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext bench --overhead`: what one call costs beside its arithmetic.

Tensors of four elements on one thread, through the public function and through torch's dispatcher.
Each figure is the least of many samples of CPU time, taken in turn: a neighbour on the machine can
only add to it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch.nn import functional as F

from .. import (
    LatentState,
    MacchiatoState,
    WindowCache,
    latent_attention,
    latent_attention_step,
    linear_recurrence,
    macchiato_attention,
    macchiato_attention_step,
    rg_lru,
    rg_lru_step,
    rotary,
    short_conv,
    short_conv_step,
    sliding_window_attention,
    sliding_window_attention_step,
)
from .measure import Call, elapsed

# Microseconds in inference mode.
LIMIT = 4.5
_YARDSTICK = "torch.nn.functional.linear"
_MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad)

# By name, the public function and the registered operator.
Calls = dict[str, tuple[Callable[[], object], Callable[[], object]]]


def calls() -> Calls:
    """Every operator with a forward pass, and the yardstick, which has one way to be called."""
    ops = torch.ops.latte_ext
    x, row, weight = torch.randn(1, 1, 1, 4), torch.randn(1, 4), torch.randn(4, 4)
    tokens, head, decay = torch.randn(1, 1, 4), torch.randn(1, 1, 4), torch.zeros(4)
    state = LatentState(torch.zeros(1, 1, 4), torch.ones(1, 1, 4), torch.zeros(1, 1, 4, 4))
    hidden, tail, position = torch.zeros(1, 4), torch.zeros(1, 3, 4), torch.zeros(1).long()
    cache = WindowCache.empty(1, 1, 2, 4, 4)
    logits, one = torch.randn(1, 1, 1, 5), torch.randn(1, 1, 5)
    both = MacchiatoState(state, cache)
    no = (None,) * 14
    attention, step = ops.latent_attention.default, ops.latent_attention_step.default
    recur, gated = ops.linear_recurrence.default, ops.rg_lru.default
    gated_step, conv = ops.rg_lru_step.default, ops.short_conv.default
    conv_step, rotate = ops.short_conv_step.default, ops.rotate.default
    window = ops.sliding_window_attention.default
    window_step = ops.sliding_window_attention_step.default
    gate, gate_step = ops.macchiato_attention.default, ops.macchiato_attention_step.default

    def linear() -> object:
        return F.linear(row, weight)

    return {
        _YARDSTICK: (linear, linear),
        "latent_attention": (
            lambda: latent_attention(x, x, x),
            lambda: attention(x, x, x, *no[:5], True, 1.0),
        ),
        "latent_attention_step": (
            lambda: latent_attention_step(head, head, head, state),
            lambda: step(head, head, head, *state, 1.0),
        ),
        "linear_recurrence": (
            lambda: linear_recurrence(tokens, tokens),
            lambda: recur(tokens, tokens, None, None, False),
        ),
        "rg_lru": (
            lambda: rg_lru(tokens, tokens, tokens, decay),
            lambda: gated(tokens, tokens, tokens, decay, *no[:4], False),
        ),
        "rg_lru_step": (
            lambda: rg_lru_step(row, row, row, decay, hidden),
            lambda: gated_step(row, row, row, decay, hidden, None),
        ),
        "short_conv": (
            lambda: short_conv(tokens, weight),
            lambda: conv(tokens, weight, None, None, None, True),
        ),
        "short_conv_step": (
            lambda: short_conv_step(row, weight, None, tail),
            lambda: conv_step(row, weight, None, tail),
        ),
        "sliding_window_attention": (
            lambda: sliding_window_attention(x, x, x, window=2),
            lambda: window(x, x, x, *no[:7], 2, 0, True, 1.0, 0.0, False),
        ),
        "sliding_window_attention_step": (
            lambda: sliding_window_attention_step(head, head, head, cache),
            lambda: window_step(head, head, head, *cache, *no[:4], 1.0, 0.0),
        ),
        "macchiato_attention": (
            lambda: macchiato_attention(logits, x, x, x, x, window=2),
            lambda: gate(logits, x, None, x, x, x, *no[:11], 2, 0, True, 1.0, 0.0, 1.0, False),
        ),
        "macchiato_attention_step": (
            lambda: macchiato_attention_step(one, head, head, head, head, both),
            lambda: gate_step(
                one, head, None, head, head, head, *state, *cache, *no[:4], 1.0, 0.0, 1.0
            ),
        ),
        "rotate": (
            lambda: rotary.rotate(x, position),
            lambda: rotate(x, position, None, 10.0, None, False, False),
        ),
    }


def _made_in(mode: Callable[[], AbstractContextManager[object]]) -> Calls:
    with mode():
        return calls()


def measure(samples: int = 30, count: int = 500) -> dict[str, list[float]]:
    """Least seconds per call by name: of the function, then of the operator, in `_MODES`."""
    # A tensor that was made in inference mode has no versions to count.
    by_mode = [_made_in(mode) for mode in _MODES]
    least = {name: [float("inf")] * 2 * len(_MODES) for name in by_mode[0]}
    for _ in range(samples):
        for i, mode in enumerate(_MODES):
            with mode():
                for name, ways in by_mode[i].items():
                    for way, function in enumerate(ways):
                        at = way * len(_MODES) + i
                        least[name][at] = min(least[name][at], elapsed(Call(function), count))
    return least


def table(least: dict[str, list[float]]) -> str:
    """Markdown: microseconds per call, and how many calls of the yardstick the function's is."""
    modes = [f"{way}, {mode.__name__}" for way in ("function", "torch.ops") for mode in _MODES]
    lines = [
        f"| us per call | {' | '.join(modes)} | of linear |",
        f"|---|{'---:|' * (len(modes) + 1)}",
    ]
    for name, seconds in least.items():
        times = " | ".join(f"{1e6 * value:.2f}" for value in seconds)
        lines.append(f"| `{name}` | {times} | {seconds[0] / least[_YARDSTICK][0]:.2f} |")
    for what, at in (("functions", 0), ("operators of torch.ops", len(_MODES))):
        within = sum(
            1e6 * seconds[at] <= LIMIT for name, seconds in least.items() if name != _YARDSTICK
        )
        lines.append(f"\n{within} of {len(least) - 1} {what} within {LIMIT} us in inference mode")
    return "\n".join(lines)
