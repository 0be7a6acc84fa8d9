# SPDX-License-Identifier: Apache-2.0
"""The operators of windows.

Sinks have their queries, keys and values, perhaps a position each, and `start`, the position of a
sequence's first query, if that is not 0.
`past` counts cached keys in front of every sequence's tokens. `save` asks for what the backward
operator needs; without it `wide`, the window's output in the compute type, is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _core
from ._autograd import differentiable, in_place, once_differentiable
from ._batching import ATTENTION
from ._checks import check_rank
from ._device import where
from ._register import (
    compute_dtype,
    like,
    like_or_nothing,
    mark_updated,
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


def _forward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y, log_sum, wide = _forward_fake(q, k, v, save)
    _core.sliding_window_forward(
        q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink, sink_position, start, y, log_sum,
        or_none(wide), window, past, causal, scale, softcap, where(q),
    )  # fmt: skip
    return y, log_sum, wide


def sink_gradients(q: Tensor, *sinks: Tensor | None) -> list[Tensor]:
    return [like_or_nothing(x, q) for x in sinks]


def given(gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of those inputs that are there."""
    return [None if x is None else g for g, x in zip(gradients, inputs, strict=True)]


def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return like(q), like(k), like(v), *sink_gradients(q, q_sink, k_sink, v_sink)


def _backward_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    sink_position: Tensor | None,
    start: Tensor | None,
    log_sum: Tensor,
    wide: Tensor,
    dy: Tensor,
    d_log_sum: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    gradients = _backward_fake(q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink)
    dq, dk, dv, *of_sinks = gradients
    dq_sink, dk_sink, dv_sink = given(of_sinks, (q_sink, k_sink, v_sink))
    _core.sliding_window_backward(
        q, k, v, key_mask, cu_seqlens, q_sink, k_sink, v_sink, sink_position, start, log_sum, wide,
        dy, d_log_sum, dq, dk, dv, dq_sink, dk_sink, dv_sink, window, past, causal, scale, softcap,
        where(q),
    )  # fmt: skip
    return gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, window, past, causal, scale, softcap, _ = inputs
    ctx.scalars = window, past, causal, scale, softcap
    y, log_sum, wide = output
    ctx.save_for_backward(*tensors, log_sum, y if y.dtype == wide.dtype else wide)
    ctx.mark_non_differentiable(wide)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, d_log_sum: Tensor | None, _: Any) -> Any:
    *inputs, log_sum, wide = ctx.saved_tensors
    v, sinks = inputs[2], inputs[5:8]
    if dy is None:
        dy = torch.zeros(wide.shape, dtype=v.dtype, device=v.device)
    gradients = _backward(*inputs, log_sum, wide, dy, d_log_sum, *ctx.scalars)
    return *gradients[:3], None, None, *given(gradients[3:], sinks), *[None] * 8


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    check_rank("sliding_window_attention_step", 3, q=q, k=k, v=v)
    return step_output(q, v)


def _step_kernel(
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
    softcap: float,
) -> Tensor:
    y = _step_fake(q, k, v)
    _core.sliding_window_step(
        q, k, v, key, value, valid, position, q_sink, k_sink, v_sink, sink_position, y, scale,
        softcap, where(q),
    )  # fmt: skip
    mark_updated(key, value, valid, position)
    return y


sliding_window_attention = register(
    "sliding_window_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, "
    "Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, Tensor? sink_position, Tensor? start, "
    "int window, int past, bool causal, float scale, float softcap, bool save)"
    " -> (Tensor y, Tensor log_sum, Tensor wide)",
    _forward_kernel, _forward_fake, differentiable(_save, _gradients), ATTENTION,
)  # fmt: skip
_backward = register(
    "sliding_window_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, Tensor? sink_position, "
    "Tensor? start, Tensor log_sum, Tensor wide, Tensor dy, Tensor? d_log_sum, int window, "
    "int past, bool causal, float scale, float softcap) -> (Tensor dq, Tensor dk, Tensor dv, "
    "Tensor dq_sink, Tensor dk_sink, Tensor dv_sink)",
    _backward_kernel, _backward_fake, once_differentiable, ATTENTION,
)  # fmt: skip
sliding_window_attention_step = register(
    "sliding_window_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) key, Tensor(b!) value, "
    "Tensor(c!) valid, Tensor(d!) position, Tensor? q_sink, Tensor? k_sink, Tensor? v_sink, "
    "Tensor? sink_position, float scale, float softcap) -> Tensor y",
    _step_kernel, _step_fake, in_place("cache"), ATTENTION,
)  # fmt: skip
