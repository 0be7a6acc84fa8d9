# SPDX-License-Identifier: Apache-2.0
"""The operators of Macchiato; sinks, `past`, `save` and `wide` as in `_window_ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._autograd import differentiable, in_place, once_differentiable
from ._batching import ATTENTION
from ._checks import check_rank
from ._direct import direct
from ._ops import empty_state
from ._register import (
    count_sequences,
    like,
    like_or_nothing,
    register,
)
from ._window_ops import given, sink_gradients, step_output, window_outputs


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


macchiato_attention = register(
    "macchiato_attention",
    _forward_fake,
    differentiable(_save, _gradients),
    ATTENTION,
)
macchiato_attention_direct = direct(macchiato_attention)
_backward = register(
    "macchiato_attention_backward",
    _backward_fake,
    once_differentiable,
    ATTENTION,
)
macchiato_attention_step = register(
    "macchiato_attention_step",
    _step_fake,
    in_place("cache"),
    ATTENTION,
)
macchiato_attention_step_direct = direct(macchiato_attention_step)
