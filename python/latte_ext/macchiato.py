# SPDX-License-Identifier: Apache-2.0
"""A local window and latents in one probability (Latte Macchiato, arXiv 2402.17512).

Notation as in `functional`, and Dk key channels per head, Hl latent heads, n sinks.
"""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from . import _macchiato_ops, reference
from ._autograd import is_differentiated
from ._checks import (
    Backend,
    check_backend,
    check_beside,
    check_device,
    check_rank,
    check_scale,
    check_shape,
    check_tensors,
    check_type,
)
from ._register import compute_dtype
from ._window_inputs import (
    check_cache,
    check_softcap,
    check_window,
    check_window_by_core,
    default_scale,
    seen_by_window,
    sink_tensors,
)
from .functional import latent_attention, latent_attention_step
from .state import LatentState
from .window_cache import MacchiatoState, WindowCache, WindowSinks


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
    v_latent: Tensor | None = ...,
    softcap: float | None = ...,
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
    v_latent: Tensor | None = ...,
    softcap: float | None = ...,
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
    v_latent: Tensor | None = None,
    softcap: float | None = None,
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
        q: (B,H,T,Dk). float32, bfloat16, float16, or float64 (then all others too).
        k: (B,Hk,T,Dk), H a multiple of Hk.
        v: (B,Hk,T,D). Any strides are accepted.
        window: >= 0; token t sees the tokens s with t - window < s <= t.
        causal: false for |t - s| < window, and latents over all tokens.
        scale: multiplies q . k; None is 1/sqrt(Dk).
        key_mask: (B,T) bool, true for a real token; the others are absent from every average.
        cu_seqlens: (N+1,) int32 or int64 borders of N sequences packed along T, with B == 1.
        sinks: keys and values that tokens see beyond their window.
        softcap: as in `sliding_window_attention`.
        backend: None chooses by device; "cpu", "cuda", or "reference" (plain torch).
        latent_scale: multiplies q_latent and k_latent.
        state: the tokens before these, N sequences (causal only); left as it is. Its latents have
            the least common multiple of Hl and Hk heads.
        return_state: also return the state after the last token.
        v_latent: (B,Hk,T,D) values that the latents average in the place of v; None is v.

    Returns:
        y (B,H,T,D) in v's dtype, and the `MacchiatoState` if asked for. Gradients reach all
        tensors of logits, queries, keys, values, the state and the sinks.

    Raises:
        ValueError: shapes, values or combinations.
        TypeError: dtypes.
        RuntimeError: devices.
    """
    # The core takes values per latent head, which is not promised here.
    plain = sinks is None and softcap is None and v_latent is None
    usual = plain and state is None and not return_state and backend is None
    if usual and window != 0 and isinstance(q, Tensor):
        results = _macchiato_ops.macchiato_attention_direct(
            q_latent, k_latent, None, q, k, v, key_mask, key_mask, cu_seqlens, *(None,) * 8,
            window, 0, causal, default_scale(q) if scale is None else scale, 0.0, latent_scale,
            False, extras=False,
        )  # fmt: skip
        if results is not None:
            return results[0]  # type: ignore[no-any-return]
    op = "macchiato_attention"
    check_tensors(op, {"q": q, "k": k, "v": v}, key_mask=key_mask, cu_seqlens=cu_seqlens)
    check_latents(op, q, k, v, q_latent, k_latent, v_latent)
    scale = check_window(op, q, window, scale, causal, minimum=0)
    cap = check_softcap(op, softcap)
    check_scale(op, latent_scale)
    check_backend(op, "q", q, backend)
    cache = latent = None
    if state is not None:
        cache, latent = check_state(op, q, window, k_latent.shape[3], state)
    q_sink, k_sink, v_sink, position = sink_tensors(op, q, sinks)
    if window == 0:
        if sinks is not None:
            raise ValueError(f"[{op}] got sinks with window=0, expected a window")
        k_latent, v_latent = match_heads(k_latent, v, v_latent)
        result = latent_attention(
            q_latent[..., 1:], k_latent, v if v_latent is None else v_latent, causal=causal,
            scale=latent_scale, key_mask=key_mask, cu_seqlens=cu_seqlens, state=latent,
            return_state=True, backend=backend,
        )  # fmt: skip
        y = result[0].to(v.dtype)
        return (y, MacchiatoState(result[1], None)) if return_state else y

    seen = seen_by_window(op, q, k, v, window, causal, key_mask, cu_seqlens, cache, return_state)
    given = q_sink, k_sink, v_sink, position, seen.start_beside(position)
    scalars = window, seen.past, causal, scale, cap
    triple = (None, None, None) if latent is None else latent.tensors()
    if backend == "reference":
        check_window_by_core(q, seen.key, seen.value, seen.mask, cu_seqlens, *given, *scalars)
        y, final = reference.macchiato_attention(
            q_latent, k_latent, q, k, v, window=window, causal=causal, scale=scale,
            latent_scale=latent_scale, key_mask=key_mask, cu_seqlens=cu_seqlens,
            state=None if latent is None else latent.tensors(), past=seen.past, past_k=seen.key,
            past_v=seen.value, past_mask=seen.mask, sinks=sinks, start=seen.start,
            v_latent=v_latent, softcap=softcap,
        )  # fmt: skip
    else:
        # Logits unrounded, so that their gradient is rounded once.
        q_latent = q_latent.to(compute_dtype(q, k, v))
        k_latent, v_latent = match_heads(k_latent, v, v_latent)
        if v_latent is None and seen.cache is not None:
            v_latent = v
        save = is_differentiated(
            q_latent, k_latent, v_latent, q, seen.key, seen.value, *triple, q_sink, k_sink, v_sink
        )
        arguments = (
            q_latent, k_latent, v_latent, q, seen.key, seen.value, key_mask, seen.mask, cu_seqlens,
            *triple, *given, *scalars, float(latent_scale), save,
        )  # fmt: skip
        results = _macchiato_ops.macchiato_attention_direct(*arguments, extras=return_state)
        if results is None:
            results = _macchiato_ops.macchiato_attention(*arguments)
        y, _, _, _, *final = results
    if not return_state:
        return y
    latent = LatentState(*final) if k_latent.shape[3] else None
    return y, MacchiatoState(latent, seen.after(cu_seqlens))


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
    v_latent: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One token per sequence: constant time and memory, `state` is updated in place.

    Equals `macchiato_attention` over one more token. Not differentiable.

    Args:
        q_latent: (N,H,1+L), dtypes as in `macchiato_attention`.
        k_latent: (N,Hl,L).
        q: (N,H,Dk).
        k: (N,Hk,Dk).
        v: (N,Hk,D).
        state: N sequences; its window is the window.
        scale: multiplies q . k; None is 1/sqrt(Dk).
        latent_scale: multiplies q_latent and k_latent.
        softcap: as in `sliding_window_attention`.
        sinks: as in `macchiato_attention`, with q (N,H,Dk).
        v_latent: (N,Hk,D), as in `macchiato_attention`.

    Returns:
        y (N,H,D) in v's dtype.

    Raises:
        ValueError: shapes or values.
        TypeError: types and dtypes.
        RuntimeError: devices, or an input that requires grad while grad mode is on.
    """
    stepped: Tensor | None
    plain = sinks is None and softcap is None and v_latent is None
    usual = plain and isinstance(q, Tensor)
    if usual and isinstance(state, MacchiatoState) and state.latent and state.window:
        stepped = _macchiato_ops.macchiato_attention_step_direct(
            q_latent, k_latent, None, q, k, v, *state.latent.tensors(), *state.window.tensors(),
            *(None,) * 4, default_scale(q) if scale is None else scale, 0.0, latent_scale,
        )  # fmt: skip
        if stepped is not None:
            return stepped
    op = "macchiato_attention_step"
    check_tensors(op, {"q": q, "k": k, "v": v})
    check_latents(op, q, k, v, q_latent, k_latent, v_latent)
    scale = check_window(op, q, 1, scale, True, minimum=1)
    cap = check_softcap(op, softcap)
    check_scale(op, latent_scale)
    check_type(op, "state", state, MacchiatoState)
    window = 0 if state.window is None else state.window.window
    cache, latent = check_state(op, q, window, k_latent.shape[2], state)
    k_latent, v_latent = match_heads(k_latent, v, v_latent)
    y: Tensor
    if cache is None:
        assert latent is not None
        v_latent = v if v_latent is None else v_latent
        y = latent_attention_step(q_latent[..., 1:], k_latent, v_latent, latent, scale=latent_scale)
        return y.to(v.dtype)
    sinks_given = sink_tensors(op, q, sinks)
    triple = (None, None, None) if latent is None else latent.tensors()
    arguments = (
        q_latent.to(compute_dtype(q, k, v)), k_latent, v_latent, q, k, v, *triple,
        *cache.tensors(), *sinks_given, scale, cap, float(latent_scale),
    )  # fmt: skip
    stepped = _macchiato_ops.macchiato_attention_step_direct(*arguments)
    if stepped is not None:
        return stepped
    y = _macchiato_ops.macchiato_attention_step(*arguments)
    return y


def _least_common_multiple(a: int, b: int) -> int:
    """`math.lcm`, which torch.compile does not trace where sizes are symbols."""
    divisor, rest = a, b
    while rest:
        divisor, rest = rest, divisor % rest
    return a // divisor * b


def match_heads(
    k_latent: Tensor, v: Tensor, v_latent: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """k_latent and its values with as many heads; None for a v that has them already.

    What is repeated is in the compute type, so that its gradient is summed before it is rounded.
    """
    if k_latent.shape[1] == v.shape[1]:
        return k_latent, v_latent
    heads = _least_common_multiple(k_latent.shape[1], v.shape[1])
    dtype = compute_dtype(v)
    if k_latent.shape[1] != heads:
        k_latent = k_latent.to(dtype)
        if k_latent.shape[1] == 1:
            k_latent = k_latent.expand(-1, heads, *k_latent.shape[2:])
        else:
            k_latent = k_latent.repeat_interleave(heads // k_latent.shape[1], dim=1)
    if v.shape[1] == heads:
        return k_latent, v_latent
    values = v if v_latent is None else v_latent
    return k_latent, values.to(dtype).repeat_interleave(heads // v.shape[1], dim=1)


def check_latents(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_latent: Tensor,
    k_latent: Tensor,
    v_latent: Tensor | None,
) -> None:
    for name, tensor in (("q_latent", q_latent), ("k_latent", k_latent)):
        check_beside(op, q, name, tensor)
        check_rank(op, q.dim(), **{name: tensor})
    if v_latent is not None:
        check_beside(op, q, "v_latent", v_latent)
        check_shape(op, "v_latent", v_latent, *v.shape)
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


def check_state(
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
        state.latent._check(op, "state.latent.")
        check_device(op, "state", state.latent.device, q)
    if state.window is not None:
        check_cache(op, q, state.window)
    return state.window, state.latent
