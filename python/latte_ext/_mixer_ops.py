# SPDX-License-Identifier: Apache-2.0
"""The operators of recurrences and convolutions.

A backward pass needs h of every token. It is the output where that has the type of the arithmetic;
half-precision outputs are rounded, so there the inputs are kept and h is computed again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _mixer_compositions as compositions
from ._autograd import composed, differentiable, in_place, linearised
from ._batching import CHANNELS, RECURRENCE
from ._checks import check_cu_seqlens, check_rank, check_shape
from ._direct import direct
from ._register import (
    compute_dtype,
    count_sequences,
    like,
    like_or_nothing,
    register,
)


def _recurrence_outputs(op: str, x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    check_cu_seqlens(op, cu_seqlens)
    state_shape = (count_sequences(x, cu_seqlens), x.shape[2])
    return like(x), x.new_empty(state_shape, dtype=compute_dtype(x))


# linear_recurrence -------------------------------------------------------------------------------


def _linear_fake(a: Tensor, b: Tensor, cu_seqlens: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    check_rank("linear_recurrence", 3, a=a, b=b)
    return _recurrence_outputs("linear_recurrence", b, cu_seqlens)


def _linear_backward_fake(a: Tensor, *args: Any) -> tuple[Tensor, ...]:
    h0, dh, d_final, _ = args[3:]
    return like(a), like(dh), like_or_nothing(h0, d_final)


def _linear_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, cu_seqlens, h0, ctx.reverse = inputs
    wide = b.dtype == compute_dtype(b)
    ctx.save_for_backward(a, *((None, output[0]) if wide else (b, None)), cu_seqlens, h0)


def _linear_gradients(ctx: Any, dh: Tensor, d_final: Tensor) -> Any:
    saved = ctx.saved_tensors
    da, db, d_h0 = _linear_backward(*saved, dh, d_final, ctx.reverse)
    return da, db, None, None if saved[4] is None else d_h0, None


def _linear_tangents(*args: Any) -> Any:
    return linearised(linear_recurrence, compositions.linear_recurrence_tangents)(*args)


linear_recurrence = register(
    "linear_recurrence",
    _linear_fake,
    differentiable(_linear_save, _linear_gradients, _linear_tangents),
    RECURRENCE,
)
linear_recurrence_direct = direct(linear_recurrence)
_linear_backward = register(
    "linear_recurrence_backward",
    _linear_backward_fake,
    composed(compositions.linear_recurrence_backward),
    RECURRENCE,
)


# rg_lru ------------------------------------------------------------------------------------------


def _gated_fake(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, log_lambda: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    cu_seqlens = args[1]
    check_rank("rg_lru", 3, x=x, gate_a=gate_a, gate_x=gate_x)
    return _recurrence_outputs("rg_lru", x, cu_seqlens)


def _gated_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _, _, h0, _, _, _, d_final, _ = args
    return *map(like, inputs), like_or_nothing(h0, d_final)


def _gated_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reverse = inputs
    y = output[0]
    ctx.save_for_backward(*tensors, y if y.dtype == compute_dtype(y) else None)


def _gated_gradients(ctx: Any, dy: Tensor, d_final: Tensor) -> Any:
    saved = ctx.saved_tensors
    dx, d_gate_a, d_gate_x, d_log_lambda, d_h0 = _gated_backward(*saved, dy, d_final, ctx.reverse)
    d_h0 = None if saved[6] is None else d_h0
    return dx, d_gate_a, d_gate_x, d_log_lambda, None, None, d_h0, None, None


def _gated_step_fake(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    state: Tensor,
    fresh: Tensor | None,
) -> Tensor:
    op = "rg_lru_step"
    check_rank(op, 2, x=x)
    n, channels = x.shape
    for name, tensor in (("gate_a", gate_a), ("gate_x", gate_x), ("state", state)):
        check_shape(op, name, tensor, n, channels)
    check_shape(op, "log_lambda", log_lambda, channels)
    if fresh is not None:
        check_shape(op, "fresh", fresh, n)
    return like(x)


rg_lru = register(
    "rg_lru",
    _gated_fake,
    differentiable(_gated_save, _gated_gradients, compositions.rg_lru),
    CHANNELS,
)
rg_lru_direct = direct(rg_lru)
_gated_backward = register(
    "rg_lru_backward",
    _gated_backward_fake,
    composed(compositions.rg_lru_backward, tangents=False),
    CHANNELS,
)
rg_lru_step = register(
    "rg_lru_step",
    _gated_step_fake,
    in_place("state"),
    CHANNELS,
)
rg_lru_step_direct = direct(rg_lru_step)


# short_conv --------------------------------------------------------------------------------------


def _conv_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _, cu_seqlens, _, causal = args
    op = "short_conv"
    check_rank(op, 3, x=x)
    check_rank(op, 2, weight=weight)
    check_cu_seqlens(op, cu_seqlens)
    tail = max(weight.shape[1] - 1, 0) if causal else 0
    return like(x), x.new_empty((count_sequences(x, cu_seqlens), tail, x.shape[2]))


def _conv_backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return like(x), like(weight), like_or_nothing(bias, x), like_or_nothing(state, x)


def _conv_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _conv_gradients(ctx: Any, dy: Tensor, d_final: Tensor) -> Any:
    _, _, bias, _, state = saved = ctx.saved_tensors
    dx, d_weight, d_bias, d_state = _conv_backward(*saved, dy, d_final, ctx.causal)
    d_bias, d_state = None if bias is None else d_bias, None if state is None else d_state
    return dx, d_weight, d_bias, None, d_state, None


def _conv_step_fake(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    op = "short_conv_step"
    check_rank(op, 2, x=x, weight=weight)
    n, channels = x.shape
    check_shape(op, "weight", weight, channels, weight.shape[1])
    check_shape(op, "state", state, n, max(weight.shape[1] - 1, 0), channels)
    if bias is not None:
        check_shape(op, "bias", bias, channels)
    return like(x)


short_conv = register(
    "short_conv",
    _conv_fake,
    differentiable(_conv_save, _conv_gradients, compositions.short_conv),
    CHANNELS,
)
short_conv_direct = direct(short_conv)
_conv_backward = register(
    "short_conv_backward",
    _conv_backward_fake,
    composed(compositions.short_conv_backward),
    CHANNELS,
)
short_conv_step = register(
    "short_conv_step",
    _conv_step_fake,
    in_place("state"),
    CHANNELS,
)
short_conv_step_direct = direct(short_conv_step)
