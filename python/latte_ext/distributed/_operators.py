# SPDX-License-Identifier: Apache-2.0
"""The operators of one rank's tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import latte_ext

from .._sharding import known_lengths, whole
from ..nn.operators import Operators
from ..rotary import positions as positions_of_whole
from ._convolution import short_conv
from ._exchange import Ranks, gather
from ._latent import latent_attention
from ._layout import make_layout
from ._recurrence import linear_recurrence, rg_lru
from ._window import macchiato_attention, sliding_window_attention

# By name: what a rank computes in the place of an operator of latte_ext.
SHARDED: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        latent_attention,
        linear_recurrence,
        macchiato_attention,
        rg_lru,
        short_conv,
        sliding_window_attention,
    )
}


def shard_operator(name: str, ranks: Ranks) -> Callable[..., Any]:
    """The operator of that name over the tokens of one rank."""
    sharded = SHARDED[name]

    @functools.wraps(getattr(latte_ext, name))
    def call(*args: Any, lengths: Any = None, **options: Any) -> Any:
        if lengths is None:
            lengths = known_lengths()
        with whole():
            return sharded(ranks, *args, lengths=lengths, **options)

    return call


def shard_operators(ranks: Ranks) -> Operators:
    """What the layers of `latte_ext.nn` need."""
    return Operators(
        **{
            name: shard_operator(name, ranks)
            for name in ("latent_attention", "macchiato_attention", "rg_lru", "short_conv")
        },
        positions=functools.partial(_positions, ranks),
        sum_before=functools.partial(_sum_before, ranks),
        sum_of_parts=functools.partial(_sum_of_parts, ranks),
    )


def _positions(
    ranks: Ranks,
    tokens: int,
    *,
    offset: int | Tensor,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """`latte_ext.rotary.positions` of this rank's tokens in their sequences."""
    # As a batch of one: positions are those of every row.
    row = torch.empty(1, tokens, device=device)
    first = make_layout("positions", ranks, row, tokens, cu_seqlens, None).first
    if cu_seqlens is None:
        return positions_of_whole(tokens, offset=offset + first, device=device)
    borders = (cu_seqlens - first).clamp(0, tokens)
    skipped = (first - cu_seqlens[:-1]).clamp(min=0).to(torch.int64)
    return positions_of_whole(tokens, offset=offset + skipped, cu_seqlens=borders, device=device)


def _sum_before(ranks: Ranks, x: Tensor) -> Tensor:
    """The sum of x over the ranks before this one."""
    return _gather_all(ranks, x)[: ranks.rank].sum(0)


def _sum_of_parts(ranks: Ranks, x: Tensor) -> Tensor:
    """The sum of x over all ranks."""
    return _gather_all(ranks, x).sum(0)


def _gather_all(ranks: Ranks, x: Tensor) -> Tensor:
    """x of every rank, (ranks, ...)."""
    everyone = [range(ranks.size)] * ranks.size
    return gather("context_parallel", x.flatten(), ranks, everyone).view(ranks.size, *x.shape)
