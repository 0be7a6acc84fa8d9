# SPDX-License-Identifier: Apache-2.0
"""The states of latent attention that ranks tell each other of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..reference import StateTensors
from ._exchange import Ranks
from ._layout import Sharing
from ._summary import summarise

# What one result is merged of: pieces by the ranks that hold them and their number there.
Chosen = Sequence[tuple[range, int]]


def incoming(
    op: str,
    ranks: Ranks,
    sharing: Sharing,
    k: Tensor,
    v: Tensor,
    start: StateTensors,
    *,
    scale: float,
    key_mask: Tensor | None,
    total: bool,
) -> tuple[StateTensors, StateTensors | None]:
    """The state before this rank's first token.

    Args:
        start: of the first piece's sequence, before its first token on any rank.
        total: also return the state after the last token of all ranks, which then hold parts of
            one sequence.
    """
    own = _summary(sharing.pieces[-1], k, v, scale, key_mask)
    reads: list[list[Chosen]] = [[[(earlier, 0)]] for earlier in sharing.before]
    if total:
        reads = [[*chosen, [(range(ranks.size), 0)]] for chosen in reads]
    merged = [reference.merge(start, others) for others in _exchange(op, ranks, [own], reads)]
    return merged[0], merged[1] if total else None


def border_states(
    op: str,
    ranks: Ranks,
    sharing: Sharing,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None,
    packed: bool,
) -> list[StateTensors]:
    """The whole sequences' states of the first and, if it is another one, the last piece."""
    own = [_summary(sharing.pieces[0], k, v, scale, key_mask)]
    if packed:
        # As many from every rank, though one with a single piece has nothing to add.
        last = sharing.pieces[-1] if sharing.several[ranks.rank] else slice(0, 0)
        own.append(_summary(last, k, v, scale, key_mask))
    return _exchange(op, ranks, own, [_border_reads(sharing, r) for r in range(ranks.size)])


def _border_reads(sharing: Sharing, rank: int) -> list[Chosen]:
    earlier, itself, later = sharing.before[rank], range(rank, rank + 1), sharing.behind[rank]
    # A sequence that began on a rank with several pieces is the last of them there.
    first = earlier[:1]
    begun = 1 if first and sharing.several[first.start] else 0
    head: Chosen = [(first, begun), (earlier[1:], 0), (itself, 0)]
    if not sharing.several[rank]:
        return [[*head, (later, 0)]]
    return [head, [(itself, 1), (later, 0)]]


def _summary(
    piece: slice, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None
) -> StateTensors:
    mask = None if key_mask is None else key_mask[:, piece]
    return summarise(k[:, :, piece], v[:, :, piece], scale=scale, key_mask=mask)


def _exchange(
    op: str, ranks: Ranks, own: Sequence[StateTensors], reads: Sequence[Sequence[Chosen]]
) -> list[StateTensors]:
    """This rank's merged states, by one all-gather of 2L + L D numbers per head and piece.

    Args:
        own: the states of this rank's pieces.
        reads: of every rank, what each of its results is merged of.

    Returns:
        States of which every rank must use all, also those of nothing, as in `gather`.
    """
    stacked = (torch.stack(tensors) for tensors in zip(*own, strict=True))
    flat: tuple[Tensor, ...] = _Merge.apply(*stacked, op, ranks, reads)  # type: ignore[no-untyped-call]
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


class _Merge(torch.autograd.Function):
    """Merged states of others, with a gradient that keeps this rank's own and the merged ones only.

    A merged state's (norm, mean) is a sum over pieces j, with f_j = exp(max_j - max) <= 1,

        norm = sum_j f_j norm_j        mean = sum_j f_j norm_j mean_j / norm

    so what a reader tells piece j of is the same for all j: max, b = d_mean / norm and
    a = d_norm - b . mean, from which d_norm_j = f_j (a + b . mean_j), d_mean_j = f_j norm_j b.
    """

    @staticmethod
    def forward(
        ctx: Any,
        max: Tensor,
        norm: Tensor,
        mean: Tensor,
        op: str,
        ranks: Ranks,
        reads: Sequence[Sequence[Chosen]],
    ) -> tuple[Tensor, ...]:
        ctx.op, ctx.ranks, ctx.reads = op, ranks, reads
        row = torch.cat([x.flatten(1) for x in (max, norm, mean)], dim=1).flatten()
        rows = row.new_empty(ranks.size * row.numel())
        ranks.all_gather(op, rows, row)
        parts = _unpack(rows.view(ranks.size, max.shape[0], -1), mean)
        nothing = reference.empty_state(*mean.shape[1:], device=mean.device, dtype=mean.dtype)
        merged: list[Tensor] = []
        for chosen in reads[ranks.rank]:
            pieces = [[x[r.start : r.stop, number] for x in parts] for r, number in chosen]
            joined = zip([x[None] for x in nothing], *pieces, strict=True)
            merged += reference.merge_all(*(torch.cat(xs) for xs in joined))
        ctx.save_for_backward(max, norm, mean, *merged)
        ctx.mark_non_differentiable(*merged[::3])
        return tuple(merged)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        max, norm, mean, *merged = ctx.saved_tensors
        ranks, reads = ctx.ranks, ctx.reads
        told = [
            _told(merged[i], merged[i + 1], merged[i + 2], grads[i + 1], grads[i + 2])
            for i in range(0, len(merged), 3)
        ]
        readers = [[n for c in read if (n := _piece_of(ranks.rank, c)) >= 0] for read in reads]
        received = _send_back(ctx.op, ranks, told, reads[ranks.rank], readers)
        numbers = torch.tensor([n for reader in readers for n in reader], device=max.device)
        top, a, b = (x[:, 0] for x in _unpack(received.unsqueeze(1), mean))
        d_norm, d_mean = torch.zeros_like(norm), torch.zeros_like(mean)
        for n in range(norm.shape[0]):
            of_piece = numbers == n
            factor = torch.where(norm[n] == 0, 0, torch.exp(max[n] - top[of_piece]))
            from_mean = (b[of_piece] * mean[n]).sum(-1)
            d_norm[n] = (factor * (a[of_piece] + from_mean)).sum(0)
            d_mean[n] = ((factor * norm[n]).unsqueeze(-1) * b[of_piece]).sum(0)
        return None, d_norm, d_mean, None, None, None


def _send_back(
    op: str,
    ranks: Ranks,
    told: Sequence[Tensor],
    read: Sequence[Chosen],
    readers: Sequence[Sequence[int]],
) -> Tensor:
    """What the readers of this rank's pieces tell (readers, C), in the order of ranks.

    Args:
        told: of each of this rank's results (C,), for all that it read in it.
        read: what each of its results was merged of.
        readers: of every rank, the numbers of this rank's pieces that it tells of.
    """
    rows = [
        [row for row, chosen in zip(told, read, strict=True) if _piece_of(other, chosen) >= 0]
        for other in range(ranks.size)
    ]
    width = told[0].numel()
    counts = [[width * len(side) for side in sides] for sides in (readers, rows)]
    sent = torch.cat([told[0][:0], *(row for other in rows for row in other)])
    received = sent.new_empty(sum(counts[0]))
    ranks.call(op, dist.all_to_all_single, received, sent, *counts)
    return received.view(-1, width)


def _piece_of(rank: int, chosen: Chosen) -> int:
    """The number of a rank's piece among the chosen ones, -1 if there is none."""
    return next((number for ranks, number in chosen if rank in ranks), -1)


def _told(max: Tensor, norm: Tensor, mean: Tensor, d_norm: Tensor, d_mean: Tensor) -> Tensor:
    """What a reader tells of a merged state's gradient, 2L + L D numbers per head."""
    b = d_mean / torch.where(norm == 0, 1, norm).unsqueeze(-1)
    a = d_norm - (b * mean).sum(-1)
    return torch.cat([x.flatten() for x in (max, a, b)])


def _unpack(rows: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max, norm (ranks, S, N, Hk, L) and mean (ranks, S, N, Hk, L, D) from rows (ranks, S, C)."""
    shape = mean.shape[1:]
    size = math.prod(shape[:3])
    max_, norm, mean = rows.split([size, size, size * shape[3]], dim=2)
    return max_.unflatten(2, shape[:3]), norm.unflatten(2, shape[:3]), mean.unflatten(2, shape)
