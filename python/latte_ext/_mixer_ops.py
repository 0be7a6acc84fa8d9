# SPDX-License-Identifier: Apache-2.0
"""The operators of recurrences and convolutions.

A backward pass needs h of every token. It is the output where that has the type of the arithmetic;
half-precision outputs are rounded, so there the inputs are kept and h is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import _core
from . import _mixer_compositions as compositions
from ._autograd import composed, differentiable, in_place, linearised
from ._batching import CHANNELS, RECURRENCE
from ._checks import check_cu_seqlens, check_rank, check_shape
from ._device import where
from ._register import (
    compute_dtype,
    count_sequences,
    like,
    like_or_nothing,
    mark_updated,
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


def _linear_kernel(
    a: Tensor, b: Tensor, cu_seqlens: Tensor | None, h0: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    h, final = _linear_fake(a, b, cu_seqlens)
    _core.linear_recurrence_forward(a, b, cu_seqlens, h0, h, final, reverse, where(a))
    return h, final


def _linear_backward_fake(a: Tensor, *args: Any) -> tuple[Tensor, ...]:
    h0, dh, d_final, _ = args[3:]
    return like(a), like(dh), like_or_nothing(h0, d_final)


def _linear_backward_kernel(
    a: Tensor,
    b: Tensor | None,
    h: Tensor | None,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    dh: Tensor,
    d_final: Tensor,
    reverse: bool,
) -> tuple[Tensor, ...]:
    at = where(a)
    if b is not None:
        h = like(b, compute_dtype(b))
        _core.linear_recurrence_forward(a, b, cu_seqlens, h0, h, None, reverse, at)
    assert h is not None
    outputs = _linear_backward_fake(a, b, h, cu_seqlens, h0, dh, d_final, reverse)
    da, db, d_h0 = outputs
    _core.linear_recurrence_backward(
        a, h, cu_seqlens, h0, dh, d_final, da, db, None if h0 is None else d_h0, reverse, at
    )
    return outputs


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
    "linear_recurrence(Tensor a, Tensor b, Tensor? cu_seqlens, Tensor? h0, bool reverse)"
    " -> (Tensor h, Tensor final)",
    _linear_kernel, _linear_fake,
    differentiable(_linear_save, _linear_gradients, _linear_tangents), RECURRENCE,
)  # fmt: skip
_linear_backward = register(
    "linear_recurrence_backward(Tensor a, Tensor? b, Tensor? h, Tensor? cu_seqlens, Tensor? h0, "
    "Tensor dh, Tensor d_final, bool reverse) -> (Tensor da, Tensor db, Tensor d_h0)",
    _linear_backward_kernel, _linear_backward_fake,
    composed(compositions.linear_recurrence_backward), RECURRENCE,
)  # fmt: skip


# rg_lru ------------------------------------------------------------------------------------------


def _gated_fake(
    x: Tensor, gate_a: Tensor, gate_x: Tensor, log_lambda: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    cu_seqlens = args[1]
    check_rank("rg_lru", 3, x=x, gate_a=gate_a, gate_x=gate_x)
    return _recurrence_outputs("rg_lru", x, cu_seqlens)


def _gated_kernel(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    fresh: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    y, final = _gated_fake(x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens)
    _core.rg_lru_forward(
        x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, y, final, reverse,
        where(x),
    )  # fmt: skip
    return y, final


def _gated_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _, _, h0, _, _, _, d_final, _ = args
    return *map(like, inputs), like_or_nothing(h0, d_final)


def _gated_backward_kernel(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    fresh: Tensor | None,
    y: Tensor | None,
    dy: Tensor,
    d_final: Tensor,
    reverse: bool,
) -> tuple[Tensor, ...]:
    at = where(x)
    if y is None:
        y = like(x, compute_dtype(x))
        _core.rg_lru_forward(
            x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, y, None, reverse,
            at,
        )  # fmt: skip
    outputs = _gated_backward_fake(
        x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, y, dy, d_final, reverse
    )
    dx, d_gate_a, d_gate_x, d_log_lambda, d_h0 = outputs
    _core.rg_lru_backward(
        x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, y, dy, d_final, dx,
        d_gate_a, d_gate_x, d_log_lambda, None if h0 is None else d_h0, reverse, at,
    )  # fmt: skip
    return outputs


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


def _gated_step_kernel(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    state: Tensor,
    fresh: Tensor | None,
) -> Tensor:
    y = _gated_step_fake(x, gate_a, gate_x, log_lambda, state, fresh)
    _as_step(
        "rg_lru", _core.rg_lru_forward,
        x, gate_a, gate_x, log_lambda, None, None, state, fresh, y, state, False,
    )  # fmt: skip
    mark_updated(state)
    return y


def _as_step(op: str, function: Callable[..., None], x: Tensor, *args: Any) -> None:
    """A call of the core under the name of the step."""
    try:
        function(x, *args, where(x))
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(f"[{op}]", f"[{op}_step]", 1)) from None


rg_lru = register(
    "rg_lru(Tensor x, Tensor gate_a, Tensor gate_x, Tensor log_lambda, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor? h0, Tensor? fresh, bool reverse) -> (Tensor y, Tensor final)",
    _gated_kernel, _gated_fake,
    differentiable(_gated_save, _gated_gradients, compositions.rg_lru), CHANNELS,
)  # fmt: skip
_gated_backward = register(
    "rg_lru_backward(Tensor x, Tensor gate_a, Tensor gate_x, Tensor log_lambda, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor? h0, Tensor? fresh, Tensor? y, Tensor dy, Tensor d_final, "
    "bool reverse)"
    " -> (Tensor dx, Tensor d_gate_a, Tensor d_gate_x, Tensor d_log_lambda, Tensor d_h0)",
    _gated_backward_kernel, _gated_backward_fake,
    composed(compositions.rg_lru_backward, tangents=False), CHANNELS,
)  # fmt: skip
rg_lru_step = register(
    "rg_lru_step(Tensor x, Tensor gate_a, Tensor gate_x, Tensor log_lambda, Tensor(a!) state, "
    "Tensor? fresh) -> Tensor y",
    _gated_step_kernel, _gated_step_fake, in_place("state"), CHANNELS,
)  # fmt: skip


# short_conv --------------------------------------------------------------------------------------


def _conv_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _, cu_seqlens, _, causal = args
    op = "short_conv"
    check_rank(op, 3, x=x)
    check_rank(op, 2, weight=weight)
    check_cu_seqlens(op, cu_seqlens)
    tail = max(weight.shape[1] - 1, 0) if causal else 0
    return like(x), x.new_empty((count_sequences(x, cu_seqlens), tail, x.shape[2]))


def _conv_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    y, final = _conv_fake(x, weight, bias, cu_seqlens, state, causal)
    _core.short_conv_forward(
        x, weight, bias, cu_seqlens, state, y, final if causal else None, causal,
        where(x),
    )  # fmt: skip
    return y, final


def _conv_backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return like(x), like(weight), like_or_nothing(bias, x), like_or_nothing(state, x)


def _conv_backward_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    dy: Tensor,
    d_final: Tensor,
    causal: bool,
) -> tuple[Tensor, ...]:
    outputs = _conv_backward_fake(x, weight, bias, cu_seqlens, state)
    dx, d_weight, d_bias, d_state = outputs
    _core.short_conv_backward(
        x, weight, cu_seqlens, state, dy, d_final if causal else None, dx, d_weight,
        None if bias is None else d_bias, None if state is None else d_state, causal,
        where(x),
    )  # fmt: skip
    return outputs


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


def _conv_step_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    y = _conv_step_fake(x, weight, bias, state)
    if x.untyped_storage().data_ptr() == state.untyped_storage().data_ptr():
        x = x.clone()  # the rows of the state move before x joins them
    _as_step(
        "short_conv", _core.short_conv_forward,
        x, weight, bias, None, state, y, state, True,
    )  # fmt: skip
    mark_updated(state)
    return y


short_conv = register(
    "short_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? cu_seqlens, Tensor? state, "
    "bool causal) -> (Tensor y, Tensor final)",
    _conv_kernel, _conv_fake,
    differentiable(_conv_save, _conv_gradients, compositions.short_conv), CHANNELS,
)  # fmt: skip
_conv_backward = register(
    "short_conv_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? cu_seqlens, "
    "Tensor? state, Tensor dy, Tensor d_final, bool causal)"
    " -> (Tensor dx, Tensor d_weight, Tensor d_bias, Tensor d_state)",
    _conv_backward_kernel, _conv_backward_fake,
    composed(compositions.short_conv_backward), CHANNELS,
)  # fmt: skip
short_conv_step = register(
    "short_conv_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state) -> Tensor y",
    _conv_step_kernel, _conv_step_fake, in_place("state"), CHANNELS,
)  # fmt: skip
