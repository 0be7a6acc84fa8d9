# SPDX-License-Identifier: Apache-2.0
"""The operators of windows and Macchiato.

`past` counts cached keys in front of every sequence's tokens. `save` asks for what the backward
operator needs; without it `wide`, the window's output in the compute type, is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _core
from ._checks import check_rank
from ._ops import empty_state
from ._register import (
    compute_dtype,
    count_sequences,
    differentiable,
    in_place,
    like,
    like_or_nothing,
    mark_updated,
    once_differentiable,
    register,
)


def window_outputs(
    q: Tensor, v: Tensor, save: bool, *, always_wide: bool = False
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


def step_output(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def or_none(wide: Tensor) -> Tensor | None:
    """`wide` if it was asked for."""
    return wide if wide.dim() > 1 else None


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, save = args
    check_rank("sliding_window_attention", 4, q=q, k=k, v=v)
    return window_outputs(q, v, save)


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
    y, log_sum, wide = _forward_fake(q, k, v, save)
    _core.sliding_window_forward(
        q, k, v, key_mask, cu_seqlens, y, log_sum, or_none(wide), window, past, causal, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    return y, log_sum, wide


def _backward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return like(q), like(k), like(v)


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
    dq, dk, dv = _backward_fake(q, k, v)
    _core.sliding_window_backward(
        q, k, v, key_mask, cu_seqlens, log_sum, wide, dy, d_log_sum, dq, dk, dv, window, past,
        causal, scale, torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.window, ctx.past, ctx.causal, ctx.scale, _ = inputs
    y, log_sum, wide = output
    ctx.save_for_backward(*tensors, log_sum, y if y.dtype == wide.dtype else wide)
    ctx.mark_non_differentiable(wide)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, d_log_sum: Tensor | None, _: Any) -> Any:
    q, k, v, key_mask, cu_seqlens, log_sum, wide = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros(wide.shape, dtype=v.dtype, device=v.device)
    gradients = _backward(
        q, k, v, key_mask, cu_seqlens, log_sum, wide, dy, d_log_sum, ctx.window, ctx.past,
        ctx.causal, ctx.scale,
    )  # fmt: skip
    return *gradients, *[None] * 7


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    check_rank("sliding_window_attention_step", 3, q=q, k=k, v=v)
    return step_output(q, v)


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
    y = _step_fake(q, k, v)
    _core.sliding_window_step(
        q, k, v, key, value, valid, position, q_sink, k_sink, v_sink, sink_position, y, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    mark_updated(key, value, valid, position)
    return y


sliding_window_attention = register(
    "sliding_window_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, "
    "int window, int past, bool causal, float scale, bool save)"
    " -> (Tensor y, Tensor log_sum, Tensor wide)",
    _forward_cpu, _forward_fake, differentiable(_save, _gradients),
)  # fmt: skip
_backward = register(
    "sliding_window_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor log_sum, Tensor wide, Tensor dy, Tensor? d_log_sum, int window, "
    "int past, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward_cpu, _backward_fake, once_differentiable,
)  # fmt: skip
sliding_window_attention_step = register(
    "sliding_window_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) key, Tensor(b!) value, "
    "Tensor(c!) valid, Tensor(d!) position, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, "
    "Tensor? sink_position, float scale) -> Tensor y",
    _step_cpu, _step_fake, in_place("cache"),
)  # fmt: skip


# macchiato_attention -----------------------------------------------------------------------------


def _macchiato_fake(
    q_latent: Tensor, k_latent: Tensor, v_latent: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    (_, _, cu_seqlens), save = args[:3], args[-1]
    check_rank("macchiato_attention", 4, q_latent=q_latent, k_latent=k_latent, q=q, k=k, v=v)
    y, log_sum, wide = window_outputs(q, v, save, always_wide=True)
    total = y.new_empty(y.shape if y.dtype != wide.dtype else (0,), dtype=wide.dtype)
    sequences = count_sequences(q, cu_seqlens)
    state = empty_state(v, sequences, k_latent.shape[1], k_latent.shape[3])
    return y, total, log_sum, wide, *state


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
    outputs = _macchiato_fake(
        q_latent, k_latent, v_latent, q, k, v, latent_mask, key_mask, cu_seqlens, save
    )
    y, total, log_sum, wide, final_max, final_norm, final_mean = outputs
    _core.macchiato_forward(
        q_latent, k_latent, v if v_latent is None else v_latent, q, k, v, latent_mask, key_mask,
        cu_seqlens, max, norm, mean, y, y if y.dtype == wide.dtype else total,
        log_sum if save else None, or_none(wide), final_max, final_norm, final_mean, window, past,
        causal, scale, latent_scale, torch.get_num_threads(),
    )  # fmt: skip
    if not save:
        log_sum.zero_()
    return outputs


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
    optional = [like_or_nothing(x, q) for x in (v_latent, norm, mean)]
    return like(q_latent), like(k_latent), optional[0], like(q), like(k), like(v), *optional[1:]


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
    outputs = _macchiato_backward_fake(
        q_latent, k_latent, v_latent, q, k, v, latent_mask, key_mask, cu_seqlens, max, norm, mean
    )
    dq_latent, dk_latent, dv_latent, dq, dk, dv, d_norm, d_mean = outputs
    shared = v_latent is None
    if shared:
        # Both parts of dv meet there unrounded.
        dv_latent = dv if dv.dtype == wide.dtype else like(dv, wide.dtype)
    _core.macchiato_backward(
        q_latent, k_latent, v if v_latent is None else v_latent, q, k, v, latent_mask, key_mask,
        cu_seqlens, max, norm, mean, total, log_sum, wide, dy, d_final_norm, d_final_mean,
        dq_latent, dk_latent, dv_latent, dq, dk, dv, None if norm is None else d_norm,
        None if mean is None else d_mean, shared, window, past, causal, scale, latent_scale,
        torch.get_num_threads(),
    )  # fmt: skip
    if not shared and k_latent.shape[3] == 0:
        dv_latent.zero_()
    return outputs


def _macchiato_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.window, ctx.past, ctx.causal, ctx.scale, ctx.latent_scale, _ = inputs
    y, total, log_sum, wide, maximum, *_ = output
    ctx.save_for_backward(*tensors, y if y.dtype == total.dtype else total, log_sum, wide)
    ctx.mark_non_differentiable(total, log_sum, wide, maximum)
    ctx.set_materialize_grads(False)


def _macchiato_gradients(
    ctx: Any, dy: Tensor | None, *grads: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, total, log_sum, wide = ctx.saved_tensors
    v_latent, v, norm = inputs[2], inputs[5], inputs[10]
    *_, d_norm, d_mean = grads
    if dy is None:
        dy = torch.zeros(total.shape, dtype=v.dtype, device=v.device)
    if (d_norm is None) != (d_mean is None):
        other = d_mean if d_norm is None else d_norm
        assert other is not None
        # (N,Hk,L) and (N,Hk,L,D)
        if d_norm is None:
            d_norm = other.new_zeros(other.shape[:3])
        else:
            d_mean = other.new_zeros((*other.shape, v.shape[3]))
    output = _macchiato_backward(
        *inputs, total, log_sum, wide, dy, d_norm, d_mean, ctx.window, ctx.past, ctx.causal,
        ctx.scale, ctx.latent_scale,
    )  # fmt: skip
    gradients = list(output)
    if v_latent is None:
        gradients[2] = None
    if norm is None:
        gradients[6:] = [None, None]
    return *gradients[:6], None, None, None, None, *gradients[6:], *[None] * 6


def _macchiato_step_fake(
    q_latent: Tensor, k_latent: Tensor, v_latent: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> Tensor:
    check_rank("macchiato_attention_step", 3, q_latent=q_latent, k_latent=k_latent, q=q, k=k, v=v)
    return step_output(q, v)


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
    y = _macchiato_step_fake(q_latent, k_latent, v_latent, q, k, v)
    _core.macchiato_step(
        q_latent, k_latent, v if v_latent is None else v_latent, q, k, v, max, norm, mean, key,
        value, valid, position, q_sink, k_sink, v_sink, sink_position, y, scale, latent_scale,
        torch.get_num_threads(),
    )  # fmt: skip
    mark_updated(key, value, valid, position)
    mark_updated(*(x for x in (max, norm, mean) if x is not None))
    return y


macchiato_attention = register(
    "macchiato_attention(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, Tensor k, "
    "Tensor v, Tensor? latent_mask, Tensor? key_mask, Tensor? cu_seqlens, Tensor? max, "
    "Tensor? norm, Tensor? mean, int window, int past, bool causal, float scale, "
    "float latent_scale, bool save) -> (Tensor y, Tensor total, Tensor log_sum, Tensor wide, "
    "Tensor max, Tensor norm, Tensor mean)",
    _macchiato_cpu, _macchiato_fake, differentiable(_macchiato_save, _macchiato_gradients),
)  # fmt: skip
_macchiato_backward = register(
    "macchiato_attention_backward(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, "
    "Tensor k, Tensor v, Tensor? latent_mask, Tensor? key_mask, Tensor? cu_seqlens, Tensor? max, "
    "Tensor? norm, Tensor? mean, Tensor total, Tensor log_sum, Tensor wide, Tensor dy, "
    "Tensor? d_final_norm, Tensor? d_final_mean, int window, int past, bool causal, float scale, "
    "float latent_scale) -> (Tensor dq_latent, Tensor dk_latent, Tensor dv_latent, Tensor dq, "
    "Tensor dk, Tensor dv, Tensor d_norm, Tensor d_mean)",
    _macchiato_backward_cpu, _macchiato_backward_fake, once_differentiable,
)  # fmt: skip
macchiato_attention_step = register(
    "macchiato_attention_step(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, "
    "Tensor k, Tensor v, Tensor(a!)? max, Tensor(b!)? norm, Tensor(c!)? mean, Tensor(d!) key, "
    "Tensor(e!) value, Tensor(f!) valid, Tensor(g!) position, Tensor? q_sink, Tensor? k_sink, "
    "Tensor? v_sink, Tensor? sink_position, float scale, float latent_scale) -> Tensor y",
    _macchiato_step_cpu, _macchiato_step_fake, in_place("cache"),
)  # fmt: skip
