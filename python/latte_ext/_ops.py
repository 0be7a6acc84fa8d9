# SPDX-License-Identifier: Apache-2.0
"""The operators of latent attention, and its step without the dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _compositions, _core, reference
from ._autograd import composed, differentiable, in_place
from ._batching import ATTENTION
from ._checks import check_cu_seqlens, check_rank
from ._device import EMULATED, where
from ._register import (
    compute_dtype,
    count_sequences,
    like,
    like_or_nothing,
    mark_updated,
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


def _forward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _forward_fake(q, k, v, key_mask, cu_seqlens)
    y, final_max, final_norm, final_mean = outputs
    _core.latent_attention_forward(
        q, k, v, key_mask, cu_seqlens, max, norm, mean, y, final_max, final_norm,
        final_mean, causal, scale, where(q),
    )  # fmt: skip
    return outputs


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


def _backward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    dy: Tensor,
    d_final_norm: Tensor,
    d_final_mean: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    outputs = _backward_fake(q, k, v, key_mask, cu_seqlens, max, norm, mean)
    d_norm, d_mean = (None, None) if norm is None else (outputs[3], outputs[4])
    _core.latent_attention_backward(
        q, k, v, key_mask, cu_seqlens, max, norm, mean, dy, d_final_norm, d_final_mean,
        outputs[0], outputs[1], outputs[2], d_norm, d_mean, causal, scale, where(q),
    )  # fmt: skip
    return outputs


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


def _step_kernel(
    q: Tensor, k: Tensor, v: Tensor, max: Tensor, norm: Tensor, mean: Tensor, scale: float
) -> Tensor:
    device = where(q)
    y: Tensor | None = None
    if isinstance(device, int):
        y = _core.latent_attention_step_plain(q, k, v, max, norm, mean, scale, device)
    if y is None:  # what does not fit is refused by name
        y = _step_fake(q, k, v)
        _core.latent_attention_step(q, k, v, max, norm, mean, y, scale, device)
    mark_updated(max, norm, mean)
    return y


def _merge_fake(max: Tensor, norm: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_rank("state_merge", 4, mean=mean)
    return like(max), like(norm), like(mean)


def _merge_kernel(
    max: Tensor,
    norm: Tensor,
    mean: Tensor,
    other_max: Tensor,
    other_norm: Tensor,
    other_mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    out = _merge_fake(max, norm, mean)
    _core.state_merge(max, norm, mean, other_max, other_norm, other_mean, *out, where(mean))
    return out


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
    "state_merge(Tensor max, Tensor norm, Tensor mean, Tensor other_max, Tensor other_norm, "
    "Tensor other_mean) -> (Tensor max, Tensor norm, Tensor mean)",
    _merge_kernel, _merge_fake, differentiable(_merge_save, _merge_gradients), ATTENTION,
)  # fmt: skip
latent_attention = register(
    "latent_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, "
    "Tensor? max, Tensor? norm, Tensor? mean, bool causal, float scale)"
    " -> (Tensor y, Tensor max, Tensor norm, Tensor mean)",
    _forward_kernel, _forward_fake,
    differentiable(_save, _gradients, _compositions.latent_attention), ATTENTION,
)  # fmt: skip
_backward = register(
    "latent_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor? max, Tensor? norm, Tensor? mean, Tensor dy, Tensor d_final_norm, "
    "Tensor d_final_mean, bool causal, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_norm, Tensor d_mean)",
    _backward_kernel, _backward_fake,
    composed(_compositions.latent_attention_backward), ATTENTION,
)  # fmt: skip
latent_attention_step = register(
    "latent_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) max, Tensor(b!) norm, "
    "Tensor(c!) mean, float scale) -> Tensor y",
    _step_kernel, _step_fake, in_place("state"), ATTENTION,
)  # fmt: skip


# What tells a call that the dispatcher is needed. Private to torch, so it may go: then no call is
# direct.
_PROBES = (
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C, "_len_torch_function_stack"),
    (torch._C, "_are_functorch_transforms_active"),
    (torch._C, "_get_tracing_state"),
    (torch._C._autograd, "_profiler_enabled"),
    (torch.autograd.forward_ad, "_current_level"),
)
_CAN_BE_DIRECT = not EMULATED and all(hasattr(module, name) for module, name in _PROBES)


def latent_attention_step_direct(
    q: Tensor, k: Tensor, v: Tensor, max: Tensor, norm: Tensor, mean: Tensor, scale: float
) -> Tensor | None:
    """The step without the dispatcher, whose 5 to 10 us are more than the kernel of one sequence.

    None, with nothing done, wherever the dispatcher would do more than call the kernel, and
    wherever an argument is not what the kernel takes: then the operator has to answer.
    """
    if (
        not _CAN_BE_DIRECT
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
        # A subclass may define __torch_dispatch__ or __torch_function__.
        or not (type(q) is type(k) is type(v) is type(max) is type(norm) is type(mean) is Tensor)
        or type(scale) is not float
    ):
        return None
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
        or max.requires_grad or norm.requires_grad or mean.requires_grad
    ):  # fmt: skip
        return None
    # The core refuses what only it can see: devices, layouts, dtypes, lazy negation, shapes.
    y = _core.latent_attention_step_plain(q, k, v, max, norm, mean, scale, torch.get_num_threads())
    if y is not None:
        mark_updated(max, norm, mean)
    return y
