# SPDX-License-Identifier: Apache-2.0
"""How an operator `torch.ops.latte_ext.*` comes to be: schema, CPU kernel, fake kernel, autograd.

Registered with `torch.library.Library`, since `custom_op` costs two to five times as much per call.
Shapes and dtypes are checked by the core, whose messages name the argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("latte_ext", "DEF")

# What runs at the Autograd key, made from the operator below it and its name.
Autograd = Callable[[Any, str], Callable[..., Any]]


def register(
    schema: str, cpu: Callable[..., Any], fake: Callable[..., Any], autograd: Autograd
) -> Any:
    """Define one operator with all its kernels; returns it.

    Args:
        schema: "name(arguments) -> results".
        cpu: the kernel for CPU tensors.
        fake: allocates the results only.
        autograd: `differentiable`, `once_differentiable` or `in_place`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    operator = getattr(torch.ops.latte_ext, name).default
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, _unbuilt_cuda(name), "CUDA")
    _LIBRARY.impl(name, autograd(operator, name), "Autograd")
    torch.library.register_fake(f"latte_ext::{name}", fake, lib=_LIBRARY)
    return operator


def differentiable(save: Callable[..., None], gradients: Callable[..., Any]) -> Autograd:
    """A gradient in reverse mode.

    Args:
        save: the `setup_context` of a torch.autograd.Function.
        gradients: its `backward`.
    """

    def autograd(operator: Any, name: str) -> Callable[..., Any]:
        class Differentiable(_below(operator)):  # type: ignore[misc]
            setup_context = staticmethod(save)
            backward = staticmethod(gradients)

            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                raise RuntimeError(
                    f"[{name}] got a forward-mode tangent, expected reverse mode: use "
                    'backend="reference" for forward-mode AD'
                )

        def apply(*args: Any) -> Any:
            _refuse_transforms(name)
            return Differentiable.apply(*args)

        return apply

    return autograd


def once_differentiable(operator: Any, name: str) -> Callable[..., Any]:
    """Stands behind a backward operator so that a second derivative raises by name."""

    class Once(_below(operator)):  # type: ignore[misc]
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(
                f"[{name}] got a second derivative, expected first order: use "
                'backend="reference" for double backward'
            )

    return lambda *args: Once.apply(*args)


def in_place(updated: str) -> Autograd:
    """A step, which refuses what is differentiated because it updates its `updated` in place."""

    def autograd(operator: Any, name: str) -> Callable[..., Any]:
        names = [argument.name for argument in operator._schema.arguments]
        whole = name.removesuffix("_step")

        def apply(*args: Any) -> Any:
            _refuse_transforms(name)
            tangents = torch.autograd.forward_ad._current_level >= 0
            for argument, tensor in zip(names, args, strict=True):
                if not isinstance(tensor, Tensor):
                    continue
                if torch.is_grad_enabled() and tensor.requires_grad:
                    found = "that requires grad"
                elif tangents and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
                    found = "that carries a tangent"
                else:
                    continue
                raise RuntimeError(
                    f"[{name}] got {argument} {found}, expected none: the {updated} is updated in "
                    f"place. Use {whole} for training, or no_grad()"
                )
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)

        return apply

    return autograd


def _below(operator: Any) -> Any:
    """A torch.autograd.Function whose forward is the operator's kernel."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)

    return Function


def _refuse_transforms(name: str) -> None:
    # An autograd.Function below the dispatcher is invisible to torch.func.
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"[{name}] got a torch.func transform, expected plain autograd: use "
            'backend="reference" under torch.func'
        )


def _unbuilt_cuda(name: str) -> Callable[..., Any]:
    def raise_unbuilt(*args: Any) -> Any:
        raise RuntimeError(f"[{name}] built without CUDA: got a CUDA tensor, expected a CPU tensor")

    return raise_unbuilt


def mark_updated(*tensors: Tensor) -> None:
    """Autograd then refuses a backward pass that saved a tensor before this update."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for what a backward pass needs."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of arithmetic and states: float64 if a tensor has it, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def count_sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """N: the batch of x, or the sequences packed along its tokens."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of x's shape."""
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def like_or_nothing(x: Tensor | None, other: Tensor) -> Tensor:
    """`like(x)`, and no elements of the type of `other` for the gradient of what is not given."""
    return other.new_empty(0) if x is None else like(x)
