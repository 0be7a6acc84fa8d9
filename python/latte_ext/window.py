# SPDX-License-Identifier: Apache-2.0
"""Attention to a local window, alone and in one probability with latents (Latte Macchiato).

Notation as in `functional`, and Dk key channels per head, Hl latent heads, n sinks.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import _core, _window_ops, reference
from ._checks import (
    Backend,
    check_backend,
    check_beside,
    check_by_core,
    check_device,
    check_flags,
    check_rank,
    check_scale,
    check_shape,
    check_tensors,
    check_type,
)
from ._register import compute_dtype, count_sequences, is_differentiated
from .functional import latent_attention, latent_attention_step
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
    check_tensors(op, {"q": q, "k": k, "v": v}, key_mask=key_mask, cu_seqlens=cu_seqlens)
    scale = _check_window(op, q, window, scale, causal, minimum=1)
    check_backend(op, "q", q, backend)
    before = _before(op, q, k, v, window, causal, cu_seqlens, cache, return_cache)
    keys, values, mask = (
        (k, v, key_mask) if before is None else before.before(k, v, key_mask, cu_seqlens)
    )
    past = 0 if before is None else before.window
    start = None if before is None else before.position
    if sinks is not None:
        _check_sinks(op, q, k, v, cu_seqlens, sinks)
    if backend == "reference":
        _check_by_core(q, keys, values, mask, cu_seqlens, window, past, causal, scale)
        y = reference.sliding_window_attention(
            q, keys, values, window=window, causal=causal, scale=scale, key_mask=mask,
            cu_seqlens=cu_seqlens, past=past, sinks=sinks, start=start,
        )  # fmt: skip
    elif sinks is None:
        save = is_differentiated(q, keys, values)
        y = _window_ops.sliding_window_attention(
            q, keys, values, mask, cu_seqlens, window, past, causal, scale, save
        )[0]
    else:
        y = _with_sinks(
            q, keys, values, mask, cu_seqlens, window, past, causal, scale, sinks, start
        ).to(v.dtype)
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
    check_tensors(op, {"q": q, "k": k, "v": v})
    scale = _check_window(op, q, 1, scale, True, minimum=1)
    _check_cache(op, q, cache)
    return _window_ops.sliding_window_attention_step(  # type: ignore[no-any-return]
        q, k, v, *cache.tensors(), *_sink_tensors(op, q, sinks), scale
    )


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
    check_tensors(op, {"q": q, "k": k, "v": v}, key_mask=key_mask, cu_seqlens=cu_seqlens)
    _check_latents(op, q, k, q_latent, k_latent)
    scale = _check_window(op, q, window, scale, causal, minimum=0)
    check_scale(op, latent_scale)
    check_backend(op, "q", q, backend)
    cache = latent = None
    if state is not None:
        cache, latent = _check_state(op, q, window, k_latent.shape[3], state)
    if sinks is not None:
        _check_sinks(op, q, k, v, cu_seqlens, sinks)
    if window == 0:
        if sinks is not None:
            raise ValueError(f"[{op}] got sinks with window=0, expected a window")
        k_latent, v_latent = _match_heads(k_latent, v, 1)
        result = latent_attention(
            q_latent[..., 1:], k_latent, v if v_latent is None else v_latent, causal=causal,
            scale=latent_scale, key_mask=key_mask, cu_seqlens=cu_seqlens, state=latent,
            return_state=True, backend=backend,
        )  # fmt: skip
        y = result[0].to(v.dtype)
        return (y, MacchiatoState(result[1], None)) if return_state else y

    before = _before(op, q, k, v, window, causal, cu_seqlens, cache, return_state)
    keys, values, mask = (
        (k, v, key_mask) if before is None else before.before(k, v, key_mask, cu_seqlens)
    )
    past = 0 if before is None else before.window
    start = None if before is None else before.position
    triple = (None, None, None) if latent is None else latent.tensors()
    if backend == "reference":
        _check_by_core(q, keys, values, mask, cu_seqlens, window, past, causal, scale)
        y, final = reference.macchiato_attention(
            q_latent, k_latent, q, k, v, window=window, causal=causal, scale=scale,
            latent_scale=latent_scale, key_mask=key_mask, cu_seqlens=cu_seqlens,
            state=None if latent is None else latent.tensors(), past=past, past_k=keys,
            past_v=values, past_mask=mask, sinks=sinks, start=start,
        )  # fmt: skip
    else:
        # Logits unrounded, so that their gradient is rounded once.
        q_latent = q_latent.to(compute_dtype(q, k, v))
        k_latent, v_latent = _match_heads(k_latent, v, 1)
        if v_latent is None and before is not None:
            v_latent = v
        if sinks is None:
            save = is_differentiated(q_latent, k_latent, q, keys, values, *triple)
            y, _, _, _, *final = _window_ops.macchiato_attention(
                q_latent, k_latent, v_latent, q, keys, values, key_mask, mask, cu_seqlens,
                *triple, window, past, causal, scale, float(latent_scale), save,
            )  # fmt: skip
        else:
            local = _with_sinks(
                q, keys, values, mask, cu_seqlens, window, past, causal, scale, sinks, start
            )
            p = reference._softmax(q_latent * latent_scale, dim=-1)
            y = p[..., :1] * local
            if k_latent.shape[3]:
                latents, state_after = latent_attention(
                    q_latent[..., 1:], k_latent,
                    (v if v_latent is None else v_latent).to(local.dtype), causal=causal,
                    scale=latent_scale, key_mask=key_mask, cu_seqlens=cu_seqlens, state=latent,
                    return_state=True,
                )  # fmt: skip
                y = y + p[..., 1:].sum(-1, keepdim=True) * latents
                final = state_after.tensors()
            y = y.to(v.dtype)
    if not return_state:
        return y
    assert before is not None
    assert mask is not None
    after = before.after(keys, values, mask, cu_seqlens)
    return y, MacchiatoState(LatentState(*final) if k_latent.shape[3] else None, after)


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
    op = "macchiato_attention_step"
    check_tensors(op, {"q": q, "k": k, "v": v})
    _check_latents(op, q, k, q_latent, k_latent)
    scale = _check_window(op, q, 1, scale, True, minimum=1)
    check_scale(op, latent_scale)
    check_type(op, "state", state, MacchiatoState)
    window = 0 if state.window is None else state.window.window
    cache, latent = _check_state(op, q, window, k_latent.shape[2], state)
    k_latent, v_latent = _match_heads(k_latent, v, 1)
    y: Tensor
    if cache is None:
        assert latent is not None
        v_latent = v if v_latent is None else v_latent
        y = latent_attention_step(q_latent[..., 1:], k_latent, v_latent, latent, scale=latent_scale)
        return y.to(v.dtype)
    sink_tensors = _sink_tensors(op, q, sinks)
    triple = (None, None, None) if latent is None else latent.tensors()
    y = _window_ops.macchiato_attention_step(
        q_latent.to(compute_dtype(q, k, v)), k_latent, v_latent, q, k, v, *triple,
        *cache.tensors(), *sink_tensors, scale, float(latent_scale),
    )  # fmt: skip
    return y


def _with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    sinks: WindowSinks,
    start: Tensor | None,
) -> Tensor:
    """Window and sinks under one softmax, in the compute type.

    The window enters as one more key, whose logit is the log of its sum of exponentials.
    """
    dtype = compute_dtype(q, k, v)
    save = is_differentiated(q, k, v, sinks.q, sinks.k, sinks.v)
    local: Tensor
    local, log_sum, _ = _window_ops.sliding_window_attention(
        q, k, v.to(dtype), key_mask, cu_seqlens, window, past, causal, scale, save
    )
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    at = torch.arange(tokens, device=q.device)[None]
    q_sink, k_sink, v_sink = (x.to(dtype) for x in sinks[:3])
    k_sink = k_sink.repeat_interleave(group, dim=1)
    v_sink = v_sink.repeat_interleave(group, dim=1)
    if cu_seqlens is not None:
        borders = cu_seqlens.to(torch.int64)
        sequence = torch.searchsorted(borders[1:], at[0], right=True)
        at = at - borders[sequence]
        # (N,H,n,.) of a token's own sequence.
        k_token = k_sink.transpose(0, 1)[:, sequence]
        logits = torch.einsum("htc,htnc->htn", q_sink[0], k_token)[None]
    else:
        logits = q_sink @ k_sink.transpose(2, 3)
    logits = logits * scale
    if sinks.position is not None:
        position = sinks.position if cu_seqlens is None else sinks.position[sequence][None]
        if start is not None:
            at = at + (start[:, None] if cu_seqlens is None else start[sequence])
        distance = at[:, :, None] - (position[:, None] if cu_seqlens is None else position)
        outside = distance >= window if causal else distance.abs() >= window
        logits = torch.where(outside[:, None], logits, -torch.inf)
    p = reference._softmax(torch.cat([log_sum[..., None], logits], dim=-1), dim=-1)
    if cu_seqlens is None:
        y: Tensor = p[..., 1:] @ v_sink
    else:
        y = torch.einsum("htn,htnd->htd", p[0, ..., 1:], v_sink.transpose(0, 1)[:, sequence])[None]
    return p[..., :1] * local + y


def _match_heads(k_latent: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """k_latent and v with as many heads; None for a v that has them already.

    What is repeated is in the compute type, so that its gradient is summed before it is rounded.
    """
    heads = math.lcm(k_latent.shape[dim], v.shape[dim])
    dtype = compute_dtype(v)
    if k_latent.shape[dim] != heads:
        k_latent = k_latent.to(dtype)
        if k_latent.shape[dim] == 1:
            k_latent = k_latent.expand(*k_latent.shape[:dim], heads, *k_latent.shape[dim + 1 :])
        else:
            k_latent = k_latent.repeat_interleave(heads // k_latent.shape[dim], dim=dim)
    if v.shape[dim] == heads:
        return k_latent, None
    return k_latent, v.to(dtype).repeat_interleave(heads // v.shape[dim], dim=dim)


def _check_by_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *scalars: Any,
) -> None:
    check_by_core(
        lambda borders: _core.sliding_window_check(q, k, v, key_mask, borders, *scalars),
        cu_seqlens,
    )


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
    check_flags(op, causal=causal)
    check_scale(op, scale)
    return scale


def _check_cache(op: str, q: Tensor, cache: WindowCache) -> None:
    check_type(op, "cache", cache, WindowCache)
    check_device(op, "cache", cache.device, q)


def _check_latents(op: str, q: Tensor, k: Tensor, q_latent: Tensor, k_latent: Tensor) -> None:
    for name, tensor in (("q_latent", q_latent), ("k_latent", k_latent)):
        check_beside(op, q, name, tensor)
        check_rank(op, q.dim(), **{name: tensor})
    # Without the heads: those have a rule of their own.
    tokens = tuple(q.shape[2:-1])
    expected: tuple[int | str, ...] = (q.shape[0], q.shape[1], *tokens, 1 + k_latent.shape[-1])
    if tuple(q_latent.shape) != expected:
        raise ValueError(
            f"[{op}] q_latent has shape {tuple(q_latent.shape)}, expected {expected}: "
            "one column more than k_latent"
        )
    heads = k_latent.shape[1]
    expected = (q.shape[0], "Hl", *tokens, k_latent.shape[-1])
    if (k_latent.shape[0], *k_latent.shape[2:-1]) != (q.shape[0], *tokens):
        raise ValueError(
            f"[{op}] k_latent has shape {tuple(k_latent.shape)}, expected {expected} as q"
        )
    for name, count in (("k_latent", heads), ("k", k.shape[1] if k.dim() > 1 else 1)):
        if count < 1 or q.shape[1] % count:
            raise ValueError(
                f"[{op}] q has {q.shape[1]} heads, expected a multiple of the {count} heads "
                f"of {name}"
            )


def _check_state(
    op: str, q: Tensor, window: int, latents: int, state: MacchiatoState
) -> tuple[WindowCache | None, LatentState | None]:
    check_type(op, "state", state, MacchiatoState)
    for name, part, kind, needed in (
        ("latent", state.latent, LatentState, latents > 0),
        ("window", state.window, WindowCache, window > 0),
    ):
        if not isinstance(part, kind if needed else type(None)):
            raise TypeError(
                f"[{op}] state.{name} is a {type(part).__name__}, expected "
                f"{'a ' + kind.__name__ if needed else 'None'} with {latents} latents and "
                f"window={window}"
            )
    if state.latent is not None:
        check_device(op, "state", state.latent.device, q)
    if state.window is not None:
        _check_cache(op, q, state.window)
    return state.window, state.latent


def _check_sinks(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sinks: WindowSinks
) -> None:
    _sink_tensors(op, q, sinks)
    for name, tensor in zip(("k", "v"), sinks[1:3], strict=True):
        check_rank(op, 4, **{f"sinks.{name}": tensor})
    sequences = count_sequences(q, cu_seqlens)
    n = sinks.k.shape[2]
    shapes: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("q", sinks.q, tuple(q.shape)),
        ("k", sinks.k, (sequences, k.shape[1], n, k.shape[3])),
        ("v", sinks.v, (sequences, v.shape[1], n, v.shape[3])),
        ("position", sinks.position, (sequences, n)),
    )
    for name, given, expected in shapes:
        if given is not None:
            check_shape(op, f"sinks.{name}", given, *expected)


def _sink_tensors(
    op: str, q: Tensor, sinks: WindowSinks | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    if sinks is None:
        return (None, None, None, None)
    if not isinstance(sinks, WindowSinks):
        raise TypeError(f"[{op}] sinks is a {type(sinks).__name__}, expected WindowSinks")
    for name, tensor in zip(("q", "k", "v"), sinks, strict=False):
        check_beside(op, q, f"sinks.{name}", tensor)  # type: ignore[arg-type]
    position = sinks.position
    if position is not None and position.dtype != torch.int64:
        raise TypeError(f"[{op}] sinks.position has dtype {position.dtype}, expected torch.int64")
    return sinks.q, sinks.k, sinks.v, position


def _before(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    causal: bool,
    cu_seqlens: Tensor | None,
    cache: WindowCache | None,
    return_cache: bool,
) -> WindowCache | None:
    """The cache to put in front of the tokens: an empty one if only the returned one matters."""
    if cache is None and not return_cache:
        return None
    if not causal:
        raise ValueError(f"[{op}] got a cache with causal=False, expected causal=True")
    sequences = count_sequences(q, cu_seqlens)
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
