# SPDX-License-Identifier: Apache-2.0
"""This rank's part of what all ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ._exchange import Ranks


def shard_sequence(
    x: Tensor,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    dim: int,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """This rank's tokens of a tensor that every rank has whole: a view, without communication.

    Args:
        x: any shape, with the tokens in dimension `dim`.
        group: as in `context_parallel`.
        lengths: tokens of every rank; None: as equal as they can be, the longer ones first.

    Raises:
        ValueError: lengths that are not those of x; and as `context_parallel` of the group.
    """
    op = "shard_sequence"
    ranks = Ranks(op, group)
    tokens = x.shape[dim]
    if lengths is None:
        lengths = [tokens // ranks.size + (r < tokens % ranks.size) for r in range(ranks.size)]
    if len(lengths) != ranks.size or min(lengths) < 0 or sum(lengths) != tokens:
        raise ValueError(
            f"[{op}] lengths are {tuple(lengths)}, expected those of {ranks.size} ranks that add "
            f"up to {tokens} tokens"
        )
    first = list(accumulate(lengths, initial=0))[ranks.rank]
    return x.narrow(dim, first, lengths[ranks.rank])
