# SPDX-License-Identifier: Apache-2.0
"""Keys and values that tokens see beyond their window."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _window_ops, reference
from ._checks import check_beside, check_rank, check_shape
from ._register import compute_dtype, count_sequences, is_differentiated
from .window_cache import WindowSinks


def check_sinks(
    op: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sinks: WindowSinks
) -> None:
    sink_tensors(op, q, sinks)
    for name, tensor in zip(("k", "v"), sinks[1:3], strict=True):
        check_rank(op, 4, **{f"sinks.{name}": tensor})
    sequences = count_sequences(q, cu_seqlens)
    n = sinks.k.shape[2]
    shapes: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("q", sinks.q, tuple(q.shape)),
        ("k", sinks.k, (sequences, k.shape[1], n, k.shape[3])),
        ("v", sinks.v, (sequences, v.shape[1], n, v.shape[3])),
        ("position", sinks.position, (sequences, n)),
    )
    for name, given, expected in shapes:
        if given is not None:
            check_shape(op, f"sinks.{name}", given, *expected)


def sink_tensors(
    op: str, q: Tensor, sinks: WindowSinks | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    if sinks is None:
        return (None, None, None, None)
    if not isinstance(sinks, WindowSinks):
        raise TypeError(f"[{op}] sinks is a {type(sinks).__name__}, expected WindowSinks")
    for name, tensor in zip(("q", "k", "v"), sinks, strict=False):
        check_beside(op, q, f"sinks.{name}", tensor)  # type: ignore[arg-type]
    position = sinks.position
    if position is not None and position.dtype != torch.int64:
        raise TypeError(f"[{op}] sinks.position has dtype {position.dtype}, expected torch.int64")
    return sinks.q, sinks.k, sinks.v, position


def attend_with_sinks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    softcap: float,
    sinks: WindowSinks,
    start: Tensor | None,
) -> Tensor:
    """Window and sinks under one softmax, in the compute type.

    The window enters as one more key, whose logit is the log of its sum of exponentials.
    """
    dtype = compute_dtype(q, k, v)
    save = is_differentiated(q, k, v, sinks.q, sinks.k, sinks.v)
    local: Tensor
    local, log_sum, _ = _window_ops.sliding_window_attention(
        q, k, v.to(dtype), key_mask, cu_seqlens, window, past, causal, scale, softcap, save
    )
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    at = torch.arange(tokens, device=q.device)[None]
    q_sink, k_sink, v_sink = (x.to(dtype) for x in sinks[:3])
    k_sink = k_sink.repeat_interleave(group, dim=1)
    v_sink = v_sink.repeat_interleave(group, dim=1)
    if cu_seqlens is not None:
        borders = cu_seqlens.to(torch.int64)
        sequence = torch.searchsorted(borders[1:], at[0], right=True)
        at = at - borders[sequence]
        # (N,H,n,.) of a token's own sequence.
        k_token = k_sink.transpose(0, 1)[:, sequence]
        logits = torch.einsum("htc,htnc->htn", q_sink[0], k_token)[None]
    else:
        logits = q_sink @ k_sink.transpose(2, 3)
    logits = logits * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks.position is not None:
        position = sinks.position if cu_seqlens is None else sinks.position[sequence][None]
        if start is not None:
            at = at + (start[:, None] if cu_seqlens is None else start[sequence])
        distance = at[:, :, None] - (position[:, None] if cu_seqlens is None else position)
        outside = distance >= window if causal else distance.abs() >= window
        logits = torch.where(outside[:, None], logits, -torch.inf)
    p = reference.softmax(torch.cat([log_sum[..., None], logits], dim=-1), dim=-1)
    if cu_seqlens is None:
        y: Tensor = p[..., 1:] @ v_sink
    else:
        y = torch.einsum("htn,htnd->htd", p[0, ..., 1:], v_sink.transpose(0, 1)[:, sequence])[None]
    return p[..., :1] * local + y
