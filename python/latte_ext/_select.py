# SPDX-License-Identifier: Apache-2.0
"""Sequences of states and caches: taken out, put together, replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Index = Sequence[int] | Sequence[bool] | Tensor
# A pytree of tensors (N,...) or None.
State = TypeVar("State")


def select(op: str, tensors: Sequence[Tensor], index: Index) -> list[Tensor]:
    """The rows `index` of tensors (N,...): positions in [-N, N), or an (N,) mask.

    Raises:
        TypeError: index is neither integer nor bool.
        ValueError: index is not 1-D, out of range, or a mask of another length.
    """
    batch = tensors[0].shape[0]
    chosen = _positions(op, tensors[0], index)
    try:
        return [x[chosen] for x in tensors]
    except IndexError as error:
        raise ValueError(
            f"{op} index does not fit: expected positions in [-{batch}, {batch}) "
            f"or a mask of length {batch} ({error})"
        ) from error


def concat_states(cls: type[State], states: Iterable[State]) -> State:
    """One of these of the sequences of all `states`, in order, in new tensors; differentiable.

    Raises:
        ValueError: no states, or shapes that differ in more than N.
        TypeError: other types or dtypes.
        RuntimeError: devices.
    """
    op = f"[{cls.__name__}.concat]"
    parts = list(states)
    if not parts:
        raise ValueError(f"{op} got no states, expected at least one")
    for i, part in enumerate(parts):
        if not isinstance(part, cls):
            raise TypeError(f"{op} states[{i}] is a {type(part).__name__}, expected {cls.__name__}")
        _check_alike(op, f"states[{i}]", part, parts[0])
    leaves = zip(*(pytree.tree_leaves(part) for part in parts), strict=True)
    joined = [None if column[0] is None else torch.cat(column) for column in leaves]
    return pytree.tree_unflatten(joined, pytree.tree_structure(parts[0]))  # type: ignore[no-any-return]


def scatter_states(self: State, index: Index, source: State) -> None:
    """The sequences of `source` take the places `index`, in place.

    Args:
        index: as in `select`, without repeats.

    Raises:
        ValueError: an index that does not fit, repeats or has another length than the sequences of
            source, or shapes that differ in more than N.
        TypeError: other types or dtypes.
        RuntimeError: devices.
    """
    op = f"[{type(self).__name__}.scatter]"
    if type(source) is not type(self):
        raise TypeError(
            f"{op} source is a {type(source).__name__}, expected a {type(self).__name__}"
        )
    _check_alike(op, "source", source, self)
    pairs = [
        (x, y)
        for x, y in zip(pytree.tree_leaves(self), pytree.tree_leaves(source), strict=True)
        if x is not None
    ]
    batch, count = pairs[0][0].shape[0], pairs[0][1].shape[0]
    places = torch.arange(batch, device=pairs[0][0].device)
    places = select(op, [places], index)[0]
    if places.shape[0] != count:
        raise ValueError(
            f"{op} index has {places.shape[0]} places, expected {count}: one per sequence of source"
        )
    if places.unique().shape[0] != count:
        raise ValueError(f"{op} index is {places.tolist()}, expected no place twice")
    for x, y in pairs:
        x.index_copy_(0, places, y)


def _check_alike(op: str, name: str, state: Any, model: Any) -> None:
    """Raises unless all tensors of `state` can stand in a batch with those of `model`."""
    wanted, got = (pytree.tree_flatten_with_path(x) for x in (model, state))
    if wanted[1] != got[1]:
        raise TypeError(f"{op} {name} has other parts than expected: {state} beside {model}")
    for (path, x), (_, y) in zip(wanted[0], got[0], strict=True):
        label = name + pytree.keystr(path)
        if (x is None) != (y is None):
            raise TypeError(f"{op} {label} is a {type(y).__name__}, expected a {type(x).__name__}")
        if x is None:
            continue
        if y.dtype != x.dtype:
            raise TypeError(f"{op} {label} has dtype {y.dtype}, expected {x.dtype}")
        if y.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"{op} {label} has shape {tuple(y.shape)}, expected {('N', *x.shape[1:])}"
            )
        if y.device != x.device:
            raise RuntimeError(f"{op} {label} is on {y.device}, expected {x.device}")


def _positions(op: str, like: Tensor, index: Index) -> Tensor:
    """The index as a 1-D tensor of integers or bools beside `like`."""
    try:
        chosen = torch.as_tensor(index, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{op} index is a {type(index).__name__}, expected integers or bools ({error})"
        ) from error
    if not isinstance(index, Tensor) and chosen.numel() == 0:
        chosen = chosen.long()
    # uint8 is left out: torch has taken it for a mask and for positions.
    if chosen.dtype not in (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{op} index has dtype {chosen.dtype}, expected signed integers or bool")
    if chosen.dim() != 1:
        raise ValueError(f"{op} index has shape {tuple(chosen.shape)}, expected one dimension")
    return chosen if chosen.dtype == torch.bool else chosen.long()
