# SPDX-License-Identifier: Apache-2.0
"""How torch.func.vmap runs an operator: the mapped dimension becomes part of one that the operator
takes independently (sequences, heads or channels), so that a map is one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Fold(NamedTuple):
    """Into which dimension of every tensor, an argument or a result, the mapped one goes.

    Args:
        axis: that dimension, counted without the mapped one.
        exceptions: other axes, by name.
        shared: arguments without such a dimension: these must not be mapped themselves.
        packed: whether that works with cu_seqlens.
    """

    axis: int
    exceptions: Mapping[str, int] = {}
    shared: frozenset[str] = frozenset()
    packed: bool = True


_SHARED = frozenset({"key_mask", "latent_mask", "cu_seqlens", "start", "sink_position", "fresh"})
_SEQUENCES = Fold(0, packed=False)
_CHANNELS = Fold(-1, {"weight": 0, "d_weight": 0}, _SHARED)

ATTENTION = (_SEQUENCES, Fold(1, shared=_SHARED))
RECURRENCE = (_SEQUENCES, _CHANNELS)
CHANNELS = (_CHANNELS,)
ROTATION = (Fold(1, shared=frozenset({"position", "rates"})),)

Rule = Callable[..., tuple[Any, Any]]


def rule(operator: Any, folds: Sequence[Fold]) -> Rule:
    """The vmap rule of an operator: the first fold that fits, otherwise one call per element."""
    arguments = operator._schema.arguments
    names = [argument.name for argument in arguments]
    written = [
        i for i, x in enumerate(arguments) if x.alias_info is not None and x.alias_info.is_write
    ]
    results = [result.name for result in operator._schema.returns]
    op = operator._schema.name.partition("::")[2]

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        for i in written:
            if isinstance(args[i], Tensor) and in_dims[i] is None:
                raise RuntimeError(
                    f"[{op}] got {names[i]} without the mapped dimension, expected one per element "
                    "of vmap: it is updated in place"
                )
        by_name = dict(zip(names, zip(args, in_dims, strict=True), strict=True))
        for fold in folds:
            if _fits(fold, by_name):
                break
        else:
            return _each(operator, info.batch_size, in_dims, args)
        whole = [_merge(fold, name, x, dim, info.batch_size) for name, (x, dim) in by_name.items()]
        outputs = operator(*whole)
        for i in written:
            _write_back(fold, names[i], args[i], in_dims[i], whole[i], info.batch_size)
        single = isinstance(outputs, Tensor)
        several = [outputs] if single else outputs
        parts = [
            _split(fold, name, y, info.batch_size) for name, y in zip(results, several, strict=True)
        ]
        values, dims = zip(*parts, strict=True)
        return (values[0], dims[0]) if single else (values, dims)

    return batched


def _fits(fold: Fold, arguments: Mapping[str, tuple[Any, int | None]]) -> bool:
    packed = arguments.get("cu_seqlens", (None, None))[0] is not None
    mapped = {name for name, (_, dim) in arguments.items() if dim is not None}
    return (fold.packed or not packed) and not mapped & fold.shared


def _axis(fold: Fold, name: str, rank: int) -> int:
    return fold.exceptions.get(name, fold.axis) % rank


def _merge(fold: Fold, name: str, x: Any, dim: int | None, size: int) -> Any:
    if not isinstance(x, Tensor) or name in fold.shared:
        return x
    mapped = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    axis = _axis(fold, name, mapped.dim() - 1)
    return mapped.movedim(0, axis).flatten(axis, axis + 1)


def _split(fold: Fold, name: str, y: Tensor, size: int) -> tuple[Tensor, int | None]:
    # No elements stand for the gradient of what is not given.
    if y.dim() == 1 and y.shape[0] == 0:
        return y, None
    axis = _axis(fold, name, y.dim())
    return y.unflatten(axis, (size, y.shape[axis] // size)), axis


def _write_back(fold: Fold, name: str, target: Any, dim: int | None, whole: Any, size: int) -> None:
    """What was updated, in case that merging had to copy it."""
    if isinstance(target, Tensor) and dim is not None:
        parts, axis = _split(fold, name, whole, size)
        target.movedim(dim, 0).copy_(parts if axis is None else parts.movedim(axis, 0))


def _each(
    operator: Any, size: int, in_dims: Sequence[int | None], args: Sequence[Any]
) -> tuple[Any, Any]:
    """One call per element."""
    outputs = [
        operator(
            *(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True))
        )
        for i in range(size)
    ]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)
