# SPDX-License-Identifier: Apache-2.0
"""What the core cannot check of its arguments: whether they are tensors, and where they are."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def check_tensors(op: str, required: dict[str, Tensor], **optional: Tensor | None) -> None:
    """Types, devices and layouts; `cu_seqlens` holds integers, `fresh` and `key_mask` bools.

    Raises:
        TypeError: types, dtypes and layouts; RuntimeError: devices.
    """
    first, device = next(iter(required.items()))
    for name, tensor in (*required.items(), *optional.items()):
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"[{op}] {name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.device != device.device:
            raise RuntimeError(
                f"[{op}] {name} is on {tensor.device}, expected {device.device} as {first}"
            )
        allowed: tuple[torch.dtype, ...] = FLOATING
        if name == "cu_seqlens":
            allowed = _INTEGERS
        elif name in ("fresh", "key_mask"):
            allowed = (torch.bool,)
        if tensor.dtype not in allowed:
            expected = " or ".join(str(dtype) for dtype in allowed)
            raise TypeError(f"[{op}] {name} has dtype {tensor.dtype}, expected {expected}")
        if tensor.layout != torch.strided:
            raise TypeError(f"[{op}] {name} has layout {tensor.layout}, expected torch.strided")


def check_flags(op: str, **flags: bool) -> None:
    """Raises TypeError for a flag that is not a bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"[{op}] {name} is a {type(flag).__name__}, expected a bool")


def check_rank(op: str, rank: int, **tensors: Tensor | None) -> None:
    """Raises ValueError; outputs are sized from these shapes before the core sees the call."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() != rank:
            raise ValueError(
                f"[{op}] {name} has shape {tuple(tensor.shape)}, expected {rank} dimensions"
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
