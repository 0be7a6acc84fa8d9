# SPDX-License-Identifier: Apache-2.0
"""Recurrences over sequences that are sharded over ranks.

What T tokens do to a state is h -> A h + c with A the product of their a, so a rank tells the
others (A, c), two numbers per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import Backend
from .._reference_mixers import RG_LRU_POWER
from .._register import compute_dtype
from ..recurrence import check_linear_recurrence, check_rg_lru
from ..recurrence import linear_recurrence as linear_of_whole
from ..recurrence import rg_lru as rg_lru_of_whole
from ._exchange import Ranks, gather
from ._layout import Sharing, make_layout, refuse_states


def linear_recurrence(
    ranks: Ranks,
    a: Tensor,
    b: Tensor,
    *,
    h0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    backend: Backend | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """`latte_ext.linear_recurrence` of this rank's tokens; see `context_parallel`."""
    op = "linear_recurrence"
    check_linear_recurrence(
        a, b, h0=None, cu_seqlens=None, reverse=reverse, backend=backend, shapes=True
    )
    refuse_states(op, h0=h0, return_state=return_state)
    sharing = make_layout(op, ranks, a, a.shape[1], cu_seqlens, lengths).sharing()
    dtype = b.dtype
    # Read twice: the gradients are summed before they are rounded.
    a, b = a.to(compute_dtype(a, b)), b.to(compute_dtype(a, b))

    def scan(tokens: slice, **options: Any) -> Any:
        return linear_of_whole(
            a[:, tokens], b[:, tokens], reverse=reverse, backend=backend, **options
        )

    told = sharing.pieces[0 if reverse else -1]
    zeros, one = torch.zeros_like(b[:, told]), b.new_ones(b.shape[0], b.shape[2])
    _, factor = linear_of_whole(a[:, told], zeros, h0=one, return_state=True, backend=backend)
    _, change = scan(told, return_state=True)
    start = _incoming(op, ranks, sharing, factor, change, reverse)
    return _each_part(scan, sharing, reverse, b.device, h0=start).to(dtype)


def rg_lru(
    ranks: Ranks,
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    *,
    h0: Tensor | None = None,
    fresh: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    backend: Backend | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """`latte_ext.rg_lru` of this rank's tokens; see `context_parallel`."""
    op = "rg_lru"
    check_rg_lru(
        x, gate_a, gate_x, log_lambda, h0=None, fresh=None, key_mask=key_mask, cu_seqlens=None,
        reverse=reverse, backend=backend, shapes=True,
    )  # fmt: skip
    refuse_states(op, h0=h0, fresh=fresh, return_state=return_state)
    sharing = make_layout(op, ranks, x, x.shape[1], cu_seqlens, lengths).sharing()
    dtype, wide = x.dtype, compute_dtype(x, gate_a, gate_x, log_lambda)
    # Read twice: the gradients are summed before they are rounded.
    x, gate_a, gate_x, log_lambda = (t.to(wide) for t in (x, gate_a, gate_x, log_lambda))

    def scan(tokens: slice, **options: Any) -> Any:
        mask = None if key_mask is None else key_mask[:, tokens]
        return rg_lru_of_whole(
            x[:, tokens], gate_a[:, tokens], gate_x[:, tokens], log_lambda, key_mask=mask,
            reverse=reverse, backend=backend, **options,
        )  # fmt: skip

    told = sharing.pieces[0 if reverse else -1]
    earlier = (sharing.behind if reverse else sharing.before)[ranks.rank]
    if key_mask is None:
        # The first of the earlier ranks holds the sequence's first token.
        real, started = None, torch.tensor(bool(earlier), device=x.device).expand(x.shape[0])
    else:
        real = key_mask[:, told]
        started = _any_real(op, ranks, earlier, real)
    fresh = ~started
    # A piece that others do not begin starts its sequence.
    alone = sharing.several[ranks.rank]
    empty = x.new_zeros(x.shape[0], x.shape[2])
    _, change = scan(told, h0=empty, fresh=fresh | alone, return_state=True)
    rate = torch.sigmoid(gate_a[:, told])
    if real is not None:
        rate = torch.where(real[..., None], rate, 0)
    factor = torch.exp(-RG_LRU_POWER * F.softplus(log_lambda) * rate.sum(1))
    start = _incoming(op, ranks, sharing, factor, change, reverse)
    return _each_part(scan, sharing, reverse, x.device, h0=start, fresh=fresh).to(dtype)


def _any_real(op: str, ranks: Ranks, earlier: range, real: Tensor) -> Tensor:
    """Whether the earlier ranks told of real tokens (B,), where `real` (B,T) is what this one tells
    of: the square root of a sequence's first real token is 1, whichever rank has it."""
    own = real.any(1).to(torch.uint8)
    flags = own.new_empty(ranks.size * own.shape[0])
    ranks.all_gather(op, flags, own)
    return flags.view(ranks.size, -1)[earlier.start : earlier.stop].bool().any(0)


def _incoming(
    op: str, ranks: Ranks, sharing: Sharing, factor: Tensor, change: Tensor, reverse: bool
) -> Tensor:
    """The state (B,C) before this rank's first token (behind its last one, if `reverse`)."""
    sources = sharing.behind if reverse else sharing.before
    parts = gather(op, torch.stack([factor, change]).flatten(), ranks, sources)
    earlier = sources[ranks.rank]
    parts = parts[earlier.start : earlier.stop].view(-1, 2, *factor.shape)
    # The recurrence over ranks instead of tokens.
    factors, changes = parts.movedim(0, 2).unbind(0)
    _, state = linear_of_whole(factors, changes, reverse=reverse, return_state=True)
    return state


def _each_part(
    scan: Callable[..., Tensor],
    sharing: Sharing,
    reverse: bool,
    device: torch.device,
    **incoming: Tensor,
) -> Tensor:
    """The scan of all of this rank's pieces, the one that others began from what came in."""
    rows = []
    for part in sharing.parts(first=not reverse, last=reverse):
        if part.last if reverse else part.first:
            rows.append(scan(part.tokens, **incoming))
        else:
            borders = None if part.borders is None else part.borders.to(device)
            rows.append(scan(part.tokens, cu_seqlens=borders))
    return torch.cat(rows, 1)
