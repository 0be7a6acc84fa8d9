# SPDX-License-Identifier: Apache-2.0
"""`context_parallel`: operators and modules over sequences that are sharded over ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import latte_ext

from .._sharding import known_lengths, sharded
from ..nn import (
    RGLRU,
    LatentAttention,
    LatteBlock,
    LatteEncoder,
    LatteLM,
    MacchiatoAttention,
    ShortConv,
)
from ._exchange import Ranks
from ._layout import make_layout
from ._operators import SHARDED, shard_operator, shard_operators

Group = dist.ProcessGroup | DeviceMesh | None
Module = TypeVar("Module", bound=nn.Module)

_LAYERS = (LatentAttention, MacchiatoAttention, RGLRU, ShortConv, LatteEncoder)
# Modules whose first argument has the tokens in dimension 1.
_TOKENS_SECOND = (*_LAYERS, LatteBlock, LatteLM)


@overload
def context_parallel(target: Module, group: Group = ...) -> Module: ...
@overload
def context_parallel(target: Callable[..., Any], group: Group = ...) -> Callable[..., Any]: ...
def context_parallel(target: Any, group: Group = None) -> Any:
    """An operator, or a module, over sequences that are sharded over ranks (context parallelism).

    Rank r of the group holds T_r consecutive tokens of every sequence, ranks in the order of the
    sequence; T_r may differ from rank to rank and be 0. Values and gradients are those of one
    process with the whole sequences (theorem T5). A gradient is that of the sum of all ranks'
    losses; that of a tensor which all ranks have, such as a weight, is the part of this rank's
    tokens: sum it over the group.

    All ranks make the same calls in the same order, with equal batches and options, and all run
    backward, a rank with T_r = 0 or no loss of its own too.

    Traffic does not depend on T, where w is the window and K a convolution's width:

    * latent_attention: a state per head, 2L + L D numbers of the compute type, by one all-gather;
      its gradient back to earlier ranks by one all-to-all. Two states if packed and not causal.
    * linear_recurrence, rg_lru: two numbers per channel, in the same way; with a key_mask also a
      byte per sequence.
    * sliding_window_attention: w - 1 keys and values from the neighbours that have them, by one
      all-to-all, and one back.
    * short_conv: K - 1 inputs, in the same way.
    * macchiato_attention: a window's and a latent attention's.
    * all but latent_attention without cu_seqlens: the tokens of every rank, two int64 by one
      all-gather, unless they are given as `lengths` or known from the model.

    Args:
        target: one of these operators of `latte_ext`; or a module of `latte_ext.nn`, or one that
            holds some, which is changed in place, under its parameters' names. It may then be
            wrapped by DistributedDataParallel or fully_shard.
        group: a process group, a mesh of one dimension (`mesh["cp"]`), or None for all processes.

    Returns:
        For an operator, a function with its signature that takes and returns this rank's tokens,
        except: `cu_seqlens` are the borders within all ranks' tokens together, the same on every
        rank. `latent_attention` takes a `state`, that before the first rank's tokens, the same on
        every rank, and gives with `return_state` (not if packed) that after the last rank's, to
        every rank; the others take and return none, nor `sinks`. `lengths`, the tokens of every
        rank, is an additional keyword.

        For a module, the module: its forward takes and returns this rank's tokens, with cu_seqlens
        as above, and returns no cache. Within it, an operator that is not sharded raises. Replicas
        of the classifier's output are equal on all ranks.

    Raises:
        ValueError: another target, a module without layers of `latte_ext.nn`, one that is parallel
            already, a group that does not fit. What is returned raises as its target does.
        TypeError: another kind of group.
        RuntimeError: torch.distributed is not initialised; and from what is returned, where a rank
            does not take part within the group's timeout.
    """
    ranks = Ranks("context_parallel", group)
    if isinstance(target, nn.Module):
        return _shard_module(target, ranks)
    name = getattr(target, "__name__", None)
    if name not in SHARDED or target is not getattr(latte_ext, name):
        raise ValueError(
            f"[context_parallel] target is {target!r}, expected a module or one of latte_ext's "
            f"{', '.join(sorted(SHARDED))}"
        )
    return shard_operator(name, ranks)


def _shard_module(module: nn.Module, ranks: Ranks) -> nn.Module:
    layers = [layer for layer in module.modules() if isinstance(layer, _LAYERS)]
    if not layers:
        raise ValueError(
            f"[context_parallel] target is a {type(module).__name__} without layers of "
            "latte_ext.nn, expected some"
        )
    if any("operators" in vars(layer) for layer in layers):
        raise ValueError(
            f"[context_parallel] target is a {type(module).__name__} with layers that are parallel "
            "already, expected none"
        )
    operators = shard_operators(ranks)
    for layer in layers:
        layer.operators = operators
    module.forward = _within_region(module, module.forward, ranks)
    return module


def _within_region(
    module: nn.Module, forward: Callable[..., Any], ranks: Ranks
) -> Callable[..., Any]:
    """The forward pass as one sharded region, in which the ranks tell their tokens once."""

    @functools.wraps(forward)
    def call(*args: Any, **options: Any) -> Any:
        lengths = known_lengths() or ()
        if not lengths and isinstance(module, _TOKENS_SECOND) and args and args[0].dim() > 1:
            tokens, name = args[0], type(module).__name__
            layout = make_layout(name, ranks, tokens, tokens.shape[1], None, None)
            lengths = layout.lengths
        with sharded(lengths):
            return forward(*args, **options)

    return call
