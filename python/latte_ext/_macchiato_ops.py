# SPDX-License-Identifier: Apache-2.0
"""The operators of Macchiato; sinks, `past`, `save` and `wide` as in `_window_ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _core
from ._autograd import differentiable, in_place, once_differentiable
from ._batching import ATTENTION
from ._checks import check_rank
from ._device import where
from ._ops import empty_state
from ._register import (
    count_sequences,
    like,
    like_or_nothing,
    mark_updated,
    register,
)
from ._window_ops import given, or_none, sink_gradients, step_output, window_outputs


def _forward_fake(
    q_latent: Tensor, k_latent: Tensor, v_latent: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    _, _, cu_seqlens, *_, save = args
    check_rank("macchiato_attention", 4, q_latent=q_latent, k_latent=k_latent, q=q, k=k, v=v)
    y, log_sum, wide = window_outputs(q, v, save, always_wide=True)
    total = y.new_empty(y.shape if y.dtype != wide.dtype else (0,), dtype=wide.dtype)
    sequences = count_sequences(q, cu_seqlens)
    state = empty_state(v, sequences, k_latent.shape[1], k_latent.shape[3])
    return y, total, log_sum, wide, *state


def _forward_kernel(
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
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    sink_position: Tensor | None,
    start: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    softcap: float,
    latent_scale: float,
    save: bool,
) -> tuple[Tensor, ...]:
    outputs = _forward_fake(
        q_latent, k_latent, v_latent, q, k, v, latent_mask, key_mask, cu_seqlens, save
    )
    y, total, log_sum, wide, final_max, final_norm, final_mean = outputs
    _core.macchiato_forward(
        q_latent, k_latent, v if v_latent is None else v_latent, q, k, v, latent_mask, key_mask,
        cu_seqlens, max, norm, mean, q_sink, k_sink, v_sink, sink_position, start, y,
        y if y.dtype == wide.dtype else total, log_sum if save else None, or_none(wide), final_max,
        final_norm, final_mean, window, past, causal, scale, softcap, latent_scale,
        where(q_latent),
    )  # fmt: skip
    if not save:
        log_sum.zero_()
    return outputs


def _backward_fake(
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
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    optional = [like_or_nothing(x, q) for x in (v_latent, norm, mean)]
    return (
        like(q_latent), like(k_latent), optional[0], like(q), like(k), like(v), *optional[1:],
        *sink_gradients(q, q_sink, k_sink, v_sink),
    )  # fmt: skip


def _backward_kernel(
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
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    sink_position: Tensor | None,
    start: Tensor | None,
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
    softcap: float,
    latent_scale: float,
) -> tuple[Tensor, ...]:
    outputs = _backward_fake(
        q_latent, k_latent, v_latent, q, k, v, latent_mask, key_mask, cu_seqlens, max, norm, mean,
        q_sink, k_sink, v_sink,
    )  # fmt: skip
    dq_latent, dk_latent, dv_latent, dq, dk, dv, d_norm, d_mean, *of_sinks = outputs
    dq_sink, dk_sink, dv_sink = given(of_sinks, (q_sink, k_sink, v_sink))
    shared = v_latent is None
    if shared:
        # Both parts of dv meet there unrounded.
        dv_latent = dv if dv.dtype == wide.dtype else like(dv, wide.dtype)
    _core.macchiato_backward(
        q_latent, k_latent, v if v_latent is None else v_latent, q, k, v, latent_mask, key_mask,
        cu_seqlens, max, norm, mean, q_sink, k_sink, v_sink, sink_position, start, total, log_sum,
        wide, dy, d_final_norm, d_final_mean, dq_latent, dk_latent, dv_latent, dq, dk, dv, dq_sink,
        dk_sink, dv_sink, None if norm is None else d_norm, None if mean is None else d_mean,
        shared, window, past, causal, scale, softcap, latent_scale, where(q_latent),
    )  # fmt: skip
    if not shared and k_latent.shape[3] == 0:
        dv_latent.zero_()
    return outputs


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, window, past, causal, scale, softcap, latent_scale, _ = inputs
    ctx.scalars = window, past, causal, scale, softcap, latent_scale
    y, total, log_sum, wide, maximum, *_ = output
    ctx.save_for_backward(*tensors, y if y.dtype == total.dtype else total, log_sum, wide)
    ctx.mark_non_differentiable(total, log_sum, wide, maximum)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, total, log_sum, wide = ctx.saved_tensors
    v_latent, v, state, sinks = inputs[2], inputs[5], inputs[10:12], inputs[12:15]
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
    output = _backward(*inputs, total, log_sum, wide, dy, d_norm, d_mean, *ctx.scalars)
    dq_latent, dk_latent, dv_latent, dq, dk, dv, *optional = output
    return (
        dq_latent, dk_latent, None if v_latent is None else dv_latent, dq, dk, dv, *[None] * 4,
        *given(optional, (*state, *sinks)), *[None] * 9,
    )  # fmt: skip


def _step_fake(
    q_latent: Tensor, k_latent: Tensor, v_latent: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> Tensor:
    check_rank("macchiato_attention_step", 3, q_latent=q_latent, k_latent=k_latent, q=q, k=k, v=v)
    return step_output(q, v)


def _step_kernel(
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
    softcap: float,
    latent_scale: float,
) -> Tensor:
    y = _step_fake(q_latent, k_latent, v_latent, q, k, v)
    _core.macchiato_step(
        q_latent, k_latent, v if v_latent is None else v_latent, q, k, v, max, norm, mean, key,
        value, valid, position, q_sink, k_sink, v_sink, sink_position, y, scale, softcap,
        latent_scale, where(q_latent),
    )  # fmt: skip
    mark_updated(key, value, valid, position)
    mark_updated(*(x for x in (max, norm, mean) if x is not None))
    return y


macchiato_attention = register(
    "macchiato_attention(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, Tensor k, "
    "Tensor v, Tensor? latent_mask, Tensor? key_mask, Tensor? cu_seqlens, Tensor? max, "
    "Tensor? norm, Tensor? mean, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, "
    "Tensor? sink_position, Tensor? start, int window, int past, bool causal, float scale, "
    "float softcap, float latent_scale, bool save) -> (Tensor y, Tensor total, Tensor log_sum, "
    "Tensor wide, Tensor max, Tensor norm, Tensor mean)",
    _forward_kernel, _forward_fake, differentiable(_save, _gradients), ATTENTION,
)  # fmt: skip
_backward = register(
    "macchiato_attention_backward(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, "
    "Tensor k, Tensor v, Tensor? latent_mask, Tensor? key_mask, Tensor? cu_seqlens, Tensor? max, "
    "Tensor? norm, Tensor? mean, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, "
    "Tensor? sink_position, Tensor? start, Tensor total, Tensor log_sum, Tensor wide, Tensor dy, "
    "Tensor? d_final_norm, Tensor? d_final_mean, int window, int past, bool causal, float scale, "
    "float softcap, float latent_scale) -> (Tensor dq_latent, Tensor dk_latent, Tensor dv_latent, "
    "Tensor dq, Tensor dk, Tensor dv, Tensor d_norm, Tensor d_mean, Tensor dq_sink, "
    "Tensor dk_sink, Tensor dv_sink)",
    _backward_kernel, _backward_fake, once_differentiable, ATTENTION,
)  # fmt: skip
macchiato_attention_step = register(
    "macchiato_attention_step(Tensor q_latent, Tensor k_latent, Tensor? v_latent, Tensor q, "
    "Tensor k, Tensor v, Tensor(a!)? max, Tensor(b!)? norm, Tensor(c!)? mean, Tensor(d!) key, "
    "Tensor(e!) value, Tensor(f!) valid, Tensor(g!) position, Tensor? q_sink, Tensor? k_sink, "
    "Tensor? v_sink, Tensor? sink_position, float scale, float softcap, "
    "float latent_scale) -> Tensor y",
    _step_kernel, _step_fake, in_place("cache"), ATTENTION,
)  # fmt: skip
