# SPDX-License-Identifier: Apache-2.0
"""What the core cannot check of its arguments: whether they are tensors, and where they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from ._sharding import check_plain, check_whole

Backend = Literal["cpu", "cuda", "reference"]

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cu_seqlens": (torch.int32, torch.int64),
    "fresh": (torch.bool,),
    "key_mask": (torch.bool,),
    "position": (torch.int64,),
    "rates": (torch.float32, torch.float64),
}


def check_tensors(
    op: str, required: dict[str, Tensor], *, pointwise: bool = False, **optional: Tensor | None
) -> None:
    """Types, devices and layouts; what is not listed in _DTYPES is floating point.

    Args:
        pointwise: a token's result depends on no other token, so that any part of a sequence will
            do.

    Raises:
        TypeError: types, dtypes and layouts.
        RuntimeError: devices, shards of a sequence.
    """
    if not pointwise:
        check_whole(op)
    first, beside = next(iter(required.items()))
    for name, given in (*required.items(), *optional.items()):
        if given is None and name in optional:
            continue
        tensor = _tensor(op, name, given, beside, first)
        allowed = _DTYPES.get(name, _FLOATING)
        if tensor.dtype not in allowed:
            expected = " or ".join(str(dtype) for dtype in allowed)
            raise TypeError(f"[{op}] {name} has dtype {tensor.dtype}, expected {expected}")


def check_beside(op: str, q: Tensor, name: str, tensor: Tensor) -> None:
    """A floating-point tensor on q's device, float64 if and only if q is.

    Raises:
        TypeError: types and dtypes.
        RuntimeError: devices.
    """
    tensor = _tensor(op, name, tensor, q, "q")
    is_double = q.dtype == torch.float64
    if tensor.dtype not in _FLOATING or (tensor.dtype == torch.float64) != is_double:
        expected = "float64 as q" if is_double else "float32, bfloat16 or float16"
        raise TypeError(f"[{op}] {name} has dtype {tensor.dtype}, expected {expected}")


def _tensor(op: str, name: str, given: object, beside: Tensor, first: str) -> Tensor:
    if not isinstance(given, Tensor):
        raise TypeError(f"[{op}] {name} is a {type(given).__name__}, expected a torch.Tensor")
    check_plain(op, name, given)
    check_dense(op, name, given)
    check_device(op, name, given.device, beside, first)
    return given


def check_dense(op: str, name: str, tensor: Tensor) -> None:
    """Raises TypeError for a tensor that is more than memory with strides."""
    if tensor.is_nested:
        raise TypeError(f"[{op}] {name} is a nested tensor, expected a plain one")
    if tensor.layout != torch.strided:
        raise TypeError(f"[{op}] {name} has layout {tensor.layout}, expected torch.strided")


def check_device(
    op: str, name: str, device: torch.device, beside: Tensor, first: str = "q"
) -> None:
    """Raises RuntimeError for a device that is not that of `beside`, the argument `first`."""
    if device != beside.device:
        raise RuntimeError(f"[{op}] {name} is on {device}, expected {beside.device} as {first}")


def check_type(op: str, name: str, value: object, expected: type) -> None:
    """Raises TypeError for a value that is not of the expected class."""
    if not isinstance(value, expected):
        raise TypeError(
            f"[{op}] {name} is a {type(value).__name__}, expected a {expected.__name__}"
        )


def check_flags(op: str, **flags: bool) -> None:
    """Raises TypeError for a flag that is not a bool."""
    for name, flag in flags.items():
        check_type(op, name, flag, bool)


def check_integers(op: str, **sizes: int) -> None:
    """Raises TypeError for a size that is not an integer."""
    for name, size in sizes.items():
        # Integral: numpy's integers. SymInt: torch.export.
        if isinstance(size, bool) or not isinstance(size, (int, Integral, torch.SymInt)):
            raise TypeError(f"[{op}] {name} is a {type(size).__name__}, expected an int")


def check_number(op: str, name: str, value: float) -> None:
    """Raises TypeError for what is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"[{op}] {name} is a {type(value).__name__}, expected a float")


def check_fields(op: str, settings: Any) -> None:
    """Raises TypeError for a number or flag of a dataclass that is not what its field declares."""
    for field in dataclasses.fields(settings):
        kind, _, default = str(field.type).partition(" | ")
        value = getattr(settings, field.name)
        if value is None and default == "None":
            continue
        if kind == "int":
            check_integers(op, **{field.name: value})
        elif kind == "float":
            check_number(op, field.name, value)
        elif kind == "bool":
            check_flags(op, **{field.name: value})


def check_scale(op: str, scale: float) -> None:
    """`check_number` of a scale."""
    check_number(op, "scale", scale)


def check_rank(op: str, rank: int, **tensors: Tensor | None) -> None:
    """Raises ValueError; outputs are sized from these shapes before the core sees the call."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() != rank:
            raise ValueError(
                f"[{op}] {name} has shape {tuple(tensor.shape)}, expected {rank} dimensions"
            )


def check_shape(op: str, name: str, tensor: Tensor, *expected: int) -> None:
    """Raises ValueError for another shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"[{op}] {name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_cu_seqlens(op: str, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError; states are sized from this shape before the core sees the call."""
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1):
        raise ValueError(
            f"[{op}] cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (sequences + 1,)"
        )


def check_backend(op: str, name: str, tensor: Tensor, backend: str | None) -> None:
    """Raises ValueError for a backend that is unknown or not for the tensor's device."""
    kind = tensor.device.type
    if backend not in (None, "cpu", "cuda", "reference"):
        raise ValueError(
            f"[{op}] backend is {backend!r}, expected None, 'cpu', 'cuda' or 'reference'"
        )
    if backend in ("cpu", "cuda") and backend != kind:
        raise ValueError(
            f"[{op}] backend is {backend!r}, expected one for tensors on {tensor.device}"
        )
    if backend is None and kind not in ("cpu", "cuda", "meta"):
        raise RuntimeError(
            f"[{op}] {name} is on {tensor.device}, expected a CPU or CUDA tensor, or "
            "backend='reference'"
        )


@contextmanager
def reported_as(op: str, name: str) -> Iterator[None]:
    """Errors of the operator `name` that `op` is made of bear the name of `op`."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(str(error).replace(f"[{name}]", f"[{op}]", 1)) from None


def check_by_core(check: Callable[[Tensor | None], None], cu_seqlens: Tensor | None) -> None:
    """Holds the reference to the contract of the core, by the core's own checks.

    Args:
        check: calls one of them, given the borders on the CPU. A tracer cannot enter it.
    """
    if torch.compiler.is_compiling():
        return
    borders = None if cu_seqlens is None else cu_seqlens.cpu()
    # The core reads the memory, which a wrapper of torch.func has not.
    while borders is not None and torch._C._functorch.is_functorch_wrapped_tensor(borders):
        borders = torch._C._functorch.get_unwrapped(borders)
    check(borders)
