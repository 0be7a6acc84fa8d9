# SPDX-License-Identifier: Apache-2.0
"""The collectives of context parallelism, with gradients: one forward, one backward.

What a backward pass sums, it sums in the order of the ranks, so that a run repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# The name until torch 2.12, which warns of it since.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """The ranks that hold the parts of a sequence, in its order.

    Args:
        op: what messages name.
        group: a process group, a mesh of one dimension, or None for all processes.

    Raises:
        TypeError: another kind of group.
        ValueError: a mesh of several dimensions, or a group that this process is not in.
        RuntimeError: torch.distributed is not initialised.
    """

    def __init__(self, op: str, group: dist.ProcessGroup | DeviceMesh | None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"[{op}] torch.distributed is not initialised, expected init_process_group() before"
            )
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    f"[{op}] group is a mesh of {group.ndim} dimensions, expected one: mesh['cp']"
                )
            group = group.get_group()
        if group is None:
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"[{op}] group is a {type(group).__name__}, expected a ProcessGroup, a DeviceMesh "
                "or None, in a process that belongs to it"
            )
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def call(self, op: str, collective: Callable[..., Any], *args: Any) -> None:
        """One collective; RuntimeError where a rank does not take part in time."""
        try:
            collective(*args, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"[{op}] {collective.__name__} over {self.size} ranks failed on rank {self.rank}, "
                "expected all of them to make the same call within the group's timeout: is one "
                f"dead, stalled, or given other shapes? ({error})"
            ) from error

    def all_gather(self, op: str, out: Tensor, own: Tensor) -> None:
        """`own` (C,) of every rank into `out` (ranks C,)."""
        self.call(op, _all_gather, out, own)

    def gather_numbers(self, op: str, numbers: Sequence[int], device: torch.device) -> list[Any]:
        """The integers of every rank, (ranks, count). Waits for the device."""
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        out = own.new_empty(self.size * len(numbers))
        self.all_gather(op, out, own)
        return out.view(self.size, -1).tolist()


# sources[r]: the ranks whose part rank r reads.
Sources = Sequence[range]


def gather(op: str, own: Tensor, ranks: Ranks, sources: Sources) -> Tensor:
    """Every rank's `own` (C,) as (ranks, C), by one all-gather.

    Gradients flow to the rank's sources only, by one all-to-all of as many parts. The result must
    be read on every rank, be it a slice of no parts: or its backward pass would wait for that rank.
    """
    parts: Tensor = _Gather.apply(own.contiguous(), op, ranks, sources)  # type: ignore[no-untyped-call]
    return parts


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, op: str, ranks: Ranks, sources: Sources) -> Tensor:
        ctx.op, ctx.ranks, ctx.sources = op, ranks, sources
        out = own.new_empty(ranks.size * own.numel())
        ranks.all_gather(op, out, own)
        return out.view(ranks.size, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        ranks, read = ctx.ranks, ctx.sources[ctx.ranks.rank]
        sent = grad[read.start : read.stop].flatten()
        readers = [rank for rank in range(ranks.size) if ranks.rank in ctx.sources[rank]]
        received = sent.new_empty(len(readers) * grad.shape[1])
        splits = [
            [grad.shape[1] if rank in group else 0 for rank in range(ranks.size)]
            for group in (readers, read)
        ]
        ranks.call(ctx.op, dist.all_to_all_single, received, sent, *splits)
        return received.view(len(readers), grad.shape[1]).sum(0), None, None, None
