# SPDX-License-Identifier: Apache-2.0
"""Short depthwise convolutions. Notation: B batch, T tokens, C channels, K width, N sequences (B,
or len(cu_seqlens) - 1 when packed)."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from . import _core, _mixer_ops
from . import _reference_mixers as reference
from ._checks import Backend, check_backend, check_by_core, check_flags, check_tensors


@overload
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    causal: bool = ...,
    state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_state: Literal[False] = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    *,
    causal: bool = ...,
    state: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    return_state: Literal[True],
    backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = True,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise convolution, y[t] = bias + sum over j < K of weight[:, j] x[t - left + j].

    left is K - 1 if causal, else (K - 1) // 2 (torch's padding="same"). Inputs outside of the
    sequence count as zero.

    Args:
        x: (B,T,C). float32, bfloat16, float16, or float64 (then weight and bias too).
        weight: (C,K), K from 1 to 8; weight[:, K-1] is that of the token itself if causal.
        bias: (C,).
        causal: whether token t sees the tokens t-K+1..t, or K tokens around it.
        state: (N,K-1,C) in x's dtype, the inputs before the first token, oldest first (causal
            only); None: zeros.
        cu_seqlens: (N+1,) int32 or int64 borders of N sequences packed along T, with B == 1.
        return_state: also return the last K-1 inputs of every sequence, (N,K-1,C) (causal only).
        backend: None chooses by device; "cpu", "cuda", or "reference" (plain torch).

    Returns:
        y (B,T,C) in x's dtype, and the state if asked for. Gradients reach x, weight, bias and
        state.

    Raises:
        ValueError: shapes, values or combinations.
        TypeError: dtypes.
        RuntimeError: devices.
    """
    if backend is None and (causal or not return_state):
        results = _mixer_ops.short_conv_direct(
            x, weight, bias, cu_seqlens, state, causal, extras=return_state
        )
        if results is not None:
            return results if return_state else results[0]  # type: ignore[no-any-return]
    check_short_conv(
        x, weight, bias, causal=causal, state=state, cu_seqlens=cu_seqlens,
        return_state=return_state, backend=backend, shapes=backend == "reference",
    )  # fmt: skip
    if backend == "reference":
        y, final = reference.short_conv(
            x, weight, bias, causal=causal, state=state, cu_seqlens=cu_seqlens
        )
    else:
        y, final = _mixer_ops.short_conv(x, weight, bias, cu_seqlens, state, causal)
    return (y, final) if return_state else y


def check_short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    causal: bool,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    return_state: bool,
    backend: Backend | None,
    shapes: bool,
) -> None:
    """What `short_conv` checks of its arguments, if `shapes` also what the operator does.

    Raises:
        ValueError, TypeError, RuntimeError: as `short_conv`.
    """
    op = "short_conv"
    check_tensors(op, {"x": x, "weight": weight}, bias=bias, state=state, cu_seqlens=cu_seqlens)
    check_flags(op, causal=causal)
    check_backend(op, "x", x, backend)
    if not causal and (state is not None or return_state):
        name = "return_state" if state is None else "state"
        raise ValueError(f"[{op}] got {name} with causal=False, expected causal=True")
    if shapes:
        check_by_core(
            lambda borders: _core.short_conv_check(x, weight, bias, borders, state, causal),
            cu_seqlens,
        )


def short_conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """One token per sequence: `state` is updated in place. Not differentiable.

    Args:
        x: (N,C), dtypes as in `short_conv`.
        weight: (C,K).
        bias: (C,) or None.
        state: (N,K-1,C) in x's dtype, the last inputs, oldest first.

    Returns:
        y (N,C) in x's dtype.

    Raises:
        ValueError: shapes.
        TypeError: dtypes.
        RuntimeError: devices, or an input that requires grad while grad mode is on.
    """
    y: Tensor | None = _mixer_ops.short_conv_step_direct(x, weight, bias, state)
    if y is not None:
        return y
    op = "short_conv_step"
    check_tensors(op, {"x": x, "weight": weight, "state": state}, bias=bias)
    return _mixer_ops.short_conv_step(x, weight, bias, state)  # type: ignore[no-any-return]
