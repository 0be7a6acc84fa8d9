# SPDX-License-Identifier: Apache-2.0
"""Times one layer of latent attention against softmax attention at growing context.

Batch 1, float32; HEADS heads, and for both kinds of attention WIDTH: the number of latents of a
head, of channels of a softmax query and key, and of a value.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .functional import latent_attention, latent_attention_step

HEADS, WIDTH = 8, 64
# Seconds of repeated calls behind each number.
CALL_BUDGET = 0.2
# Softmax prefill is quadratic: a context for which it would take more seconds is left out.
PREFILL_LIMIT = 4.0


class Timing(NamedTuple):
    """Milliseconds per token, and bytes of memory for the past, at `context` tokens.

    sdpa_prefill is None where it would have taken too long.
    """

    context: int
    latte_decode: float
    sdpa_decode: float
    latte_prefill: float
    sdpa_prefill: float | None
    latte_bytes: int
    sdpa_bytes: int


def milliseconds(call: Callable[[], object], budget: float = CALL_BUDGET) -> float:
    """Median time of a call, over `budget` seconds of calls.

    The first one, which may pay for page faults, counts only if there is no other.
    """
    times: list[float] = []
    while sum(times) < budget:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:] or times)


@torch.no_grad()
def measure(contexts: Sequence[int]) -> list[Timing]:
    """One `Timing` per context, in rising order.

    Prefill: causal attention of `context` tokens. Decode: one more token after them; the softmax
    layer, torch's scaled_dot_product_attention, writes it to a cache allocated before and attends
    to the whole cache.
    """
    generator = torch.Generator().manual_seed(0)
    timings: list[Timing] = []
    quadratic = 0.0
    for context in sorted(contexts):
        q, k, v = torch.randn(3, 1, HEADS, context, WIDTH, generator=generator)
        last = q[:, :, -1], k[:, :, -1], v[:, :, -1]
        _, state = latent_attention(q, k, v, return_state=True)
        sdpa_prefill = None
        if quadratic * context**2 <= 1e3 * PREFILL_LIMIT:
            total = milliseconds(partial(F.scaled_dot_product_attention, q, k, v, is_causal=True))
            quadratic = total / context**2
            sdpa_prefill = total / context
        timings.append(
            Timing(
                context=context,
                latte_decode=milliseconds(partial(latent_attention_step, *last, state)),
                sdpa_decode=milliseconds(partial(_cached_attention, *last, k.clone(), v.clone())),
                latte_prefill=milliseconds(partial(latent_attention, q, k, v)) / context,
                sdpa_prefill=sdpa_prefill,
                latte_bytes=state.nbytes,
                sdpa_bytes=2 * k.numel() * k.element_size(),
            )
        )
    return timings


def _cached_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of the last token, q, k, v (1,H,D), over caches (1,H,n,D) it completes."""
    keys[:, :, -1] = k
    values[:, :, -1] = v
    return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values)


def table(timings: Sequence[Timing]) -> str:
    """The timings as an aligned text table."""
    head = ("", "decode, ms per token", "", "prefill, ms per token", "", "memory of the past", "")
    rows = [("context", *("latte", "softmax") * 3)]
    for timing in timings:
        rows.append(
            (
                f"{timing.context:,}",
                f"{timing.latte_decode:.4f}",
                f"{timing.sdpa_decode:.4f}",
                f"{timing.latte_prefill:.5f}",
                "-" if timing.sdpa_prefill is None else f"{timing.sdpa_prefill:.5f}",
                f"{timing.latte_bytes / 2**20:.2f} MiB",
                f"{timing.sdpa_bytes / 2**20:.2f} MiB",
            )
        )
    width = 12
    first = f"{head[0]:>9}" + "".join(f"{group:>{2 * width}}" for group in head[1::2])
    return "\n".join(
        [first, *(f"{row[0]:>9}" + "".join(f"{cell:>{width}}" for cell in row[1:]) for row in rows)]
    )
