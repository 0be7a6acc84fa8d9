# SPDX-License-Identifier: Apache-2.0
"""`context_parallel`: operators over sequences that are sharded over ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import latte_ext

from .._sharding import region, region_lengths
from ._convolution import short_conv
from ._exchange import Ranks
from ._latent import latent_attention
from ._recurrence import linear_recurrence, rg_lru
from ._window import macchiato_attention, sliding_window_attention

_SHARDED: dict[Callable[..., Any], Callable[..., Any]] = {
    latte_ext.latent_attention: latent_attention,
    latte_ext.linear_recurrence: linear_recurrence,
    latte_ext.macchiato_attention: macchiato_attention,
    latte_ext.rg_lru: rg_lru,
    latte_ext.short_conv: short_conv,
    latte_ext.sliding_window_attention: sliding_window_attention,
}


def context_parallel(
    op: Callable[..., Any], group: dist.ProcessGroup | DeviceMesh | None = None
) -> Callable[..., Any]:
    """An operator over sequences that are sharded over ranks, token by token as over whole ones.

    Rank r of the group holds tokens o_r <= t < o_r + T_r of every sequence, in the order of ranks;
    T_r may differ from rank to rank and be 0. All ranks must make the same calls in the same
    order, with equal batches, and run backward the same number of times. The gradient of a tensor
    that all ranks have, such as a weight, is that of the rank's own tokens: sum it over the group.

    Traffic does not depend on T. Per head, `latent_attention` sends one state, 2L + L D numbers of
    the compute type, by one all-gather, and its gradient back to earlier ranks by one all-to-all
    (theorem T5 of the merge of states; bidirectional packed sequences send two).

    Args:
        op: `latte_ext.latent_attention`.
        group: a process group, a mesh of one dimension (`mesh["cp"]`), or None for all processes.

    Returns:
        A function of op's signature that takes and returns the tokens of this rank, except:
        cu_seqlens are the borders of all ranks' tokens together, on every rank; a `state` is that
        before the first rank's tokens, on every rank, and `return_state` gives each rank the state
        after the last rank's (not with cu_seqlens); and `lengths`, the tokens of every rank, saves
        the all-gather of them that cu_seqlens need otherwise.

    Raises:
        ValueError: another op, a group that does not fit; TypeError, RuntimeError: the group.
        The function raises as op does, and RuntimeError where a rank does not take part within the
        group's timeout.
    """
    sharded = _SHARDED.get(op)
    if sharded is None:
        names = ", ".join(sorted(known.__name__ for known in _SHARDED))
        raise ValueError(f"[context_parallel] op is {op!r}, expected one of {names}")
    ranks = Ranks("context_parallel", group)

    @functools.wraps(op)
    def call(*args: Any, **options: Any) -> Any:
        lengths = options.pop("lengths", None)
        if lengths is None:
            lengths = region_lengths()
        with region(None):
            return sharded(ranks, *args, lengths=lengths, **options)

    return call
