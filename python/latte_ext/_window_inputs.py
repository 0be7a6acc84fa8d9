# SPDX-License-Identifier: Apache-2.0
"""What windows and Macchiato check, and put in front of their tokens, in the same way."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import _core
from ._checks import (
    check_beside,
    check_by_core,
    check_cu_seqlens,
    check_dense,
    check_device,
    check_flags,
    check_scale,
    check_type,
    reported_as,
)
from ._register import count_sequences
from .window_cache import WindowCache, WindowSinks


def check_window(
    op: str, q: Tensor, window: int, scale: float | None, causal: bool, *, minimum: int
) -> float:
    """The scale, after the checks of scalars."""
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"[{op}] window is a {type(window).__name__}, expected an int")
    if window < minimum:
        raise ValueError(f"[{op}] window is {window}, expected at least {minimum}")
    if window > 1 << 62:  # positions are added to it
        raise ValueError(f"[{op}] window is {window}, expected at most 2^62")
    if scale is None:
        scale = default_scale(q)
    check_flags(op, causal=causal)
    check_scale(op, scale)
    return scale


def default_scale(q: Tensor) -> float:
    """1/sqrt(Dk)."""
    return 1 / math.sqrt(q.shape[-1]) if q.dim() and q.shape[-1] else 1.0


def check_softcap(op: str, softcap: float | None) -> float:
    """The cap as the core takes it, 0 for none."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"[{op}] softcap is a {type(softcap).__name__}, expected a float or None")
    if not 0 < softcap < math.inf:
        raise ValueError(f"[{op}] softcap is {softcap}, expected a positive finite number or None")
    return float(softcap)


def check_cache(op: str, q: Tensor, cache: WindowCache) -> None:
    check_type(op, "cache", cache, WindowCache)
    check_device(op, "cache", cache.device, q)


# q, k, v and position of `WindowSinks`.
SinkTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def sink_tensors(op: str, q: Tensor, sinks: WindowSinks | None) -> SinkTensors:
    """What sinks consist of, after the checks of types; the core checks shapes."""
    if sinks is None:
        return (None, None, None, None)
    check_type(op, "sinks", sinks, WindowSinks)
    for name, tensor in zip(("q", "k", "v"), sinks[:3], strict=True):
        check_beside(op, q, f"sinks.{name}", tensor)
    position = sinks.position
    if position is not None:
        check_type(op, "sinks.position", position, Tensor)
        check_dense(op, "sinks.position", position)
        check_device(op, "sinks.position", position.device, q)
        if position.dtype != torch.int64:
            raise TypeError(
                f"[{op}] sinks.position has dtype {position.dtype}, expected torch.int64"
            )
    return sinks.q, sinks.k, sinks.v, position


def check_window_by_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    sink_position: Tensor | None,
    start: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    softcap: float,
) -> None:
    """`check_by_core` for the keys that a window sees."""

    def check(borders: Tensor | None) -> None:
        _core.sliding_window_check(
            q, k, v, key_mask, borders, q_sink, k_sink, v_sink, sink_position, window, past, causal,
            scale, softcap,
        )  # fmt: skip

    check_by_core(check, cu_seqlens)


class Seen(NamedTuple):
    """Keys, values and mask of a window: `past` of a cache, then those of a sequence's tokens."""

    key: Tensor
    value: Tensor
    mask: Tensor | None
    past: int = 0
    start: Tensor | None = None
    cache: WindowCache | None = None

    def start_beside(self, sink_position: Tensor | None) -> Tensor | None:
        """`start` where it matters, in memory that no later step on the cache updates."""
        return None if sink_position is None or self.start is None else self.start.clone()

    def after(self, cu_seqlens: Tensor | None) -> WindowCache:
        """The cache after the last token."""
        assert self.cache is not None
        assert self.mask is not None
        return self.cache.after(self.key, self.value, self.mask, cu_seqlens)


def seen_by_window(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: WindowCache | None,
    return_cache: bool,
) -> Seen:
    """The tokens behind those of a cache; raises ValueError for one that does not fit."""
    if cache is None and not return_cache:
        return Seen(k, v, key_mask)
    if not causal:
        raise ValueError(f"[{op}] got a cache with causal=False, expected causal=True")
    # Before a cache is put in front of them, so that messages tell what was given. The values of
    # borders on a device are not looked at, which would wait for it.
    check_cu_seqlens(op, cu_seqlens)
    borders = cu_seqlens if q.device.type == "cpu" else None
    with reported_as(op, "sliding_window_attention"):
        check_window_by_core(
            q, k, v, key_mask, borders, None, None, None, None, None, window, 0, causal, 1.0, 0.0
        )
    sequences = count_sequences(q, cu_seqlens)
    if cache is None:
        # Only the cache that is returned matters.
        cache = WindowCache(
            k.new_zeros(sequences, k.shape[1], window, k.shape[3]),
            v.new_zeros(sequences, k.shape[1], window, v.shape[3]),
            k.new_zeros(sequences, window, dtype=torch.bool),
            k.new_zeros(sequences, dtype=torch.int64),
        )
    else:
        check_cache(op, q, cache)
        cache._check(op, "cache.")
        for name, x, other in (("key", cache.key, k), ("value", cache.value, v)):
            expected = (sequences, k.shape[1], window, other.shape[3])
            if tuple(x.shape) != expected:
                raise ValueError(
                    f"[{op}] cache.{name} has shape {tuple(x.shape)}, expected {expected}: "
                    "(N, Hk, window, channels)"
                )
    keys = cache.before(k, v, key_mask, cu_seqlens)
    return Seen(*keys, past=cache.window, start=cache.position, cache=cache)
