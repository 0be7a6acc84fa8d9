# SPDX-License-Identifier: Apache-2.0
"""How an operator `torch.ops.latte_ext.*` comes to be: schema, kernels, derivatives, vmap.

Registered with `torch.library.Library`, since `custom_op` costs two to five times as much per call.
Shapes and dtypes are checked by the core, whose messages name the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._autograd import Autograd
from ._batching import Fold, rule
from ._device import EMULATED, on_cuda

_LIBRARY = torch.library.Library("latte_ext", "DEF")


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Autograd,
    folds: Sequence[Fold],
) -> Any:
    """Define one operator with all its kernels; returns it.

    Args:
        schema: "name(arguments) -> results".
        kernel: for CPU and CUDA tensors, by `_device.where`.
        fake: allocates the results only.
        autograd: one of `_autograd`.
        folds: how vmap can be one call, see `_batching`.
    """
    name = schema.partition("(")[0]
    # A process that loaded _torch.so (LATTE_TORCH_STABLE) before has it: one definer per operator.
    defined = torch._C._dispatch_has_kernel(f"latte_ext::{name}")
    if not defined:
        _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    operator = getattr(torch.ops.latte_ext, name).default
    arguments = [argument.name for argument in operator._schema.arguments]
    device_kernel = on_cuda(name, arguments, kernel)
    if not defined:
        _LIBRARY.impl(name, device_kernel if EMULATED else kernel, "CPU")
    _LIBRARY.impl(name, device_kernel, "CUDA")
    _LIBRARY.impl(name, autograd(operator, name), "Autograd")
    torch.library.register_fake(f"latte_ext::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"latte_ext::{name}", rule(operator, folds), lib=_LIBRARY)
    return operator


def mark_updated(*tensors: Tensor) -> None:
    """Autograd then refuses a backward pass that saved a tensor before this update."""
    tracked = [tensor for tensor in tensors if not tensor.is_inference()]
    if tracked:
        torch.autograd.graph.increment_version(tracked)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of arithmetic and states: float64 if a tensor has it, float32 otherwise."""
    for x in tensors:  # any() of a generator takes 0.5 us more
        if x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def count_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """N: the batch of x, or the sequences packed along its tokens."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of x's shape."""
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def like_or_nothing(x: Tensor | None, other: Tensor) -> Tensor:
    """`like(x)`, and no elements of the type of `other` for the gradient of what is not given."""
    return other.new_empty(0) if x is None else like(x)
