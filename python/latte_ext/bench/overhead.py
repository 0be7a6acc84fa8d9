# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext bench --overhead`: what one call of an operator costs beside its arithmetic.

Tensors of four elements on one thread. Each figure is the least of many samples of CPU time, taken
in turn: a neighbour on the machine can only add to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .. import rotary as rotary  # registers its operator
from .measure import Call, elapsed

# Microseconds of an operator in inference mode.
LIMIT = 4.5
_YARDSTICK = "torch.nn.functional.linear"
_MODES = (torch.inference_mode, torch.no_grad, torch.enable_grad)


def calls() -> dict[str, Callable[[], object]]:
    """An operator each, and the yardstick."""
    ops = torch.ops.latte_ext
    x, row, weight = torch.randn(1, 1, 1, 4), torch.randn(1, 4), torch.randn(4, 4)
    tokens, head, decay = torch.randn(1, 1, 4), torch.randn(1, 1, 4), torch.zeros(4)
    state = torch.zeros(1, 1, 4), torch.ones(1, 1, 4), torch.zeros(1, 1, 4, 4)
    hidden, tail, position = torch.zeros(1, 4), torch.zeros(1, 3, 4), torch.zeros(1).long()
    cache = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 2).bool(), position
    no = (None,) * 7
    attention, step = ops.latent_attention.default, ops.latent_attention_step.default
    recur, gated = ops.linear_recurrence.default, ops.rg_lru.default
    gated_step, conv = ops.rg_lru_step.default, ops.short_conv.default
    conv_step, rotate = ops.short_conv_step.default, ops.rotate.default
    window, window_step = (
        ops.sliding_window_attention.default,
        ops.sliding_window_attention_step.default,
    )
    return {
        _YARDSTICK: lambda: F.linear(row, weight),
        "latent_attention": lambda: attention(x, x, x, *no[:5], True, 1.0),
        "latent_attention_step": lambda: step(head, head, head, *state, 1.0),
        "linear_recurrence": lambda: recur(tokens, tokens, None, None, False),
        "rg_lru": lambda: gated(tokens, tokens, tokens, decay, *no[:4], False),
        "rg_lru_step": lambda: gated_step(row, row, row, decay, hidden, None),
        "short_conv": lambda: conv(tokens, weight, None, None, None, True),
        "short_conv_step": lambda: conv_step(row, weight, None, tail),
        "sliding_window_attention": lambda: window(x, x, x, *no, 2, 0, True, 1.0, 0.0, False),
        "sliding_window_attention_step": lambda: window_step(
            head, head, head, *cache, *no[:4], 1.0, 0.0
        ),
        "rotate": lambda: rotate(x, position, None, 10.0, None, False, False),
    }


def measure(samples: int = 60, count: int = 200) -> dict[str, list[float]]:
    """Least seconds per call in each of `_MODES`, by name."""
    functions = calls()
    least = {name: [float("inf")] * len(_MODES) for name in functions}
    for _ in range(samples):
        for i, mode in enumerate(_MODES):
            with mode():
                for name, function in functions.items():
                    least[name][i] = min(least[name][i], elapsed(Call(function), count))
    return least


def table(least: dict[str, list[float]]) -> str:
    """Markdown: microseconds per call, and how many calls of the yardstick that is."""
    lines = [
        f"| operator | {' | '.join(f'{mode.__name__}, us' for mode in _MODES)} | of linear |",
        f"|---|{'---:|' * (len(_MODES) + 1)}",
    ]
    for name, seconds in least.items():
        times = " | ".join(f"{1e6 * value:.2f}" for value in seconds)
        lines.append(f"| `{name}` | {times} | {seconds[0] / least[_YARDSTICK][0]:.2f} |")
    within = sum(1e6 * seconds[0] <= LIMIT for seconds in least.values()) - 1
    lines.append(f"\n{within} of {len(least) - 1} operators within {LIMIT} us in inference mode")
    return "\n".join(lines)
