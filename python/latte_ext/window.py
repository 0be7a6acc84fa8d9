# SPDX-License-Identifier: Apache-2.0
"""Attention to a local window, alone and in one probability with latents (Latte Macchiato).

Notation as in `functional`, and Dk key channels per head, Hl latent heads, n sinks.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from . import reference
from .functional import Backend, _check_backend, _check_scalars, _check_tensors
from .state import LatentState
from .window_cache import MacchiatoState, WindowCache, WindowSinks


@overload
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = ...,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    cache: WindowCache | None = ...,
    return_cache: Literal[False] = ...,
    sinks: WindowSinks | None = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = ...,
    scale: float | None = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    cache: WindowCache | None = ...,
    return_cache: Literal[True],
    sinks: WindowSinks | None = ...,
    backend: Backend | None = ...,
) -> tuple[Tensor, WindowCache]: ...
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache: WindowCache | None = None,
    return_cache: bool = False,
    sinks: WindowSinks | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, WindowCache]:
    """Softmax attention of every token to its last `window` tokens, itself included.

    O(T window) time, O(T) memory. Masked tokens keep their place in the window; a row that sees no
    key gives y = 0. (Latent 0 of Latte Macchiato, arXiv 2402.17512.)

    Args:
        q: (B,H,T,Dk). float32, bfloat16, float16, or float64 (then k and v too).
        k: (B,Hk,T,Dk), H a multiple of Hk. v: (B,Hk,T,D). Any strides are accepted.
        window: >= 1; token t sees the tokens s with t - window < s <= t.
        causal: false for |t - s| < window.
        scale: multiplies q . k; None is 1/sqrt(Dk).
        key_mask: (B,T) bool, true for a real token; nothing attends to the others.
        cu_seqlens: (N+1,) int32 or int64 borders of N sequences packed along T, with B == 1.
        cache: the tokens before these, N sequences with this window (causal only); left as it is.
        return_cache: also return the cache after the last token (causal only).
        sinks: keys and values that tokens see beyond their window.
        backend: None chooses by device; "cpu", "cuda", or "reference" (plain torch).

    Returns:
        y (B,H,T,D) in v's dtype, and the `WindowCache` if asked for. Gradients reach q, k, v, the
        cache's keys and values and the sinks.

    Raises:
        ValueError: shapes, values or combinations; TypeError: dtypes; RuntimeError: devices.
    """
    op = "sliding_window_attention"
    _check_tensors(op, q=q, k=k, v=v, key_mask=key_mask, cu_seqlens=cu_seqlens)
    scale = _check_window(op, q, window, scale, causal, minimum=1)
    _check_backend(op, q, backend)
    before = _before(op, q, k, v, window, causal, key_mask, cu_seqlens, cache, return_cache)
    past = 0 if before is None else before.window
    keys, values, mask = (
        (k, v, key_mask) if before is None else before.before(k, v, key_mask, cu_seqlens)
    )
    y = reference.sliding_window_attention(
        q, keys, values, window=window, causal=causal, scale=scale, key_mask=mask,
        cu_seqlens=cu_seqlens, past=past, sinks=sinks,
        start=None if before is None else before.position,
    )  # fmt: skip
    if not return_cache:
        return y
    assert before is not None
    assert mask is not None
    return y, before.after(keys, values, mask, cu_seqlens)


def sliding_window_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: WindowCache,
    *,
    scale: float | None = None,
    sinks: WindowSinks | None = None,
) -> Tensor:
    """One token per sequence: constant time and memory, `cache` is updated in place.

    Equals `sliding_window_attention` over one more token. Not differentiable.

    Args:
        q: (N,H,Dk), k: (N,Hk,Dk), v: (N,Hk,D), dtypes as in `sliding_window_attention`.
        cache: N sequences, Hk heads; its window is the window.
        scale: multiplies q . k; None is 1/sqrt(Dk).
        sinks: as in `sliding_window_attention`, with q (N,H,Dk).

    Returns:
        y (N,H,D) in v's dtype.
    """
    op = "sliding_window_attention_step"
    _check_tensors(op, q=q, k=k, v=v)
    scale = _check_window(op, q, 1, scale, True, minimum=1)
    _check_cache(op, q, cache)
    if sinks is not None:
        sinks = sinks._replace(q=sinks.q.unsqueeze(2))
    y, after = sliding_window_attention(
        q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), window=cache.window, scale=scale,
        cache=cache, return_cache=True, sinks=sinks,
    )  # fmt: skip
    for tensor, new in zip(cache, after, strict=True):
        tensor.copy_(new)
    return y.squeeze(2)


@overload
def macchiato_attention(
    q_latent: Tensor,
    k_latent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = ...,
    scale: float | None = ...,
    latent_scale: float = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    state: MacchiatoState | None = ...,
    return_state: Literal[False] = ...,
    sinks: WindowSinks | None = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def macchiato_attention(
    q_latent: Tensor,
    k_latent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = ...,
    scale: float | None = ...,
    latent_scale: float = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    state: MacchiatoState | None = ...,
    return_state: Literal[True],
    sinks: WindowSinks | None = ...,
    backend: Backend | None = ...,
) -> tuple[Tensor, MacchiatoState]: ...
def macchiato_attention(
    q_latent: Tensor,
    k_latent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = True,
    scale: float | None = None,
    latent_scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: MacchiatoState | None = None,
    return_state: bool = False,
    sinks: WindowSinks | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, MacchiatoState]:
    """A local window and global latents in one probability (Latte Macchiato, arXiv 2402.17512).

        y_t = p(0|t) * sliding_window_attention(q, k, v)_t + sum_l p(l|t) E[v | l, s <= t]

    with p(l|t) the softmax of q_latent over the window (column 0) and the L latents. The latents
    average over all tokens, those in the window included. With `window=0` there is no column 0 and
    this is `latent_attention`; with L = 0 it is the window alone.

    Args:
        q_latent: (B,H,T,1+L) logits of p(l|t). -inf is a probability of exactly zero.
        k_latent: (B,Hl,T,L) logits of p(s|l), H a multiple of Hl. L = 0 is allowed.
        q: (B,H,T,Dk), k: (B,Hk,T,Dk), v: (B,Hk,T,D), H a multiple of Hk.
        window: >= 0, as in `sliding_window_attention`.
        causal, scale, key_mask, cu_seqlens, sinks, backend: as in `sliding_window_attention`.
        latent_scale: multiplies q_latent and k_latent.
        state: the tokens before these, N sequences (causal only); left as it is. Its latents have
            the least common multiple of Hl and Hk heads.
        return_state: also return the state after the last token.

    Returns:
        y (B,H,T,D) in v's dtype, and the `MacchiatoState` if asked for. Gradients reach all
        tensors of logits, queries, keys, values, the state and the sinks.

    Raises:
        ValueError: shapes, values or combinations; TypeError: dtypes; RuntimeError: devices.
    """
    op = "macchiato_attention"
    _check_tensors(op, q=q, k=k, v=v, key_mask=key_mask, cu_seqlens=cu_seqlens)
    scale = _check_window(op, q, window, scale, causal, minimum=0)
    _check_backend(op, q, backend)
    latents = k_latent.shape[3]
    cache = None if state is None else state.window
    if state is not None and (state.window is None) != (window == 0):
        raise ValueError(f"[{op}] state.window does not fit window={window}")
    before = None
    if window:
        before = _before(op, q, k, v, window, causal, key_mask, cu_seqlens, cache, return_state)
    past = 0 if before is None else before.window
    keys, values, mask = (
        (k, v, key_mask) if before is None else before.before(k, v, key_mask, cu_seqlens)
    )
    latent = None if state is None or state.latent is None else state.latent.tensors()
    y, final = reference.macchiato_attention(
        q_latent, k_latent, q, k, v, window=window, causal=causal, scale=scale,
        latent_scale=latent_scale, key_mask=key_mask, cu_seqlens=cu_seqlens, state=latent,
        past=past, past_k=keys, past_v=values, past_mask=mask, sinks=sinks,
        start=None if before is None else before.position,
    )  # fmt: skip
    if not return_state:
        return y
    after = None
    if before is not None:
        assert mask is not None
        after = before.after(keys, values, mask, cu_seqlens)
    return y, MacchiatoState(LatentState(*final) if latents else None, after)


def macchiato_attention_step(
    q_latent: Tensor,
    k_latent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MacchiatoState,
    *,
    scale: float | None = None,
    latent_scale: float = 1.0,
    sinks: WindowSinks | None = None,
) -> Tensor:
    """One token per sequence: constant time and memory, `state` is updated in place.

    Equals `macchiato_attention` over one more token. Not differentiable.

    Args:
        q_latent: (N,H,1+L), k_latent: (N,Hl,L), q: (N,H,Dk), k: (N,Hk,Dk), v: (N,Hk,D).
        state: N sequences; its window is the window.
        scale, latent_scale: as in `macchiato_attention`.
        sinks: as in `macchiato_attention`, with q (N,H,Dk).

    Returns:
        y (N,H,D) in v's dtype.
    """
    if sinks is not None:
        sinks = sinks._replace(q=sinks.q.unsqueeze(2))
    rows = (x.unsqueeze(2) for x in (q_latent, k_latent, q, k, v))
    window = 0 if state.window is None else state.window.window
    y, after = macchiato_attention(
        *rows, window=window, scale=scale, latent_scale=latent_scale, state=state,
        return_state=True, sinks=sinks,
    )  # fmt: skip
    for part, new in zip(state, after, strict=True):
        if part is not None:
            assert new is not None
            for tensor, updated in zip(part, new, strict=True):
                tensor.copy_(updated)
    return y.squeeze(2)


def _check_window(
    op: str, q: Tensor, window: int, scale: float | None, causal: bool, *, minimum: int
) -> float:
    """The scale, after the checks of scalars."""
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"[{op}] window is a {type(window).__name__}, expected an int")
    if window < minimum:
        raise ValueError(f"[{op}] window is {window}, expected at least {minimum}")
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1]) if q.dim() and q.shape[-1] else 1.0
    _check_scalars(op, scale, causal)
    return scale


def _check_cache(op: str, q: Tensor, cache: WindowCache) -> None:
    if not isinstance(cache, WindowCache):
        raise TypeError(f"[{op}] cache is a {type(cache).__name__}, expected a WindowCache")
    if cache.device != q.device:
        raise RuntimeError(f"[{op}] cache is on {cache.device}, expected {q.device} as q")


def _before(
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
) -> WindowCache | None:
    """The cache to put in front of the tokens: an empty one if only the returned one matters."""
    if cache is None and not return_cache:
        return None
    if not causal:
        raise ValueError(f"[{op}] got a cache with causal=False, expected causal=True")
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cache is None:
        return WindowCache(
            k.new_zeros(sequences, k.shape[1], window, k.shape[3]),
            v.new_zeros(sequences, k.shape[1], window, v.shape[3]),
            k.new_zeros(sequences, window, dtype=torch.bool),
            k.new_zeros(sequences, dtype=torch.int64),
        )
    _check_cache(op, q, cache)
    for name, x, other in (("key", cache.key, k), ("value", cache.value, v)):
        expected = (sequences, k.shape[1], window, other.shape[3])
        if tuple(x.shape) != expected:
            raise ValueError(
                f"[{op}] cache.{name} has shape {tuple(x.shape)}, expected {expected}: "
                "(N, Hk, window, channels)"
            )
    return cache
