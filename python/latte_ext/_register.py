# SPDX-License-Identifier: Apache-2.0
"""How an operator `torch.ops.latte_ext.*` comes to be: schema, kernels, derivatives, vmap.

Registered with `torch.library.Library`, since `custom_op` costs two to five times as much per call.
Shapes and dtypes are checked by the core, whose messages name the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _core
from ._autograd import Autograd
from ._batching import Fold, rule
from ._device import EMULATED, on_cuda, where

_LIBRARY = torch.library.Library("latte_ext", "DEF")


def _load_library() -> bool:
    """Takes the operators of LATTE_TORCH_STABLE where this build and this torch have them."""
    library = Path(_core.__file__).parent / "_torch.so"
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if EMULATED or (major, minor) < (2, 10) or not library.is_file():
        return False
    # A program may have loaded it before. One definer per operator, or torch ends the process.
    if not torch._C._dispatch_has_kernel("latte_ext::latent_attention"):
        torch.ops.load_library(str(library))
    return True


# Whether schemas and CPU kernels are those of C++.
COMPILED = _load_library()


def register(name: str, fake: Callable[..., Any], autograd: Autograd, folds: Sequence[Fold]) -> Any:
    """Define one operator with all its kernels; returns it.

    Args:
        name: of an operator of cpp/operators, which has schema and kernel.
        fake: allocates the results only.
        autograd: one of `_autograd`.
        folds: how vmap can be one call, see `_batching`.
    """
    if not COMPILED:
        _LIBRARY.define(_core.SCHEMAS[name], tags=[torch.Tag.pt2_compliant_tag])
    operator = getattr(torch.ops.latte_ext, name).default
    names = [argument.name for argument in operator._schema.arguments]
    written = _updated(operator)
    device_kernel = on_cuda(name, names, _kernel(getattr(_core, name), written))
    if not COMPILED:
        _LIBRARY.impl(name, device_kernel if EMULATED else getattr(_core, f"{name}_cpu"), "CPU")
    elif written:
        # torch's stable interface has no way to say so.
        _LIBRARY.impl(name, _marking(operator, written), "ADInplaceOrView")
    _LIBRARY.impl(name, device_kernel, "CUDA")
    _LIBRARY.impl(name, autograd(operator, name), "Autograd")
    torch.library.register_fake(f"latte_ext::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"latte_ext::{name}", rule(operator, folds), lib=_LIBRARY)
    return operator


def _updated(operator: Any) -> list[int]:
    """Which arguments an operator updates in place."""
    return [
        i
        for i, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _kernel(function: Callable[..., Any], written: Sequence[int]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return function(*args, where(args[0]), None)

    def run_in_place(*args: Any) -> Any:
        results = run(*args)
        _mark_updated(args, written)
        return results

    return run_in_place if written else run


def _marking(operator: Any, written: Sequence[int]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            results = operator(*args)
        _mark_updated(args, written)
        return results

    return run


def _mark_updated(args: Sequence[Any], written: Sequence[int]) -> None:
    """Autograd then refuses a backward pass that saved one of them before this update."""
    tensors = [args[i] for i in written if args[i] is not None]
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


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
