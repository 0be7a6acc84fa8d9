# SPDX-License-Identifier: Apache-2.0
"""The operators of windows and Macchiato: as `_ops`, in whose library they are registered.

`past` counts cached keys in front of every sequence's tokens. `save` asks for what the backward
operator needs; without it `wide`, the window's output in the compute type, is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _core
from ._checks import check_rank
from ._ops import (
    _LIBRARY,
    _OPS,
    _contiguous_like,
    _mark_updated,
    _refuse_transforms,
    _unbuilt_cuda,
)

_TAGS = [torch.Tag.pt2_compliant_tag]
_LIBRARY.define(
    "sliding_window_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, "
    "int window, int past, bool causal, float scale, bool save)"
    " -> (Tensor y, Tensor log_sum, Tensor wide)",
    tags=_TAGS,
)
_LIBRARY.define(
    "sliding_window_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor log_sum, Tensor wide, Tensor dy, Tensor? d_log_sum, int window, "
    "int past, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_TAGS,
)
_LIBRARY.define(
    "sliding_window_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) key, Tensor(b!) value, "
    "Tensor(c!) valid, Tensor(d!) position, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, "
    "Tensor? sink_position, float scale) -> Tensor y",
    tags=_TAGS,
)
_LIBRARY.define(
    "macchiato_attention(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, Tensor k, "
    "Tensor v, Tensor? latent_mask, Tensor? key_mask, Tensor? cu_seqlens, Tensor? max, "
    "Tensor? norm, Tensor? mean, int window, int past, bool causal, float scale, "
    "float latent_scale, bool save) -> (Tensor y, Tensor total, Tensor log_sum, Tensor wide, "
    "Tensor max, Tensor norm, Tensor mean)",
    tags=_TAGS,
)
_LIBRARY.define(
    "macchiato_attention_backward(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, "
    "Tensor k, Tensor v, Tensor? latent_mask, Tensor? key_mask, Tensor? cu_seqlens, Tensor? max, "
    "Tensor? norm, Tensor? mean, Tensor total, Tensor log_sum, Tensor wide, Tensor dy, "
    "Tensor? d_final_norm, Tensor? d_final_mean, int window, int past, bool causal, float scale, "
    "float latent_scale) -> (Tensor dq_latent, Tensor dk_latent, Tensor dv_latent, Tensor dq, "
    "Tensor dk, Tensor dv, Tensor d_norm, Tensor d_mean)",
    tags=_TAGS,
)
_LIBRARY.define(
    "macchiato_attention_step(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, "
    "Tensor k, Tensor v, Tensor(a!)? max, Tensor(b!)? norm, Tensor(c!)? mean, Tensor(d!) key, "
    "Tensor(e!) value, Tensor(f!) valid, Tensor(g!) position, Tensor? q_sink, Tensor? k_sink, "
    "Tensor? v_sink, Tensor? sink_position, float scale, float latent_scale) -> Tensor y",
    tags=_TAGS,
)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if a tensor is, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _window_outputs(
    q: Tensor, k: Tensor, v: Tensor, save: bool, *, always_wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """y, log_sum, wide."""
    dtype = compute_dtype(v)
    shape = (q.shape[0], q.shape[1], q.shape[2])
    needed = save and (always_wide or v.dtype != dtype)
    return (
        v.new_empty((*shape, v.shape[3])),
        v.new_empty(shape, dtype=dtype),
        v.new_empty((*shape, v.shape[3]) if needed else (0,), dtype=dtype),
    )


def _given(x: Tensor) -> Tensor | None:
    return x if x.dim() > 1 else None


# sliding_window_attention ------------------------------------------------------------------------


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_rank("sliding_window_attention", 4, q=q, k=k, v=v)
    return _window_outputs(q, k, v, save)


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_rank("sliding_window_attention", 4, q=q, k=k, v=v)
    y, log_sum, wide = _window_outputs(q, k, v, save)
    _core.sliding_window_forward(
        q, k, v, key_mask, cu_seqlens, y, log_sum, _given(wide), window, past, causal, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    return y, log_sum, wide


def _backward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(_contiguous_like(q, k, v))


def _backward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    log_sum: Tensor,
    wide: Tensor,
    dy: Tensor,
    d_log_sum: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    dq, dk, dv = _contiguous_like(q, k, v)
    _core.sliding_window_backward(
        q, k, v, key_mask, cu_seqlens, log_sum, wide, dy, d_log_sum, dq, dk, dv, window, past,
        causal, scale, torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


class _SlidingWindow(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.sliding_window_attention.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.window, ctx.past, ctx.causal, ctx.scale, _ = inputs
        y, log_sum, wide = output
        ctx.save_for_backward(*tensors, log_sum, y if y.dtype == wide.dtype else wide)
        ctx.mark_non_differentiable(wide)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_log_sum: Tensor | None, _: Any) -> Any:
        q, k, v, key_mask, cu_seqlens, log_sum, wide = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros(wide.shape, dtype=v.dtype, device=v.device)
        gradients = _OPS.sliding_window_attention_backward.default(
            q, k, v, key_mask, cu_seqlens, log_sum, wide, dy, d_log_sum, ctx.window, ctx.past,
            ctx.causal, ctx.scale,
        )  # fmt: skip
        return *gradients, *[None] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_forward_mode("sliding_window_attention")


def _refuse_forward_mode(op: str) -> None:
    raise RuntimeError(
        f"[{op}] got a forward-mode tangent, expected reverse mode: use "
        'backend="reference" for forward-mode AD'
    )


def _autograd(op: str, function: Any) -> Any:
    def apply(*args: Any) -> Any:
        _refuse_transforms(op)
        return function.apply(*args)

    return apply


def _once_differentiable(op: str) -> Any:
    """Stands behind a backward operator so that a second derivative raises by name."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(_OPS, op).default(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(
                f"[{op}] got a second derivative, expected first order: use "
                'backend="reference" for double backward'
            )

    return lambda *args: Backward.apply(*args)  # type: ignore[no-untyped-call]


# macchiato_attention -----------------------------------------------------------------------------


def _macchiato_outputs(
    q_latent: Tensor,
    k_latent: Tensor,
    v_latent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    save: bool,
) -> tuple[Tensor, ...]:
    check_rank("macchiato_attention", 4, q_latent=q_latent, k_latent=k_latent, q=q, k=k, v=v)
    y, log_sum, wide = _window_outputs(q, k, v, save, always_wide=True)
    total = y.new_empty(y.shape if y.dtype != wide.dtype else (0,), dtype=wide.dtype)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (sequences, k_latent.shape[1], k_latent.shape[3])
    state = [v.new_empty(s, dtype=wide.dtype) for s in (shape, shape, (*shape, v.shape[3]))]
    return y, total, log_sum, wide, *state


def _macchiato_fake(
    q_latent: Tensor,
    k_latent: Tensor,
    v_latent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    latent_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    latent_scale: float,
    save: bool,
) -> tuple[Tensor, ...]:
    return _macchiato_outputs(q_latent, k_latent, v_latent, q, k, v, cu_seqlens, save)


def _macchiato_cpu(
    q_latent: Tensor,
    k_latent: Tensor,
    v_latent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    latent_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    latent_scale: float,
    save: bool,
) -> tuple[Tensor, ...]:
    outputs = _macchiato_outputs(q_latent, k_latent, v_latent, q, k, v, cu_seqlens, save)
    y, total, log_sum, wide, final_max, final_norm, final_mean = outputs
    _core.macchiato_forward(
        q_latent, k_latent, v if v_latent is None else v_latent, q, k, v, latent_mask, key_mask,
        cu_seqlens, max, norm, mean, y, y if y.dtype == wide.dtype else total,
        log_sum if save else None, _given(wide), final_max, final_norm, final_mean, window, past,
        causal, scale, latent_scale, torch.get_num_threads(),
    )  # fmt: skip
    if not save:
        log_sum.zero_()
    return outputs


def _macchiato_gradients(
    q_latent: Tensor,
    k_latent: Tensor,
    v_latent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm: Tensor | None,
    mean: Tensor | None,
) -> list[Tensor]:
    empty = q.new_empty(0)
    optional = (v_latent, norm, mean)
    dv_latent, d_norm, d_mean = (
        empty.clone() if x is None else _contiguous_like(x)[0] for x in optional
    )
    dq_latent, dk_latent, dq, dk, dv = _contiguous_like(q_latent, k_latent, q, k, v)
    return [dq_latent, dk_latent, dv_latent, dq, dk, dv, d_norm, d_mean]


def _macchiato_backward_fake(
    q_latent: Tensor,
    k_latent: Tensor,
    v_latent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    latent_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return tuple(_macchiato_gradients(q_latent, k_latent, v_latent, q, k, v, norm, mean))


def _macchiato_backward_cpu(
    q_latent: Tensor,
    k_latent: Tensor,
    v_latent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    latent_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    total: Tensor,
    log_sum: Tensor,
    wide: Tensor,
    dy: Tensor,
    d_final_norm: Tensor | None,
    d_final_mean: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    latent_scale: float,
) -> tuple[Tensor, ...]:
    outputs = _macchiato_gradients(q_latent, k_latent, v_latent, q, k, v, norm, mean)
    dq_latent, dk_latent, dv_latent, dq, dk, dv, d_norm, d_mean = outputs
    shared = v_latent is None
    if shared:
        # Both parts of dv meet there unrounded.
        dv_latent = dv if dv.dtype == wide.dtype else dv.new_empty(dv.shape, dtype=wide.dtype)
    _core.macchiato_backward(
        q_latent, k_latent, v if v_latent is None else v_latent, q, k, v, latent_mask, key_mask,
        cu_seqlens, max, norm, mean, total, log_sum, wide, dy, d_final_norm, d_final_mean,
        dq_latent, dk_latent, dv_latent, dq, dk, dv, None if norm is None else d_norm,
        None if mean is None else d_mean, shared, window, past, causal, scale, latent_scale,
        torch.get_num_threads(),
    )  # fmt: skip
    if not shared and k_latent.shape[3] == 0:
        dv_latent.zero_()
    return tuple(outputs)


class _Macchiato(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.macchiato_attention.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.window, ctx.past, ctx.causal, ctx.scale, ctx.latent_scale, _ = inputs
        y, total, log_sum, wide, maximum, *_ = output
        ctx.save_for_backward(*tensors, y if y.dtype == total.dtype else total, log_sum, wide)
        ctx.mark_non_differentiable(total, log_sum, wide, maximum)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, total, log_sum, wide = ctx.saved_tensors
        v_latent, v, norm = inputs[2], inputs[5], inputs[10]
        *_, d_norm, d_mean = grads
        if dy is None:
            dy = torch.zeros(total.shape, dtype=v.dtype, device=v.device)
        if (d_norm is None) != (d_mean is None):
            given = d_mean if d_norm is None else d_norm
            assert given is not None
            # (N,Hk,L) and (N,Hk,L,D)
            if d_norm is None:
                d_norm = given.new_zeros(given.shape[:3])
            else:
                d_mean = given.new_zeros((*given.shape, v.shape[3]))
        output = _OPS.macchiato_attention_backward.default(
            *inputs, total, log_sum, wide, dy, d_norm, d_mean, ctx.window, ctx.past, ctx.causal,
            ctx.scale, ctx.latent_scale,
        )  # fmt: skip
        gradients = list(output)
        if v_latent is None:
            gradients[2] = None
        if norm is None:
            gradients[6:] = [None, None]
        return *gradients[:6], None, None, None, None, *gradients[6:], *[None] * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_forward_mode("macchiato_attention")


# Steps -------------------------------------------------------------------------------------------


def _step_output(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    check_rank("sliding_window_attention_step", 3, q=q, k=k, v=v)
    return _step_output(q, v)


def _step_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    position: Tensor,
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    sink_position: Tensor | None,
    scale: float,
) -> Tensor:
    check_rank("sliding_window_attention_step", 3, q=q, k=k, v=v)
    y = _step_output(q, v)
    _core.sliding_window_step(
        q, k, v, key, value, valid, position, q_sink, k_sink, v_sink, sink_position, y, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    _mark_updated(key, value, valid, position)
    return y


def _macchiato_step_fake(
    q_latent: Tensor, k_latent: Tensor, v_latent: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> Tensor:
    check_rank("macchiato_attention_step", 3, q_latent=q_latent, k_latent=k_latent, q=q, k=k, v=v)
    return _step_output(q, v)


def _macchiato_step_cpu(
    q_latent: Tensor,
    k_latent: Tensor,
    v_latent: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    key: Tensor,
    value: Tensor,
    valid: Tensor,
    position: Tensor,
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    sink_position: Tensor | None,
    scale: float,
    latent_scale: float,
) -> Tensor:
    check_rank("macchiato_attention_step", 3, q_latent=q_latent, k_latent=k_latent, q=q, k=k, v=v)
    y = _step_output(q, v)
    _core.macchiato_step(
        q_latent, k_latent, v if v_latent is None else v_latent, q, k, v, max, norm, mean, key,
        value, valid, position, q_sink, k_sink, v_sink, sink_position, y, scale, latent_scale,
        torch.get_num_threads(),
    )  # fmt: skip
    _mark_updated(key, value, valid, position)
    _mark_updated(*(x for x in (max, norm, mean) if x is not None))
    return y


def _step_autograd(op: str) -> Any:
    """Refuses what is differentiated: caches are updated in place."""

    def step(*args: Any) -> Any:
        _refuse_transforms(op)
        tangents = torch.autograd.forward_ad._current_level >= 0
        names = [argument.name for argument in getattr(_OPS, op).default._schema.arguments]
        for name, tensor in zip(names, args, strict=True):
            if not isinstance(tensor, Tensor):
                continue
            if torch.is_grad_enabled() and tensor.requires_grad:
                found = "that requires grad"
            elif tangents and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
                found = "that carries a tangent"
            else:
                continue
            raise RuntimeError(
                f"[{op}] got {name} {found}, expected none: the cache is updated in place. Use "
                f"{op.removesuffix('_step')} for training, or no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(_OPS, op).default(*args)

    return step


for _name, _cpu, _fake, _gradient in (
    (
        "sliding_window_attention",
        _forward_cpu,
        _forward_fake,
        _autograd("sliding_window_attention", _SlidingWindow),
    ),
    (
        "sliding_window_attention_backward",
        _backward_cpu,
        _backward_fake,
        _once_differentiable("sliding_window_attention_backward"),
    ),
    (
        "sliding_window_attention_step",
        _step_cpu,
        _step_fake,
        _step_autograd("sliding_window_attention_step"),
    ),
    (
        "macchiato_attention",
        _macchiato_cpu,
        _macchiato_fake,
        _autograd("macchiato_attention", _Macchiato),
    ),
    (
        "macchiato_attention_backward",
        _macchiato_backward_cpu,
        _macchiato_backward_fake,
        _once_differentiable("macchiato_attention_backward"),
    ),
    (
        "macchiato_attention_step",
        _macchiato_step_cpu,
        _macchiato_step_fake,
        _step_autograd("macchiato_attention_step"),
    ),
):
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _unbuilt_cuda(_name), "CUDA")
    _LIBRARY.impl(_name, _gradient, "Autograd")
    torch.library.register_fake(f"latte_ext::{_name}", _fake, lib=_LIBRARY)

sliding_window_attention = _OPS.sliding_window_attention.default
sliding_window_attention_step = _OPS.sliding_window_attention_step.default
macchiato_attention = _OPS.macchiato_attention.default
macchiato_attention_step = _OPS.macchiato_attention_step.default
