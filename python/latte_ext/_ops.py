# SPDX-License-Identifier: Apache-2.0
"""The operators of latent attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _compositions, reference
from ._autograd import composed, differentiable, in_place
from ._batching import ATTENTION
from ._checks import check_cu_seqlens, check_rank
from ._direct import direct
from ._register import (
    compute_dtype,
    count_sequences,
    like,
    like_or_nothing,
    register,
)


def empty_state(
    v: Tensor, sequences: int, heads: int, latents: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for max (N,Hk,L), norm (N,Hk,L) and mean (N,Hk,L,D)."""
    shape, dtype = (sequences, heads, latents), compute_dtype(v)
    return (
        v.new_empty(shape, dtype=dtype),
        v.new_empty(shape, dtype=dtype),
        v.new_empty((*shape, v.shape[3]), dtype=dtype),
    )


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rank("latent_attention", 4, q=q, k=k, v=v)
    check_cu_seqlens("latent_attention", cu_seqlens)
    y = v.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))
    return (y, *empty_state(v, count_sequences(q, cu_seqlens), k.shape[1], q.shape[3]))


def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return like(q), like(k), like(v), like_or_nothing(norm, q), like_or_nothing(mean, q)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor, d_norm: Tensor, d_mean: Tensor) -> Any:
    saved = ctx.saved_tensors
    dq, dk, dv, d_initial_norm, d_initial_mean = _backward(
        *saved, dy, d_norm, d_mean, ctx.causal, ctx.scale
    )
    if saved[6] is None:
        d_initial_norm = d_initial_mean = None
    return dq, dk, dv, None, None, None, d_initial_norm, d_initial_mean, None, None


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    check_rank("latent_attention_step", 3, q=q, k=k, v=v)
    return v.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def _merge_fake(max: Tensor, norm: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_rank("state_merge", 4, mean=mean)
    return like(max), like(norm), like(mean)


def _merge_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[0])


def _merge_gradients(ctx: Any, _: Tensor, d_norm: Tensor, d_mean: Tensor) -> Any:
    """By the reference: merges of training are few and small."""
    saved = ctx.saved_tensors
    leaves = [x.detach().requires_grad_() for x in saved]
    with torch.enable_grad():
        _, norm, mean = reference.merge(tuple(leaves[:3]), tuple(leaves[3:]))
    carried = (*leaves[1:3], *leaves[4:])
    da, db, dc, dd = torch.autograd.grad((norm, mean), carried, (d_norm, d_mean))
    return None, da, db, None, dc, dd


state_merge = register(
    "state_merge",
    _merge_fake,
    differentiable(_merge_save, _merge_gradients),
    ATTENTION,
)
latent_attention = register(
    "latent_attention",
    _forward_fake,
    differentiable(_save, _gradients, _compositions.latent_attention),
    ATTENTION,
)
_backward = register(
    "latent_attention_backward",
    _backward_fake,
    composed(_compositions.latent_attention_backward),
    ATTENTION,
)
latent_attention_step = register(
    "latent_attention_step",
    _step_fake,
    in_place("state"),
    ATTENTION,
)
latent_attention_direct = direct(latent_attention)
latent_attention_step_direct = direct(latent_attention_step)
