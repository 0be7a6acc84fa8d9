# SPDX-License-Identifier: Apache-2.0
"""`Operators`: what layers compute with across tokens, so that sequences may lie elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..convolution import short_conv
from ..functional import latent_attention
from ..macchiato import macchiato_attention
from ..recurrence import rg_lru
from ..rotary import positions


def _nothing(x: Tensor) -> int:
    return 0


def _itself(x: Tensor) -> Tensor:
    return x


@dataclasses.dataclass(frozen=True)
class Operators:
    """All that a layer does across tokens goes through these: here, over whole sequences.

    `latte_ext.distributed.context_parallel` gives layers others, for the tokens of one rank.

    Args:
        latent_attention, macchiato_attention, rg_lru, short_conv, positions: as in `latte_ext`.
        sum_before: of x (B,...), the sum over what lies before this part of the sequence.
        sum_of_parts: of x (B,...), the sum over all parts of the sequence.
    """

    latent_attention: Callable[..., Any] = latent_attention
    macchiato_attention: Callable[..., Any] = macchiato_attention
    rg_lru: Callable[..., Any] = rg_lru
    short_conv: Callable[..., Any] = short_conv
    positions: Callable[..., Tensor] = positions
    sum_before: Callable[[Tensor], Tensor | int] = _nothing
    sum_of_parts: Callable[[Tensor], Tensor] = _itself


WHOLE = Operators()
