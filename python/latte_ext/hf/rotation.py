# SPDX-License-Identifier: Apache-2.0
"""How a pretrained layer rotates its queries and keys, found by asking it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rotary import rotate


class Rotation(NamedTuple):
    """Angles per position of the pairs of channels, and which channels are a pair."""

    rates: tuple[float, ...]
    interleaved: bool

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """x (B,heads,T,D), rotated by so many positions, (B,T) or (1,T)."""
        rates = torch.tensor(self.rates, dtype=torch.float64, device=x.device)
        by = by[0] if by.shape[0] == 1 else by
        return rotate(x, by, rates=rates, interleaved=self.interleaved, dim=2 * len(self.rates))

    def to_dict(self) -> dict[str, Any]:
        return {"rates": list(self.rates), "interleaved": self.interleaved}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Rotation:
        return cls(tuple(data["rates"]), bool(data["interleaved"]))


def find_rotation(start: Tensor, turned: Tensor, cos: Tensor, sin: Tensor) -> Rotation | None:
    """The rotation that takes `start` (B,heads,1,D), a query at position 0, to `turned`, the same
    query at position 1, whose embedding is cos, sin (1,1,d); None: there is none.

    Raises:
        ValueError: no known rotation does.
    """
    if torch.equal(start, turned):
        return None
    # Queries of half precision are rounded after their rotation.
    tolerance = max(1e-4, 4 * torch.finfo(turned.dtype).eps)
    start, turned = start.float(), turned.float()
    # Of one period: the angle of a pair at position 1 is its rate, which is at most 1.
    angle = torch.atan2(sin.double(), cos.double()).flatten()
    half = angle.shape[0] // 2
    by = torch.ones(1, 1, dtype=torch.int64)
    for rates, interleaved in ((angle[:half], False), (angle[::2], True), (angle[:half], True)):
        rotation = Rotation(tuple(rates.tolist()), interleaved)
        error = (rotation.turn(start, by) - turned).abs().max()
        if error <= tolerance * turned.abs().max():
            return rotation
    raise ValueError(
        "[convert] the rotary embedding is of a kind that is not known, expected one that turns "
        "pairs of channels by position times a constant; sinks=0 and features='hidden' do without"
    )
