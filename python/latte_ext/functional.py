# SPDX-License-Identifier: Apache-2.0
"""The public functions. Notation: B batch, T tokens, H query heads, Hk key/value heads, L latents
per head, D value channels per head, N sequences (B, or len(cu_seqlens) - 1 when packed)."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import _core, _ops, reference
from .state import LatentState

Backend = Literal["cpu", "cuda", "reference"]


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
        ValueError: shapes, values or combinations; TypeError: dtypes; RuntimeError: devices.
    """
    op = "latent_attention"
    _check_tensors(op, q=q, k=k, v=v, key_mask=key_mask, cu_seqlens=cu_seqlens)
    _check_scalars(op, scale, causal)
    triple = _state_tensors(op, q, state)
    _check_backend(op, q, backend)
    if backend == "reference":
        # Held to the contract of the core, by the core's own checks, which a tracer cannot enter.
        if not torch.compiler.is_compiling():
            borders = None if cu_seqlens is None else cu_seqlens.cpu()
            _core.latent_attention_check(
                q, k, v, key_mask, borders, triple[0], triple[1], triple[2], causal, scale
            )
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
        q: (N,H,L), k: (N,Hk,L), v: (N,Hk,D), dtypes as in `latent_attention`.
        state: N sequences, Hk heads; float32 (float64 for float64 inputs).
        scale: multiplies the logits q and k.

    Returns:
        y (N,H,D) in v's dtype.

    Raises:
        ValueError: shapes or values; TypeError: dtypes; RuntimeError: devices, or an input that
        requires grad while grad mode is on.
    """
    if isinstance(state, LatentState):
        y = _ops.latent_attention_step_direct(q, k, v, state.max, state.norm, state.mean, scale)
        if y is not None:
            return y
    op = "latent_attention_step"
    _check_tensors(op, q=q, k=k, v=v)
    _check_scalars(op, scale)
    if not isinstance(state, LatentState):
        raise TypeError(f"[{op}] state is a {type(state).__name__}, expected a LatentState")
    triple = _state_tensors(op, q, state)
    return _ops.latent_attention_step(q, k, v, *triple, scale)  # type: ignore[no-any-return]


_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = {
    "q": _FLOATING,
    "k": _FLOATING,
    "v": _FLOATING,
    "key_mask": (torch.bool,),
    "cu_seqlens": (torch.int32, torch.int64),
}


def _check_tensors(op: str, q: Tensor, **others: Tensor | None) -> None:
    for name, tensor in (("q", q), *others.items()):
        if tensor is None and name in ("key_mask", "cu_seqlens"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"[{op}] {name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.device != q.device:
            raise RuntimeError(f"[{op}] {name} is on {tensor.device}, expected {q.device} as q")
        if tensor.dtype not in _DTYPES[name]:
            expected = " or ".join(str(dtype) for dtype in _DTYPES[name])
            raise TypeError(f"[{op}] {name} has dtype {tensor.dtype}, expected {expected}")
        if tensor.layout != torch.strided:
            raise TypeError(f"[{op}] {name} has layout {tensor.layout}, expected torch.strided")


def _check_scalars(op: str, scale: float, causal: bool = True) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"[{op}] causal is a {type(causal).__name__}, expected a bool")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"[{op}] scale is a {type(scale).__name__}, expected a float")


def _state_tensors(
    op: str, q: Tensor, state: LatentState | None
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    if state is None:
        return (None, None, None)
    if not isinstance(state, LatentState):
        raise TypeError(f"[{op}] state is a {type(state).__name__}, expected a LatentState")
    if state.mean.device != q.device:
        raise RuntimeError(f"[{op}] state is on {state.mean.device}, expected {q.device} as q")
    return (state.max, state.norm, state.mean)


def _check_backend(op: str, q: Tensor, backend: str | None) -> None:
    kind = q.device.type
    if backend not in (None, "cpu", "cuda", "reference"):
        raise ValueError(
            f"[{op}] backend is {backend!r}, expected None, 'cpu', 'cuda' or 'reference'"
        )
    if backend in ("cpu", "cuda") and backend != kind:
        raise ValueError(f"[{op}] backend is {backend!r}, expected one for tensors on {q.device}")
    if backend is None and kind not in ("cpu", "cuda", "meta"):
        raise RuntimeError(
            f"[{op}] q is on {q.device}, expected a CPU or CUDA tensor, or backend='reference'"
        )
