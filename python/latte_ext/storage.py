# SPDX-License-Identifier: Apache-2.0
"""Any state or cache as bytes or as a safetensors file, and back.

What is stored is a text that says which parts there are, and their tensors. Reading builds only the
kinds that are named here, checks their shapes, and runs no code of the data.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._serialise import CODES, pack_tree, unpack_tree
from .state import LatentState

_TENSOR, _NOTHING, _LIST = "Tensor", "None", "list"


@dataclass(frozen=True)
class _Kind:
    """How a class comes apart: `fields` names the kinds that each of its parts may have."""

    build: Callable[..., Any]
    fields: tuple[tuple[str, ...], ...]


_KINDS: dict[str, _Kind] = {}
_NAMES: dict[type, str] = {}


def register_kind(
    cls: type, *fields: tuple[str, ...], build: Callable[..., Any] | None = None
) -> None:
    """Lets instances of a class, an iterable of its parts, be stored.

    Args:
        fields: for each part the names of the kinds that it may have.
        build: makes an instance of the parts and raises ValueError or TypeError if they do not fit
            together; None: the class.
    """
    _KINDS[cls.__name__] = _Kind(build or cls, fields)
    _NAMES[cls] = cls.__name__


register_kind(LatentState, *[(_TENSOR,)] * 3)


def to_bytes(state: Any) -> bytes:
    """A state in a portable form: versioned, checksummed, the same bytes on every machine.

    Args:
        state: a `LatentState`, `WindowCache`, `MacchiatoState`, `QuantisedState`,
            `nn.RecurrentState`, `nn.LayerCache`, a tensor (the state of a convolution or of a
            recurrence), or lists of these, such as the cache of `nn.LatteLM`.

    Raises:
        TypeError: something else, or a tensor of a dtype that no state has.
    """
    tensors: list[Tensor] = []
    structure = _describe("[to_bytes]", state, tensors)
    return pack_tree(json.dumps(structure, separators=(",", ":")), tensors)


def _check_storable(op: str, state: Any) -> None:
    """Raises TypeError, in the name of `op`, for what `to_bytes` does not take."""
    _describe(op, state, [])


def from_bytes(data: bytes | bytearray | memoryview) -> Any:
    """What `to_bytes` saved, bit for bit (T4), on the CPU.

    Runs no code of the data, and takes memory in proportion to `data` only.

    Raises:
        TypeError: data is not bytes.
        ValueError: truncated, damaged, of another version, or not the shapes of a state.
    """
    op = "[from_bytes]"
    structure, tensors = unpack_tree(op, data)
    return _rebuild(op, structure, tensors)


def save_safetensors(state: Any, path: str | PathLike[str]) -> None:
    """The state of `to_bytes` as a safetensors file, which other tools can read too.

    Needs the package safetensors. Tensors are named by their number; the text of the structure is
    the file's metadata `latte_ext`.
    """
    from safetensors.torch import save_file

    tensors: list[Tensor] = []
    structure = json.dumps(_describe("[save_safetensors]", state, tensors))
    named = {str(i): x.detach().cpu().contiguous().clone() for i, x in enumerate(tensors)}
    save_file(named, path, metadata={"latte_ext": structure})


def load_safetensors(path: str | PathLike[str]) -> Any:
    """What `save_safetensors` saved, bit for bit, on the CPU.

    Raises:
        ValueError: not a safetensors file, not one of a state, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    op = "[load_safetensors]"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            count = len(file.keys())
            names = [str(i) for i in range(count)]
            if "latte_ext" not in metadata or set(file.keys()) != set(names):
                raise ValueError(f"{op} {path} holds no state, expected metadata latte_ext")
            tensors = [file.get_tensor(name) for name in names]
    except SafetensorError as error:
        raise ValueError(f"{op} {path} is damaged ({error}), expected safetensors") from None
    return _rebuild(op, metadata["latte_ext"], tensors)


def _describe(op: str, state: Any, tensors: list[Tensor]) -> Any:
    """[name, parts...] for a kind, and a name alone for a tensor, which joins `tensors`."""
    if state is None:
        return _NOTHING
    if isinstance(state, Tensor):
        if state.dtype not in CODES or state.layout != torch.strided:
            raise TypeError(
                f"{op} state holds a tensor of {state.dtype} and {state.layout}, expected one of "
                f"{', '.join(map(str, CODES))}, and torch.strided"
            )
        tensors.append(state)
        return _TENSOR
    if type(state) is list:
        return [_LIST, *(_describe(op, part, tensors) for part in state)]
    if type(state) not in _NAMES:
        expected = ", ".join(sorted(_KINDS))
        raise TypeError(
            f"{op} state holds a {type(state).__name__}, expected a tensor, a list or {expected}"
        )
    return [_NAMES[type(state)], *(_describe(op, part, tensors) for part in state)]


def _rebuild(op: str, text: str, tensors: list[Tensor]) -> Any:
    """The state of `_describe`; raises ValueError for one that could not have been stored."""
    # The kinds of the modules are known once they are imported, which a reader need not have done.
    importlib.import_module(f"{__package__}.nn")
    try:
        structure = json.loads(text)
        left = iter(tensors)
        state = _build(op, structure, left)
    except (RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{op} data has a structure that cannot be read ({error})") from None
    except TypeError as error:
        raise ValueError(f"{op} data does not fit together: {error}") from None
    if next(left, None) is not None:
        raise ValueError(f"{op} data holds more tensors than its structure")
    return state


def _build(op: str, structure: Any, left: Iterator[Tensor]) -> Any:
    if structure == _NOTHING:
        return None
    if structure == _TENSOR:
        tensor = next(left, None)
        if tensor is None:
            raise ValueError(f"{op} data holds fewer tensors than its structure")
        return tensor
    name, parts = _name(op, structure), structure[1:]
    if name == _LIST:
        return [_build(op, part, left) for part in parts]
    kind = _KINDS[name]
    names = [_name(op, part) for part in parts]
    if len(names) != len(kind.fields) or any(
        part not in allowed for part, allowed in zip(names, kind.fields, strict=True)
    ):
        raise ValueError(f"{op} data has a {name} of {names}, expected {list(kind.fields)}")
    state = kind.build(*(_build(op, part, left) for part in parts))
    leaves = [x for x in pytree.tree_leaves(state) if isinstance(x, Tensor)]
    if len({x.shape[:1] for x in leaves}) > 1 or not all(x.dim() for x in leaves):
        shapes = [tuple(x.shape) for x in leaves]
        raise ValueError(f"{op} data has a {name} of shapes {shapes}, expected the same N for all")
    return state


def _name(op: str, structure: Any) -> str:
    """The kind that a structure begins with."""
    name = structure[0] if isinstance(structure, list) and structure else structure
    known = isinstance(name, str) and (
        name in (_LIST, *_KINDS) if isinstance(structure, list) else name in (_TENSOR, _NOTHING)
    )
    if not known:
        raise ValueError(f"{op} data holds a {str(name)[:40]!r}, expected one of {sorted(_KINDS)}")
    return str(name)
