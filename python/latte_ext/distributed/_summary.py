# SPDX-License-Identifier: Apache-2.0
"""The state of a set of tokens, without an output: what a rank tells of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import StateTensors


def summarise(k: Tensor, v: Tensor, *, scale: float, key_mask: Tensor | None) -> StateTensors:
    """`reference.summary` in three products of matrices, with half of the memory for gradients.

    k (B,Hk,T,L) and v (B,Hk,T,D), T >= 0, are of the type of the state.
    """
    state: StateTensors = _Summary.apply(k, v, scale, key_mask)  # type: ignore[no-untyped-call]
    return state


class _Summary(torch.autograd.Function):
    """With w = exp(k - max): d_v = w b and d_k = w (a + v . b), a and b as in `_states._Merge`."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None
    ) -> StateTensors:
        keys, values = _masked(k, v, scale, key_mask)
        max_ = keys.amax(2) if k.shape[2] else k.new_full((*k.shape[:2], k.shape[3]), -torch.inf)
        weight = _weights(keys, max_)
        norm = weight.sum(2)
        mean = weight.transpose(2, 3) @ values / _positive(norm).unsqueeze(3)
        ctx.save_for_backward(k, v, key_mask, max_, norm, mean)
        ctx.scale = scale
        ctx.mark_non_differentiable(max_)
        return max_, norm, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor, d_norm: Tensor, d_mean: Tensor) -> Any:
        k, v, key_mask, max_, norm, mean = ctx.saved_tensors
        keys, values = _masked(k, v, ctx.scale, key_mask)
        weight = _weights(keys, max_)
        b = d_mean / _positive(norm).unsqueeze(3)
        a = d_norm - (b * mean).sum(3)
        d_k = (values @ b.transpose(2, 3)).add_(a.unsqueeze(2)).mul_(weight)
        return d_k if ctx.scale == 1 else d_k.mul_(ctx.scale), weight @ b, None, None


def _masked(k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    keys = k if scale == 1 else k * scale
    if key_mask is None:
        return keys, v
    real = key_mask[:, None, :, None]
    return torch.where(real, keys, -torch.inf), torch.where(real, v, 0)


def _weights(keys: Tensor, max_: Tensor) -> Tensor:
    finite = torch.where(max_ == -torch.inf, 0, max_)
    return (keys - finite.unsqueeze(2)).exp_()


def _positive(norm: Tensor) -> Tensor:
    """norm, 1 for a latent without tokens."""
    return torch.where(norm == 0, 1, norm)
