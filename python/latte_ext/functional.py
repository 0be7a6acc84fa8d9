# SPDX-License-Identifier: Apache-2.0
"""The public functions. Notation: B batch, T tokens, H query heads, Hk key/value heads, L latents
per head, D value channels per head, N sequences (B, or len(cu_seqlens) - 1 when packed)."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from . import _core, _ops, reference
from ._checks import (
    Backend,
    check_backend,
    check_by_core,
    check_device,
    check_flags,
    check_scale,
    check_tensors,
    check_type,
)
from .state import LatentState, unchecked_state


@overload
def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    state: LatentState | None = ...,
    return_state: Literal[False] = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    state: LatentState | None = ...,
    return_state: Literal[True],
    backend: Backend | None = ...,
) -> tuple[Tensor, LatentState]: ...
def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: LatentState | None = None,
    return_state: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, LatentState]:
    """Latent attention, y_t = sum_l p(l|t) E[v | l, s <= t] (Latte, arXiv 2402.17512).

    p(l|t) is the softmax of q over the latents; E[v | l, s <= t] averages the values with a softmax
    of k over the tokens up to t (all tokens if `causal` is false). Linear in T in time and memory.
    A latent that no token has used yet contributes zero.

    Args:
        q: (B,H,T,L) logits of p(l|t). float32, bfloat16, float16, or float64 (then k and v too).
        k: (B,Hk,T,L) logits of p(s|l), H a multiple of Hk.
        v: (B,Hk,T,D) values. Any strides are accepted for q, k and v.
        causal: whether token t sees the tokens s <= t only.
        scale: multiplies the logits q and k.
        key_mask: (B,T) bool, true for a real token; the others are absent from every average.
        cu_seqlens: (N+1,) int32 or int64 borders of N sequences packed along T, with B == 1.
        state: the tokens before these, N sequences (causal only).
        return_state: also return the state after the last token.
        backend: None chooses by device; "cpu", "cuda", or "reference" (plain torch).

    Returns:
        y (B,H,T,D) in v's dtype, and the `LatentState` if asked for. Gradients reach q, k, v and
        the state's norm and mean; the state's max is a constant reference.

    Raises:
        ValueError: shapes, values or combinations.
        TypeError: dtypes.
        RuntimeError: devices.
    """
    triple: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]
    if backend is None and (state is None or isinstance(state, LatentState)):
        triple = (None, None, None) if state is None else state.tensors()
        results = _ops.latent_attention_direct(
            q, k, v, key_mask, cu_seqlens, *triple, causal, scale, extras=return_state
        )
        if results is not None:
            return (results[0], unchecked_state(results[1:])) if return_state else results[0]
    triple = check_latent_attention(
        q, k, v, causal=causal, scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens, state=state,
        backend=backend, shapes=backend == "reference",
    )  # fmt: skip
    if backend == "reference":
        y, final = reference.latent_attention(
            q, k, v, causal=causal, scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens,
            state=None if state is None else state.tensors(),
        )  # fmt: skip
        return (y, LatentState(*final)) if return_state else y
    y, max_, norm, mean = _ops.latent_attention(
        q, k, v, key_mask, cu_seqlens, *triple, causal, scale
    )
    return (y, LatentState(max_, norm, mean)) if return_state else y


def latent_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: LatentState, *, scale: float = 1.0
) -> Tensor:
    """One token per sequence: constant time and memory, `state` is updated in place.

    Equals `latent_attention` over one more token (theorem T1). Not differentiable.

    Args:
        q: (N,H,L), dtypes as in `latent_attention`.
        k: (N,Hk,L).
        v: (N,Hk,D).
        state: N sequences, Hk heads; float32 (float64 for float64 inputs).
        scale: multiplies the logits q and k.

    Returns:
        y (N,H,D) in v's dtype.

    Raises:
        ValueError: shapes or values.
        TypeError: dtypes.
        RuntimeError: devices, or an input that requires grad while grad mode is on.
    """
    if isinstance(state, LatentState):
        y: Tensor | None = _ops.latent_attention_step_direct(q, k, v, *state.tensors(), scale)
        if y is not None:
            return y
    op = "latent_attention_step"
    check_tensors(op, {"q": q, "k": k, "v": v})
    check_scale(op, scale)
    check_type(op, "state", state, LatentState)
    triple = check_state(op, q, state)
    return _ops.latent_attention_step(q, k, v, *triple, scale)  # type: ignore[no-any-return]


def check_latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: LatentState | None,
    backend: Backend | None,
    shapes: bool,
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """What `latent_attention` checks of its arguments, if `shapes` also what the operator does.

    Returns:
        The tensors of the state.

    Raises:
        ValueError, TypeError, RuntimeError: as `latent_attention`.
    """
    op = "latent_attention"
    check_tensors(op, {"q": q, "k": k, "v": v}, key_mask=key_mask, cu_seqlens=cu_seqlens)
    check_flags(op, causal=causal)
    check_scale(op, scale)
    triple = check_state(op, q, state)
    check_backend(op, "q", q, backend)
    if shapes:
        check_by_core(
            lambda borders: _core.latent_attention_check(
                q, k, v, key_mask, borders, triple[0], triple[1], triple[2], causal, scale
            ),
            cu_seqlens,
        )
    return triple


def check_state(
    op: str, q: Tensor, state: LatentState | None
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """The tensors of a state on q's device, or of none."""
    if state is None:
        return (None, None, None)
    check_type(op, "state", state, LatentState)
    state._check(op, "state.")
    check_device(op, "state", state.device, q)
    return state.tensors()
