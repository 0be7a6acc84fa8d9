# SPDX-License-Identifier: Apache-2.0
"""The states of latent attention that ranks tell each other of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference import StateTensors
from ._exchange import Ranks, Sources, gather
from ._layout import Sharing


class Summaries(NamedTuple):
    """States of S pieces of each rank: (ranks, S, N, Hk, L) and (ranks, S, N, Hk, L, D)."""

    max: Tensor
    norm: Tensor
    mean: Tensor

    def merge(self, start: StateTensors, *chosen: tuple[range, int]) -> StateTensors:
        """`start` merged with the states of pieces (ranks, number), in the order given."""
        parts = [[x[None] for x in start]]
        parts += [[x[ranks.start : ranks.stop, s] for x in self] for ranks, s in chosen]
        return reference.merge_all(*(torch.cat(xs) for xs in zip(*parts, strict=True)))


def exchange(op: str, ranks: Ranks, own: Sequence[StateTensors], sources: Sources) -> Summaries:
    """The states of every rank by one all-gather of 2L + L D numbers per head and piece."""
    shapes = [x.shape for x in own[0]]
    rows = torch.cat([x.flatten() for state in own for x in state])
    parts = gather(op, rows, ranks, sources).view(ranks.size, len(own), -1)
    max_, norm, mean = (
        x.reshape(ranks.size, len(own), *shape)
        for x, shape in zip(parts.split([s.numel() for s in shapes], dim=2), shapes, strict=True)
    )
    return Summaries(max_, norm, mean)


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
    sources = [range(ranks.size)] * ranks.size if total else sharing.before
    states = exchange(op, ranks, [own], sources)
    before = states.merge(start, (sharing.before[ranks.rank], 0))
    return before, states.merge(start, (range(ranks.size), 0)) if total else None


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
    pieces, rank = sharing.pieces, ranks.rank
    own = [_summary(pieces[0], k, v, scale, key_mask)]
    if packed:
        # Of equal size on every rank, though one with a single piece has nothing to add.
        last = pieces[-1] if sharing.several[rank] else slice(0, 0)
        own.append(_summary(last, k, v, scale, key_mask))
    before, behind = sharing.before, sharing.behind
    sources = [
        range(before[r].start if before[r] else r, behind[r].stop if behind[r] else r + 1)
        for r in range(ranks.size)
    ]
    states = exchange(op, ranks, own, sources)
    start = reference.empty_state(
        k.shape[0], k.shape[1], k.shape[3], v.shape[3], device=k.device, dtype=own[0][0].dtype
    )
    # A sequence that began on a rank with several pieces is in the last of them.
    earlier, itself, later = before[rank], range(rank, rank + 1), behind[rank]
    first = range(earlier.start, earlier.start + len(earlier[:1]))
    chosen = [
        (first, 1 if first and sharing.several[first.start] else 0),
        (range(first.stop, earlier.stop), 0),
        (itself, 0),
    ]
    if not sharing.several[rank]:
        return [states.merge(start, *chosen, (later, 0))]
    return [states.merge(start, *chosen), states.merge(start, (itself, 1), (later, 0))]


def _summary(
    piece: slice, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None
) -> StateTensors:
    mask = None if key_mask is None else key_mask[:, piece]
    return reference.summary(k[:, :, piece], v[:, :, piece], scale=scale, key_mask=mask)
