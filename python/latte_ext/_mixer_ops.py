# SPDX-License-Identifier: Apache-2.0
"""The operators of recurrences and convolutions, registered as those of `_ops`.

A backward pass needs h of every token. It is the output where that has the type of the arithmetic;
half-precision outputs are rounded, so there the inputs are kept and h is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _core
from ._checks import check_cu_seqlens, check_rank, check_shape
from ._ops import _LIBRARY, _OPS, _mark_updated, _refuse_transforms, _unbuilt_cuda

_SCHEMAS = (
    "linear_recurrence(Tensor a, Tensor b, Tensor? cu_seqlens, Tensor? h0, bool reverse)"
    " -> (Tensor h, Tensor final)",
    "linear_recurrence_backward(Tensor a, Tensor? b, Tensor? h, Tensor? cu_seqlens, Tensor? h0, "
    "Tensor dh, Tensor d_final, bool reverse) -> (Tensor da, Tensor db, Tensor d_h0)",
    "rg_lru(Tensor x, Tensor gate_a, Tensor gate_x, Tensor log_lambda, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor? h0, Tensor? fresh, bool reverse) -> (Tensor y, Tensor final)",
    "rg_lru_backward(Tensor x, Tensor gate_a, Tensor gate_x, Tensor log_lambda, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor? h0, Tensor? fresh, Tensor? y, Tensor dy, Tensor d_final, "
    "bool reverse)"
    " -> (Tensor dx, Tensor d_gate_a, Tensor d_gate_x, Tensor d_log_lambda, Tensor d_h0)",
    "rg_lru_step(Tensor x, Tensor gate_a, Tensor gate_x, Tensor log_lambda, Tensor(a!) state, "
    "Tensor? fresh) -> Tensor y",
    "short_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? cu_seqlens, Tensor? state, "
    "bool causal) -> (Tensor y, Tensor final)",
    "short_conv_backward(Tensor x, Tensor weight, Tensor? bias, Tensor? cu_seqlens, "
    "Tensor? state, Tensor dy, Tensor d_final, bool causal)"
    " -> (Tensor dx, Tensor d_weight, Tensor d_bias, Tensor d_state)",
    "short_conv_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state) -> Tensor y",
)
for _schema in _SCHEMAS:
    _LIBRARY.define(_schema, tags=[torch.Tag.pt2_compliant_tag])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of arithmetic and states: float64 for float64, float32 for the others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _like_or_nothing(x: Tensor | None, other: Tensor) -> Tensor:
    return other.new_empty(0) if x is None else _like(x)


def _recurrence_outputs(
    op: str, x: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    check_cu_seqlens(op, cu_seqlens)
    state_shape = (_sequences(x, cu_seqlens), x.shape[2])
    return _like(x, dtype), x.new_empty(state_shape, dtype=compute_dtype(x.dtype))


# linear_recurrence -------------------------------------------------------------------------------


def _linear_fake(
    a: Tensor, b: Tensor, cu_seqlens: Tensor | None, h0: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    check_rank("linear_recurrence", 3, a=a, b=b)
    return _recurrence_outputs("linear_recurrence", b, cu_seqlens)


def _linear_cpu(
    a: Tensor, b: Tensor, cu_seqlens: Tensor | None, h0: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    h, final = _linear_fake(a, b, cu_seqlens, h0, reverse)
    _core.linear_recurrence_forward(
        a, b, cu_seqlens, h0, h, final, reverse, torch.get_num_threads()
    )
    return h, final


def _linear_backward_fake(
    a: Tensor,
    b: Tensor | None,
    h: Tensor | None,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    dh: Tensor,
    d_final: Tensor,
    reverse: bool,
) -> tuple[Tensor, ...]:
    return _like(a), _like(dh), _like_or_nothing(h0, d_final)


def _linear_backward_cpu(
    a: Tensor,
    b: Tensor | None,
    h: Tensor | None,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    dh: Tensor,
    d_final: Tensor,
    reverse: bool,
) -> tuple[Tensor, ...]:
    threads = torch.get_num_threads()
    if b is not None:
        h = _like(b, compute_dtype(b.dtype))
        _core.linear_recurrence_forward(a, b, cu_seqlens, h0, h, None, reverse, threads)
    assert h is not None
    outputs = _linear_backward_fake(a, b, h, cu_seqlens, h0, dh, d_final, reverse)
    da, db, d_h0 = outputs
    _core.linear_recurrence_backward(
        a, h, cu_seqlens, h0, dh, d_final, da, db, None if h0 is None else d_h0, reverse, threads
    )
    return outputs


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.linear_recurrence.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, b, cu_seqlens, h0, ctx.reverse = inputs
        wide = b.dtype == compute_dtype(b.dtype)
        ctx.save_for_backward(a, *((None, output[0]) if wide else (b, None)), cu_seqlens, h0)

    @staticmethod
    def backward(ctx: Any, dh: Tensor, d_final: Tensor) -> Any:
        saved = ctx.saved_tensors
        da, db, d_h0 = _OPS.linear_recurrence_backward.default(*saved, dh, d_final, ctx.reverse)
        return da, db, None, None if saved[4] is None else d_h0, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_forward_mode("linear_recurrence")


# rg_lru ------------------------------------------------------------------------------------------


def _gated_fake(
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
    check_rank("rg_lru", 3, x=x, gate_a=gate_a, gate_x=gate_x)
    return _recurrence_outputs("rg_lru", x, cu_seqlens)


def _gated_cpu(
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
    y, final = _gated_fake(x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, reverse)
    _core.rg_lru_forward(
        x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, y, final, reverse,
        torch.get_num_threads(),
    )  # fmt: skip
    return y, final


def _gated_backward_fake(
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
    inputs = (x, gate_a, gate_x, log_lambda)
    return *map(_like, inputs), _like_or_nothing(h0, d_final)


def _gated_backward_cpu(
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
    threads = torch.get_num_threads()
    if y is None:
        y = _like(x, compute_dtype(x.dtype))
        _core.rg_lru_forward(
            x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, y, None, reverse,
            threads,
        )  # fmt: skip
    outputs = _gated_backward_fake(
        x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, y, dy, d_final, reverse
    )
    dx, d_gate_a, d_gate_x, d_log_lambda, d_h0 = outputs
    _core.rg_lru_backward(
        x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, y, dy, d_final, dx,
        d_gate_a, d_gate_x, d_log_lambda, None if h0 is None else d_h0, reverse, threads,
    )  # fmt: skip
    return outputs


class _RgLru(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.rg_lru.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.reverse = inputs
        y = output[0]
        ctx.save_for_backward(*tensors, y if y.dtype == compute_dtype(y.dtype) else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> Any:
        saved = ctx.saved_tensors
        dx, d_gate_a, d_gate_x, d_log_lambda, d_h0 = _OPS.rg_lru_backward.default(
            *saved, dy, d_final, ctx.reverse
        )
        d_h0 = None if saved[6] is None else d_h0
        return dx, d_gate_a, d_gate_x, d_log_lambda, None, None, d_h0, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_forward_mode("rg_lru")


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
    return _like(x)


def _gated_step_cpu(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    state: Tensor,
    fresh: Tensor | None,
) -> Tensor:
    y = _gated_step_fake(x, gate_a, gate_x, log_lambda, state, fresh)
    rows = (tensor.unsqueeze(1) for tensor in (x, gate_a, gate_x))
    _as_step(
        "rg_lru", _core.rg_lru_forward,
        *rows, log_lambda, None, None, state, fresh, y.unsqueeze(1), state, False,
    )  # fmt: skip
    _mark_updated(state)
    return y


def _as_step(op: str, function: Callable[..., None], *args: Any) -> None:
    """A call of the core under the name of the step."""
    try:
        function(*args, torch.get_num_threads())
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace(f"[{op}]", f"[{op}_step]", 1)) from None


# short_conv --------------------------------------------------------------------------------------


def _conv_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    op = "short_conv"
    check_rank(op, 3, x=x)
    check_rank(op, 2, weight=weight)
    check_cu_seqlens(op, cu_seqlens)
    tail = max(weight.shape[1] - 1, 0) if causal else 0
    return _like(x), x.new_empty((_sequences(x, cu_seqlens), tail, x.shape[2]))


def _conv_cpu(
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
        torch.get_num_threads(),
    )  # fmt: skip
    return y, final


def _conv_backward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    dy: Tensor,
    d_final: Tensor,
    causal: bool,
) -> tuple[Tensor, ...]:
    return _like(x), _like(weight), _like_or_nothing(bias, x), _like_or_nothing(state, x)


def _conv_backward_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    dy: Tensor,
    d_final: Tensor,
    causal: bool,
) -> tuple[Tensor, ...]:
    outputs = _conv_backward_fake(x, weight, bias, cu_seqlens, state, dy, d_final, causal)
    dx, d_weight, d_bias, d_state = outputs
    _core.short_conv_backward(
        x, weight, cu_seqlens, state, dy, d_final if causal else None, dx, d_weight,
        None if bias is None else d_bias, None if state is None else d_state, causal,
        torch.get_num_threads(),
    )  # fmt: skip
    return outputs


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.short_conv.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.causal = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> Any:
        _, _, bias, _, state = saved = ctx.saved_tensors
        dx, d_weight, d_bias, d_state = _OPS.short_conv_backward.default(
            *saved, dy, d_final, ctx.causal
        )
        d_bias, d_state = None if bias is None else d_bias, None if state is None else d_state
        return dx, d_weight, d_bias, None, d_state, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_forward_mode("short_conv")


def _conv_step_fake(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    op = "short_conv_step"
    check_rank(op, 2, x=x, weight=weight)
    n, channels = x.shape
    check_shape(op, "weight", weight, channels, weight.shape[1])
    check_shape(op, "state", state, n, max(weight.shape[1] - 1, 0), channels)
    if bias is not None:
        check_shape(op, "bias", bias, channels)
    return _like(x)


def _conv_step_cpu(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    y = _conv_step_fake(x, weight, bias, state)
    _as_step(
        "short_conv", _core.short_conv_forward,
        x.unsqueeze(1), weight, bias, None, state, y.unsqueeze(1), state, True,
    )  # fmt: skip
    _mark_updated(state)
    return y


# Registration ------------------------------------------------------------------------------------


def _refuse_forward_mode(op: str) -> None:
    raise RuntimeError(
        f"[{op}] got a forward-mode tangent, expected reverse mode: use "
        'backend="reference" for forward-mode AD'
    )


def _autograd(op: str, function: Any) -> Callable[..., Any]:
    def apply(*args: Any) -> Any:
        _refuse_transforms(op)
        return function.apply(*args)

    return apply


def _backward_autograd(op: str) -> Callable[..., Any]:
    """Behind a backward operator, so that a second derivative raises by name."""
    operator = getattr(_OPS, op).default

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(
                f"[{op}] got a second derivative, expected first order: use "
                'backend="reference" for double backward'
            )

    return lambda *args: Once.apply(*args)  # type: ignore[no-untyped-call]


def _step_autograd(op: str, names: tuple[str, ...]) -> Callable[..., Any]:
    operator, whole = getattr(_OPS, op).default, op.removesuffix("_step")

    def apply(*args: Any) -> Any:
        _refuse_transforms(op)
        tangents = torch.autograd.forward_ad._current_level >= 0
        for name, tensor in zip(names, args, strict=True):
            if tensor is None:
                continue
            if torch.is_grad_enabled() and tensor.requires_grad:
                found = "that requires grad"
            elif tangents and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
                found = "that carries a tangent"
            else:
                continue
            raise RuntimeError(
                f"[{op}] got {name} {found}, expected none: the state is updated in place. "
                f"Use {whole} for training, or no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return apply


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "linear_recurrence": (
        _linear_cpu, _linear_fake, _autograd("linear_recurrence", _LinearRecurrence),
    ),
    "linear_recurrence_backward": (
        _linear_backward_cpu, _linear_backward_fake,
        _backward_autograd("linear_recurrence_backward"),
    ),
    "rg_lru": (_gated_cpu, _gated_fake, _autograd("rg_lru", _RgLru)),
    "rg_lru_backward": (
        _gated_backward_cpu, _gated_backward_fake, _backward_autograd("rg_lru_backward"),
    ),
    "rg_lru_step": (
        _gated_step_cpu, _gated_step_fake,
        _step_autograd(
            "rg_lru_step", ("x", "gate_a", "gate_x", "log_lambda", "state", "fresh")
        ),
    ),
    "short_conv": (_conv_cpu, _conv_fake, _autograd("short_conv", _ShortConv)),
    "short_conv_backward": (
        _conv_backward_cpu, _conv_backward_fake, _backward_autograd("short_conv_backward"),
    ),
    "short_conv_step": (
        _conv_step_cpu, _conv_step_fake,
        _step_autograd("short_conv_step", ("x", "weight", "bias", "state")),
    ),
}  # fmt: skip
for _name, (_cpu, _fake, _above) in _KERNELS.items():
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _unbuilt_cuda(_name), "CUDA")
    _LIBRARY.impl(_name, _above, "Autograd")
    torch.library.register_fake(f"latte_ext::{_name}", _fake, lib=_LIBRARY)

linear_recurrence = _OPS.linear_recurrence.default
rg_lru = _OPS.rg_lru.default
rg_lru_step = _OPS.rg_lru_step.default
short_conv = _OPS.short_conv.default
short_conv_step = _OPS.short_conv_step.default
