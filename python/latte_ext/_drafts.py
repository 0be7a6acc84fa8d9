# SPDX-License-Identifier: Apache-2.0
"""What a draft of w tokens keeps, and how some of its tokens enter a state.

Every commit works in place and gives the bits of as many steps: a token's factors enter a state of
latents through the step itself, a window and a convolution only keep copies, and a recurrence runs
over the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _mixer_ops, _ops
from ._checks import check_tensors, check_type

Accepted = Sequence[int] | Tensor


class LatentDraft(NamedTuple):
    """The factors of w tokens of N sequences: w (L + D) values per head instead of L (2 + D).

    Attributes:
        k: (N,Hk,w,L), as it was given, without a copy: leave it as it is until the commit.
        v: (N,Hk,w,D), in the same way.
        scale: multiplies k.
    """

    k: Tensor
    v: Tensor
    scale: float


class WindowDraft(NamedTuple):
    """Keys and values of w tokens, without a copy.

    Attributes:
        k: (N,Hk,w,Dk).
        v: (N,Hk,w,D).
    """

    k: Tensor
    v: Tensor


class MacchiatoDraft(NamedTuple):
    """What w tokens leave in latents and window.

    Attributes:
        latent: None if the layer has no latents.
        window: None if it has no window.
    """

    latent: LatentDraft | None
    window: WindowDraft | None


for _kind in (LatentDraft, WindowDraft, MacchiatoDraft):
    torch.serialization.add_safe_globals([_kind])


def count_accepted(
    op: str, accepted: Accepted, batch: int, width: int, device: torch.device
) -> tuple[Tensor, int]:
    """`accepted` as (N,) int64 on `device`, and the largest of it (0 if N is 0).

    Raises:
        TypeError: not integers.
        ValueError: another length than N, or outside of 0..w.
    """
    try:
        counts = torch.as_tensor(accepted)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{op} accepted is a {type(accepted).__name__}, expected integers ({error})"
        ) from error
    if counts.numel() == 0 and not isinstance(accepted, Tensor):
        counts = counts.long()
    if counts.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{op} accepted has dtype {counts.dtype}, expected signed integers")
    if tuple(counts.shape) != (batch,):
        raise ValueError(
            f"{op} accepted has shape {tuple(counts.shape)}, expected {(batch,)}: (N,)"
        )
    most = int(counts.max()) if batch else 0
    if batch and (int(counts.min()) < 0 or most > width):
        raise ValueError(f"{op} accepted is {counts.tolist()}, expected 0 to {width} tokens each")
    return counts.to(device, torch.int64), most


def check_draft(op: str, draft: object, kind: type, key: Tensor, dim: int, channels: int) -> int:
    """Raises TypeError or ValueError unless `draft` is a `kind` for a state with `key` (N,Hk,...).

    Args:
        dim, channels: last sizes of its k and v.

    Returns:
        w, its tokens.
    """
    check_type(op.strip("[]"), "draft", draft, kind)
    k, v = draft.k, draft.v  # type: ignore[attr-defined]
    for name, rows, size in (("k", k, dim), ("v", v, channels)):
        check_type(op.strip("[]"), f"draft.{name}", rows, Tensor)
        expected = (*key.shape[:2], *(k.shape[2:3] or ("w",)), size)
        if tuple(rows.shape) != expected:
            raise ValueError(
                f"{op} draft.{name} has shape {tuple(rows.shape)}, expected {expected}: "
                "(N, Hk, w, channels)"
            )
        if rows.device != key.device:
            raise RuntimeError(f"{op} draft.{name} is on {rows.device}, expected {key.device}")
    return int(k.shape[2])


def same_width(op: str, widths: Iterable[int]) -> int:
    """The tokens of the parts of a draft; raises ValueError unless they have as many."""
    found = list(widths)
    if len(set(found)) > 1:
        raise ValueError(f"{op} draft has parts of {found} tokens, expected as many in each")
    return found[0]


def commit_latents(
    state: tuple[Tensor, Tensor, Tensor], draft: LatentDraft, accepted: Tensor, most: int
) -> None:
    """The first accepted (N,) tokens of a draft enter max, norm and mean, in place.

    A token that is not accepted is a key of -inf: the identity of the merge, exactly.
    """
    dtype = state[0].dtype
    # Scaled here, as the step does it first: -inf times a scale of 0 would be NaN.
    scaled, values = draft.k[:, :, :most].to(dtype) * draft.scale, draft.v[:, :, :most].to(dtype)
    q = torch.zeros_like(state[0])
    for i in range(most):
        refused = (accepted <= i)[:, None, None]
        k = scaled[:, :, i].masked_fill(refused, -torch.inf)
        v = values[:, :, i].masked_fill(refused, 0)
        _ops.latent_attention_step(q, k, v, *state, 1.0)


def commit_window(
    cache: tuple[Tensor, Tensor, Tensor, Tensor], draft: WindowDraft, accepted: Tensor
) -> None:
    """The first accepted (N,) tokens of a draft enter key, value, valid and position, in place."""
    key, value, valid, position = cache
    window, width = key.shape[2], draft.k.shape[2]
    rows = min(window, width)
    # Of more tokens than the window has slots, the last ones: every slot is written once.
    row = (accepted - rows).clamp(min=0)[:, None] + torch.arange(rows, device=key.device)
    slot = (position[:, None] + row) % window
    taken = row < accepted[:, None]
    row = row.clamp(max=max(width - 1, 0))
    for ring, new in ((key, draft.k), (value, draft.v)):
        shape = (*ring.shape[:2], rows, ring.shape[3])
        slots = slot[:, None, :, None].expand(shape)
        fresh = new.gather(2, row[:, None, :, None].expand(shape)).to(ring.dtype)
        kept = ring.gather(2, slots)
        ring.scatter_(2, slots, torch.where(taken[:, None, :, None], fresh, kept))
    valid.scatter_(1, slot, valid.gather(1, slot) | taken)
    position += accepted


@torch.no_grad()
def short_conv_commit(state: Tensor, x: Tensor, accepted: Accepted) -> None:
    """The state of `short_conv` after some of the tokens of a draft, in place.

    `short_conv(x, weight, bias, state=state)` is the draft: it leaves `state` as it is.

    Args:
        state: (N,K-1,C), the last inputs, oldest first.
        x: (N,w,C), the inputs of the draft.
        accepted: (N,) integers, how many of the w tokens each sequence keeps, from 0 to w.

    Raises:
        ValueError: shapes or values.
        TypeError: dtypes.
    """
    op = "[short_conv_commit]"
    _check_rows(op, state, 3, x=x)
    counts, _ = count_accepted(op, accepted, x.shape[0], x.shape[1], state.device)
    index = counts[:, None] + torch.arange(state.shape[1], device=state.device)
    rows = torch.cat([state, x.to(state.dtype)], 1)
    state.copy_(rows.gather(1, index[:, :, None].expand_as(state)))


@torch.no_grad()
def linear_recurrence_commit(state: Tensor, a: Tensor, b: Tensor, accepted: Accepted) -> None:
    """h of `linear_recurrence` after some of the tokens of a draft, in place.

    `linear_recurrence(a, b, h0=state)` is the draft: it leaves `state` as it is.

    Args:
        state: (N,C) float32 (float64 for float64 inputs), h before the draft.
        a: (N,w,C), that of the draft.
        b: (N,w,C), that of the draft.
        accepted: (N,) integers, how many of the w tokens each sequence keeps, from 0 to w.

    Raises:
        ValueError: shapes or values.
        TypeError: dtypes.
    """
    op = "[linear_recurrence_commit]"
    _check_rows(op, state, 2, a=a, b=b)
    refused = _refused(op, state, a, accepted)[:, :, None]
    # h 1 + (-0) is h for every h, that of a negative zero included.
    a, b = a.masked_fill(refused, 1), b.masked_fill(refused, -0.0)
    state.copy_(_mixer_ops.linear_recurrence(a, b, None, state.clone(), False)[1])


@torch.no_grad()
def rg_lru_commit(
    state: Tensor,
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    accepted: Accepted,
    *,
    fresh: Tensor | None = None,
) -> None:
    """h of `rg_lru` after some of the tokens of a draft, in place.

    `rg_lru(x, gate_a, gate_x, log_lambda, h0=state, fresh=fresh)` is the draft: it leaves `state`
    as it is.

    Args:
        state: (N,C) float32 (float64 for float64 inputs), h before the draft.
        x: (N,w,C), that of the draft, as are the gates.
        gate_a: (N,w,C).
        gate_x: (N,w,C).
        log_lambda: (C,).
        accepted: (N,) integers, how many of the w tokens each sequence keeps, from 0 to w.
        fresh: (N,) bool, true for a sequence without a token before the draft; left as it is.

    Raises:
        ValueError: shapes or values.
        TypeError: dtypes.
    """
    op = "[rg_lru_commit]"
    _check_rows(op, state, 2, x=x, gate_a=gate_a, gate_x=gate_x)
    check_tensors("rg_lru_commit", {"state": state, "log_lambda": log_lambda}, fresh=fresh)
    kept = ~_refused(op, state, x, accepted)
    after = _mixer_ops.rg_lru(
        x, gate_a, gate_x, log_lambda, kept, None, state.clone(), fresh, False
    )
    state.copy_(after[1])


def _refused(op: str, state: Tensor, x: Tensor, accepted: Accepted) -> Tensor:
    """(N,w), the tokens that are not accepted."""
    counts, _ = count_accepted(op, accepted, x.shape[0], x.shape[1], state.device)
    return torch.arange(x.shape[1], device=state.device) >= counts[:, None]


def _check_rows(op: str, state: Tensor, rank: int, **rows: Tensor) -> None:
    """`state` has `rank` dimensions, and every x is (N,w,C) with its N and C, and the first's w."""
    check_tensors(op.strip("[]"), {"state": state, **rows})
    if state.dim() != rank:
        raise ValueError(f"{op} state has shape {tuple(state.shape)}, expected {rank} dimensions")
    width = next(iter(rows.values())).shape[1:2]
    for label, x in rows.items():
        expected = (state.shape[0], *(width or ("w",)), state.shape[-1])
        if tuple(x.shape) != expected:
            raise ValueError(f"{op} {label} has shape {tuple(x.shape)}, expected {expected}")
