# SPDX-License-Identifier: Apache-2.0
"""The first tokens of each sequence, which stay visible when they have left the window.

Notation: N sequences, T tokens, Hk key/value heads, D channels per head, n sinks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The index of a sink that its sequence does not have yet: no token stands a window behind it.
_ABSENT = 2**62


class Sinks(NamedTuple):
    """Keys and values of the first n real tokens of N sequences.

    Args:
        key: (N,Hk,n,D), rotated by their own positions. value: (N,Hk,n,D).
        place: (N,n) int64, their places in the sequence, padding included.
    """

    key: Tensor
    value: Tensor
    place: Tensor

    @classmethod
    def empty(cls, batch: int, count: int, k: Tensor, v: Tensor) -> Sinks:
        """None yet, for keys like k and values like v."""
        shape = (batch, k.shape[1], count)
        return cls(
            k.new_zeros(*shape, k.shape[3]),
            v.new_zeros(*shape, v.shape[3]),
            torch.full((batch, count), _ABSENT, dtype=torch.int64, device=k.device),
        )

    def clone(self) -> Sinks:
        return Sinks(*(x.clone() for x in self))

    def select(self, index: Tensor) -> Sinks:
        return Sinks(*(x[index] for x in self))

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self)

    def extended(self, k: Tensor, v: Tensor, key_mask: Tensor | None, start: int) -> Sinks:
        """With those of the tokens k, v (N,Hk,T,D) from place `start` on that are still wanted."""
        count = self.place.shape[1]
        if start >= count and bool((self.place < _ABSENT).all()):
            return self
        if key_mask is None:
            key_mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        have = (self.place < _ABSENT).sum(1, keepdim=True)
        rank = torch.where(key_mask, have + key_mask.cumsum(1) - 1, count)
        # (N,n,T): the token that is sink j of its sequence, if there is one.
        chosen = rank[:, None] == torch.arange(count, device=k.device)[:, None]
        found = chosen.any(2)
        row = chosen.to(torch.uint8).argmax(2)
        rows = row[:, None, :, None]

        def pick(new: Tensor, old: Tensor) -> Tensor:
            taken = new.gather(2, rows.expand(-1, new.shape[1], -1, new.shape[3]))
            return torch.where(found[:, None, :, None], taken, old)

        return Sinks(
            pick(k, self.key), pick(v, self.value), torch.where(found, row + start, self.place)
        )


def first_of_packed(k: Tensor, v: Tensor, cu_seqlens: Tensor, count: int) -> Sinks:
    """The sinks of N sequences packed along T, k and v (1,Hk,T,D)."""
    borders = cu_seqlens.to(torch.int64)
    index = torch.arange(count, device=k.device).expand(borders.shape[0] - 1, -1)
    present = index < borders.diff()[:, None]
    place = torch.where(present, borders[:-1, None] + index, 0)
    return Sinks(
        k[0][:, place].transpose(0, 1),
        v[0][:, place].transpose(0, 1),
        torch.where(present, index, _ABSENT),
    )
