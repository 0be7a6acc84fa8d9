# SPDX-License-Identifier: Apache-2.0
"""Attention to a local window. Notation as in `functional`, and Dk key channels per head."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from . import _window_ops, reference
from ._autograd import is_differentiated
from ._checks import Backend, check_backend, check_tensors
from ._window_inputs import (
    Seen,
    check_cache,
    check_softcap,
    check_window,
    check_window_by_core,
    default_scale,
    seen_by_window,
    sink_tensors,
)
from .window_cache import WindowCache, WindowSinks


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
    softcap: float | None = ...,
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
    softcap: float | None = ...,
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
    softcap: float | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, WindowCache]:
    """Softmax attention of every token to its last `window` tokens, itself included.

    O(T window) time, O(T) memory. Masked tokens keep their place in the window; a row that sees no
    key gives y = 0. (Latent 0 of Latte Macchiato, arXiv 2402.17512.)

    Args:
        q: (B,H,T,Dk). float32, bfloat16, float16, or float64 (then k and v too).
        k: (B,Hk,T,Dk), H a multiple of Hk.
        v: (B,Hk,T,D). Any strides are accepted.
        window: >= 1; token t sees the tokens s with t - window < s <= t.
        causal: false for |t - s| < window.
        scale: multiplies q . k; None is 1/sqrt(Dk).
        key_mask: (B,T) bool, true for a real token; nothing attends to the others.
        cu_seqlens: (N+1,) int32 or int64 borders of N sequences packed along T, with B == 1.
        cache: the tokens before these, N sequences with this window (causal only); left as it is.
        return_cache: also return the cache after the last token (causal only).
        sinks: keys and values that tokens see beyond their window.
        softcap: > 0; logits, those of sinks too, become softcap tanh(logit / softcap) (Gemma 2,
            arXiv 2408.00118, section 2).
        backend: None chooses by device; "cpu", "cuda", or "reference" (plain torch).

    Returns:
        y (B,H,T,D) in v's dtype, and the `WindowCache` if asked for. Gradients reach q, k, v, the
        cache's keys and values and the sinks.

    Raises:
        ValueError: shapes, values or combinations.
        TypeError: dtypes.
        RuntimeError: devices.
    """
    simple = cache is None and not return_cache and sinks is None and softcap is None
    if simple and backend is None and isinstance(q, Tensor):
        results = _window_ops.sliding_window_attention_direct(
            q, k, v, key_mask, cu_seqlens, *(None,) * 5, window, 0, causal,
            default_scale(q) if scale is None else scale, 0.0, False, extras=False,
        )  # fmt: skip
        if results is not None:
            return results[0]  # type: ignore[no-any-return]
    op = "sliding_window_attention"
    check_tensors(op, {"q": q, "k": k, "v": v}, key_mask=key_mask, cu_seqlens=cu_seqlens)
    scale = check_window(op, q, window, scale, causal, minimum=1)
    check_softcap(op, softcap)
    check_backend(op, "q", q, backend)
    seen = seen_by_window(op, q, k, v, window, causal, key_mask, cu_seqlens, cache, return_cache)
    y = attend_seen(
        q, seen, window=window, causal=causal, scale=scale, cu_seqlens=cu_seqlens, sinks=sinks,
        softcap=softcap, backend=backend,
    )  # fmt: skip
    return (y, seen.after(cu_seqlens)) if return_cache else y


def attend_seen(
    q: Tensor,
    seen: Seen,
    *,
    window: int,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    sinks: WindowSinks | None,
    softcap: float | None,
    backend: Backend | None,
) -> Tensor:
    """`sliding_window_attention` to the keys, past ones among them, that a window sees."""
    op = "sliding_window_attention"
    q_sink, k_sink, v_sink, position = sink_tensors(op, q, sinks)
    arguments = (
        q, seen.key, seen.value, seen.mask, cu_seqlens, q_sink, k_sink, v_sink, position,
        seen.start_beside(position), window, seen.past, causal, scale, check_softcap(op, softcap),
    )  # fmt: skip
    y: Tensor
    if backend == "reference":
        check_window_by_core(*arguments)
        y = reference.sliding_window_attention(
            q, seen.key, seen.value, window=window, causal=causal, scale=scale,
            key_mask=seen.mask, cu_seqlens=cu_seqlens, past=seen.past, sinks=sinks,
            start=seen.start, softcap=softcap,
        )  # fmt: skip
    else:
        save = is_differentiated(q, seen.key, seen.value, q_sink, k_sink, v_sink)
        results = _window_ops.sliding_window_attention_direct(*arguments, save, extras=False)
        if results is None:
            results = _window_ops.sliding_window_attention(*arguments, save)
        y = results[0]
    return y


def sliding_window_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: WindowCache,
    *,
    scale: float | None = None,
    sinks: WindowSinks | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One token per sequence: constant time and memory, `cache` is updated in place.

    Equals `sliding_window_attention` over one more token. Not differentiable.

    Args:
        q: (N,H,Dk), dtypes as in `sliding_window_attention`.
        k: (N,Hk,Dk).
        v: (N,Hk,D).
        cache: N sequences, Hk heads; its window is the window.
        scale: multiplies q . k; None is 1/sqrt(Dk).
        sinks: as in `sliding_window_attention`, with q (N,H,Dk).
        softcap: as in `sliding_window_attention`.

    Returns:
        y (N,H,D) in v's dtype.

    Raises:
        ValueError: shapes or values.
        TypeError: types and dtypes.
        RuntimeError: devices, or an input that requires grad while grad mode is on.
    """
    y: Tensor | None
    if sinks is None and softcap is None and isinstance(cache, WindowCache):
        scaled = default_scale(q) if scale is None and isinstance(q, Tensor) else scale
        y = _window_ops.sliding_window_attention_step_direct(
            q, k, v, *cache.tensors(), *(None,) * 4, scaled, 0.0
        )
        if y is not None:
            return y
    op = "sliding_window_attention_step"
    check_tensors(op, {"q": q, "k": k, "v": v})
    scale = check_window(op, q, 1, scale, True, minimum=1)
    cap = check_softcap(op, softcap)
    check_cache(op, q, cache)
    arguments = q, k, v, *cache.tensors(), *sink_tensors(op, q, sinks), scale, cap
    y = _window_ops.sliding_window_attention_step_direct(*arguments)
    return _window_ops.sliding_window_attention_step(*arguments) if y is None else y
