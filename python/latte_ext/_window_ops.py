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

from ._autograd import differentiable, in_place, once_differentiable
from ._batching import ATTENTION
from ._checks import check_rank
from ._direct import direct
from ._register import (
    compute_dtype,
    like,
    like_or_nothing,
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


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, save = args
    check_rank("sliding_window_attention", 4, q=q, k=k, v=v)
    return window_outputs(q, v, save)


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


sliding_window_attention = register(
    "sliding_window_attention",
    _forward_fake,
    differentiable(_save, _gradients),
    ATTENTION,
)
sliding_window_attention_direct = direct(sliding_window_attention)
_backward = register(
    "sliding_window_attention_backward",
    _backward_fake,
    once_differentiable,
    ATTENTION,
)
sliding_window_attention_step = register(
    "sliding_window_attention_step",
    _step_fake,
    in_place("cache"),
    ATTENTION,
)
sliding_window_attention_step_direct = direct(sliding_window_attention_step)
