# SPDX-License-Identifier: Apache-2.0
"""Which tokens of which sequences each rank holds."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_cu_seqlens, check_type
from .._sharding import known_lengths
from ._exchange import Ranks


class Segment(NamedTuple):
    """Tokens begin..end of sequence `sequence`, in the numbering of all ranks together."""

    sequence: int
    begin: int
    end: int


class Part(NamedTuple):
    """Tokens of this rank for one call: of one sequence, or packed with `borders` between several.

    sequences: their numbers, none on a rank without tokens.
    first, last: whether the rank's first (last) token is among them.
    """

    tokens: slice
    borders: Tensor | None
    sequences: Sequence[int]
    first: bool
    last: bool


class Sharing(NamedTuple):
    """Which ranks hold parts of the sequences that this rank has pieces of.

    pieces: the tokens of this rank by sequence, at least one piece.
    sequences: the number of each piece's sequence.
    before, behind: of every rank, the earlier (later) ones with a part of its first (last) piece's
        sequence.
    several: of every rank, whether its first and last piece are two.
    """

    pieces: Sequence[slice]
    sequences: Sequence[int]
    before: Sequence[range]
    behind: Sequence[range]
    several: Sequence[bool]

    def parts(self, *, first: bool, last: bool) -> list[Part]:
        """This rank's tokens in as few parts as leave the first (last) piece alone."""
        count = len(self.pieces)
        cuts = sorted({0, count} | ({1} if first else set()) | ({count - 1} if last else set()))
        return [self._part(i, j) for i, j in pairwise(cuts)]

    def _part(self, i: int, j: int) -> Part:
        start = self.pieces[i].start
        borders = [0, *(piece.stop - start for piece in self.pieces[i:j])]
        return Part(
            slice(start, start + borders[-1]),
            None if j == i + 1 else torch.tensor(borders),
            self.sequences[i:j],
            i == 0,
            j == len(self.pieces),
        )


def one_sequence(ranks: Ranks, tokens: int) -> Sharing:
    """All ranks hold a part of one sequence, of whatever length."""
    return Sharing(
        [slice(0, tokens)],
        [0],
        [range(rank) for rank in range(ranks.size)],
        [range(rank + 1, ranks.size) for rank in range(ranks.size)],
        [False] * ranks.size,
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tokens of every rank, and the borders of the N sequences that they form together.

    Sequences of a batch have the same borders: to the layout they are one.
    """

    rank: int
    lengths: tuple[int, ...]
    borders: tuple[int, ...]

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The first token of every rank, and the end."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def segments(self) -> list[list[Segment]]:
        """Of every rank: what it holds of each sequence, without empty pieces."""
        return [self._cut(first, end) for first, end in pairwise(self.firsts)]

    @property
    def own(self) -> list[Segment]:
        """The segments of this rank."""
        return self.segments[self.rank]

    @property
    def first(self) -> int:
        """The first token of this rank."""
        return self.firsts[self.rank]

    def sharing(self) -> Sharing:
        """Who has parts of the same sequences."""
        pieces = [slice(s.begin - self.first, s.end - self.first) for s in self.own]
        return Sharing(
            pieces or [slice(0, 0)],
            [segment.sequence for segment in self.own],
            self.before,
            self.behind,
            [len(segments) > 1 for segments in self.segments],
        )

    @cached_property
    def before(self) -> list[range]:
        """Of every rank: those before it that hold a part of the sequence it begins with."""
        return [
            range(self._holder(self.borders[own[0].sequence]), rank) if own else range(0)
            for rank, own in enumerate(self.segments)
        ]

    @cached_property
    def behind(self) -> list[range]:
        """Of every rank: those behind it that hold a part of the sequence it ends with."""
        return [
            range(rank + 1, self._holder(self.borders[own[-1].sequence + 1] - 1) + 1)
            if own
            else range(0)
            for rank, own in enumerate(self.segments)
        ]

    def around(self, rank: int, left: int, right: int) -> tuple[int, int]:
        """The tokens that a rank needs: its own, and up to `left` before and `right` behind them
        of the same sequences."""
        own = self.segments[rank]
        if not own:
            return self.firsts[rank], self.firsts[rank]
        return (
            max(self.borders[own[0].sequence], own[0].begin - left),
            min(self.borders[own[-1].sequence + 1], own[-1].end + right),
        )

    def _holder(self, token: int) -> int:
        """The rank of a token."""
        return bisect_right(self.firsts, token) - 1

    def _cut(self, first: int, end: int) -> list[Segment]:
        segments = []
        sequence = bisect_right(self.borders, first) - 1
        while first < end:
            stop = min(self.borders[sequence + 1], end)
            if first < stop:
                segments.append(Segment(sequence, first, stop))
            first, sequence = stop, sequence + 1
        return segments


def make_layout(
    op: str,
    ranks: Ranks,
    x: Tensor,
    tokens: int,
    cu_seqlens: Tensor | None,
    lengths: Sequence[int] | None,
) -> Layout:
    """The layout of a call with `tokens` tokens here; gathers the others' where not known.

    Raises:
        ValueError: lengths or borders that do not fit.
    """
    if lengths is None:
        lengths = known_lengths()
    if lengths is None:
        gathered = ranks.gather_numbers(op, (tokens, x.shape[0]), x.device)
        lengths = [row[0] for row in gathered]
        batches = {row[1] for row in gathered}
        if len(batches) > 1:
            raise ValueError(f"[{op}] ranks have batches of {sorted(batches)}, expected one size")
    lengths = tuple(int(length) for length in lengths)
    if len(lengths) != ranks.size or lengths[ranks.rank] != tokens or min(lengths) < 0:
        raise ValueError(
            f"[{op}] lengths are {lengths} with {tokens} tokens on rank {ranks.rank}, expected the "
            f"tokens of each of {ranks.size} ranks"
        )
    return _layout(ranks.rank, lengths, _borders(op, x.shape[0], sum(lengths), cu_seqlens))


def refuse_states(op: str, **given: object) -> None:
    """Raises ValueError for what a sharded operator does not take."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(
                f"[{op}] got {name} on sharded sequences, expected none: every rank would need the "
                "tokens of others"
            )


# The layers of a model ask for the same one.
_layout = lru_cache(maxsize=16)(Layout)


def _borders(op: str, batch: int, total: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    if cu_seqlens is None:
        return (0, total)
    check_type(op, "cu_seqlens", cu_seqlens, Tensor)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"[{op}] cu_seqlens has dtype {cu_seqlens.dtype}, expected torch.int32 or torch.int64"
        )
    check_cu_seqlens(op, cu_seqlens)
    if batch != 1:
        raise ValueError(f"[{op}] got cu_seqlens with a batch of {batch}, expected 1")
    borders = tuple(cu_seqlens.tolist())
    if borders[:1] != (0,) or borders[-1] != total or list(borders) != sorted(borders):
        raise ValueError(
            f"[{op}] cu_seqlens is {borders}, expected to rise from 0 to the {total} tokens of all "
            "ranks"
        )
    return borders
