# SPDX-License-Identifier: Apache-2.0
"""The tokens next to a rank's own, from as many neighbours as hold them."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._exchange import Ranks
from ._layout import Layout, Part


class Halo(NamedTuple):
    """One tensor's tokens before and behind those of a rank, in dimension `dim`."""

    before: Tensor
    behind: Tensor
    dim: int

    def of(self, part: Part) -> Halo:
        """What belongs to the sequences of a part: nothing, but at the rank's first and last token.

        Empty slices keep the collective within the graph."""
        before = self.before if part.first else self.before.narrow(self.dim, 0, 0)
        behind = self.behind if part.last else self.behind.narrow(self.dim, 0, 0)
        return Halo(before, behind, self.dim)


def exchange_halos(
    op: str,
    ranks: Ranks,
    layout: Layout,
    tensors: list[Tensor],
    dims: list[int],
    *,
    left: int,
    right: int,
) -> list[Halo]:
    """Up to `left` tokens before and `right` behind this rank's, of the same sequences.

    Args:
        tensors: with the tokens of this rank in dimension `dims`; sent in their common dtype.

    Returns:
        What there is, one `Halo` for each tensor. Gradients go back by one all-to-all. Both parts
        must be read on every rank, also where they are empty, as in `gather`.
    """
    moved = [x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)]
    dtype = moved[0].dtype
    for x in moved:
        dtype = torch.promote_types(dtype, x.dtype)
    rows = torch.cat([x.flatten(1).to(dtype) for x in moved], dim=1)
    plan = _plan(layout, left, right)
    received = _Exchange.apply(rows, op, ranks, plan)  # type: ignore[no-untyped-call]
    halos = []
    widths = [math.prod(x.shape[1:]) for x in moved]
    sides = received.split([plan.before, received.shape[0] - plan.before])
    columns = zip(*(side.split(widths, 1) for side in sides), strict=True)
    for x, dim, parts in zip(moved, dims, columns, strict=True):
        before, behind = (p.unflatten(1, x.shape[1:]).movedim(0, dim).to(x.dtype) for p in parts)
        halos.append(Halo(before, behind, dim))
    return halos


class _Plan(NamedTuple):
    """sent[r], received[r]: tokens of this rank that go to rank r, how many come from it; `before`
    of them lie before its own."""

    sent: list[slice]
    received: list[int]
    before: int


def _plan(layout: Layout, left: int, right: int) -> _Plan:
    firsts, rank = layout.firsts, layout.rank

    def shared(holder: int, reader: int) -> tuple[int, int]:
        begin, end = layout.around(reader, left, right)
        begin, end = max(begin, firsts[holder]), min(end, firsts[holder + 1])
        return (begin, max(begin, end)) if holder != reader else (firsts[holder], firsts[holder])

    others = range(len(layout.lengths))
    sent = [slice(*(token - layout.first for token in shared(rank, other))) for other in others]
    received = [end - begin for begin, end in (shared(other, rank) for other in others)]
    return _Plan(sent, received, sum(received[:rank]))


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, op: str, ranks: Ranks, plan: _Plan) -> Tensor:
        ctx.op, ctx.ranks, ctx.plan, ctx.tokens = op, ranks, plan, rows.shape[0]
        sent = torch.cat([rows[piece] for piece in plan.sent])
        received = rows.new_empty(sum(plan.received), rows.shape[1])
        counts = [piece.stop - piece.start for piece in plan.sent]
        ranks.call(op, dist.all_to_all_single, received, sent, plan.received, counts)
        return received

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        plan, ranks = ctx.plan, ctx.ranks
        counts = [piece.stop - piece.start for piece in plan.sent]
        returned = grad.new_empty(sum(counts), grad.shape[1])
        ranks.call(
            ctx.op, dist.all_to_all_single, returned, grad.contiguous(), counts, plan.received
        )
        rows = grad.new_zeros(ctx.tokens, grad.shape[1])
        for piece, end in zip(plan.sent, accumulate(counts), strict=True):
            rows[piece] += returned[end - (piece.stop - piece.start) : end]
        return rows, None, None, None
