# SPDX-License-Identifier: Apache-2.0
"""What stands at an operator's Autograd key: reverse mode, forward mode, or a refusal by name.

Derivatives are taken below the dispatcher's other features, level by level, as those of torch's own
operators are. So an operator works under torch.func without a wrapper that users could miss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import (
    enable_single_level_autograd_function,
    unwrap_dead_wrappers,
)
from torch.autograd import forward_ad

# torch.autograd.Function would send the call through all levels of torch.func once more.
from torch.autograd.function import _SingleLevelFunction

# The kernel for the Autograd key, made from the operator and its name.
Autograd = Callable[[Any, str], Callable[..., Any]]


def differentiable(
    save: Callable[..., None],
    gradients: Callable[..., Any],
    forward_mode: Callable[..., Any] | None = None,
    *,
    constants: Sequence[str] = (),
) -> Autograd:
    """Derivatives in both modes.

    Args:
        save: the `setup_context` of a torch.autograd.Function.
        gradients: its `backward`, in operators that are themselves differentiable.
        forward_mode: the operator's function in operators that carry tangents; None: a tangent
            raises.
        constants: arguments that must not require grad.
    """

    def autograd(operator: Any, name: str) -> Callable[..., Any]:
        forbidden = _arguments(operator, constants)

        def tangents(*args: Any) -> Any:
            if forward_mode is None:
                raise RuntimeError(
                    f"[{name}] got a forward-mode tangent, expected reverse mode: use "
                    'backend="reference" for forward-mode AD'
                )
            return forward_mode(*args)

        def check(args: tuple[Any, ...]) -> None:
            for index, argument in forbidden:
                if args[index] is not None and args[index].requires_grad:
                    raise RuntimeError(
                        f"[{name}] got {argument} that require grad, expected constants: use "
                        'backend="reference" for their gradient'
                    )

        return _kernel(operator, _function(operator, save, gradients), tangents, check)

    return autograd


def composed(function: Callable[..., Any], *, tangents: bool = True) -> Autograd:
    """Derivatives of any order by those of what computes the same from torch's operators.

    Args:
        function: takes the operator's arguments; differentiable.
        tangents: whether it carries tangents as well; otherwise they raise.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [x for x in inputs if not isinstance(x, Tensor)]

    def gradients(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        # What torch.func.vjp returns runs after its level has ended.
        tensors, others = iter(unwrap_dead_wrappers(ctx.saved_tensors)), iter(ctx.others)
        args = [next(tensors if here else others) for here in ctx.is_tensor]
        # The engine materialises a gradient per output, and asks for those of some inputs.
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]

        def of_wanted(*values: Tensor) -> Any:
            changed = dict(zip(wanted, values, strict=True))
            return function(*(changed.get(i, x) for i, x in enumerate(args)))

        pull_back = torch.func.vjp(of_wanted, *(args[i] for i in wanted))[1]
        found = pull_back(cotangents)
        by_index = dict(zip(wanted, found, strict=True))
        return tuple(by_index.get(i) for i in range(len(args)))

    return differentiable(save, gradients, function if tangents else None)


def once_differentiable(operator: Any, name: str) -> Callable[..., Any]:
    """Stands behind a backward operator so that a second derivative raises by name."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError(
            f"[{name}] got a second derivative, expected first order: use "
            'backend="reference" for double backward'
        )

    function = _function(operator, lambda ctx, inputs, output: None, refuse)
    return _kernel(operator, function, refuse, lambda args: None)


def in_place(updated: str) -> Autograd:
    """A step, which refuses what is differentiated because it updates its `updated` in place."""

    def autograd(operator: Any, name: str) -> Callable[..., Any]:
        arguments = [(x.name, x.is_write) for x in operator._schema.arguments]
        whole = name.removesuffix("_step")

        def apply(*args: Any) -> Any:
            for (argument, is_written), x in zip(arguments, args, strict=True):
                if is_written and x is not None and x.is_neg():
                    # torch would update a copy, and then report an internal error.
                    raise RuntimeError(
                        f"[{name}] {argument} is negated lazily, expected memory to write to: "
                        "use resolve_neg()"
                    )
                if torch.is_grad_enabled() and _requires_grad(x):
                    found = "that requires grad"
                elif forward_ad._current_level >= 0 and _has_tangent(x):
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


def linearised(
    operator: Callable[..., Any], jvp: Callable[..., Sequence[Tensor | None]]
) -> Callable[..., Any]:
    """A `forward_mode`: the operator on the primals, and the tangents of its outputs.

    Args:
        operator: on arguments without tangents, returns a tensor or several.
        jvp: (primals, tangents, outputs) -> a tangent per output, None where it is zero. Tangents
            are None where an argument has none.
    """

    def forward_mode(*args: Any) -> Any:
        duals = [forward_ad.unpack_dual(x) if isinstance(x, Tensor) else (x, None) for x in args]
        primals, tangents = [x[0] for x in duals], [x[1] for x in duals]
        outputs = operator(*primals)
        single = isinstance(outputs, Tensor)
        several = (outputs,) if single else outputs
        made = tuple(
            y if tangent is None else forward_ad.make_dual(y, tangent)
            for y, tangent in zip(several, jvp(primals, tangents, several), strict=True)
        )
        return made[0] if single else made

    return forward_mode


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for what a backward pass needs.

    Under torch.func it may: a tensor that vmap wraps does not say whether it requires grad.
    """
    return torch.is_grad_enabled() and (
        torch._C._are_functorch_transforms_active()
        or any(x is not None and x.requires_grad for x in tensors)
    )


def _arguments(operator: Any, names: Sequence[str]) -> list[tuple[int, str]]:
    """Positions and names of some arguments."""
    return [(i, x.name) for i, x in enumerate(operator._schema.arguments) if x.name in names]


def _requires_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _kernel(
    operator: Any,
    function: type[_SingleLevelFunction],
    tangents: Callable[..., Any],
    check: Callable[[tuple[Any, ...]], None],
) -> Callable[..., Any]:
    def apply(*args: Any) -> Any:
        # -1 outside of dual_level() and torch.func.jvp.
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            return tangents(*args)
        if torch.is_grad_enabled() and any(map(_requires_grad, args)):
            check(args)
            if torch._C._are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    return function.apply(*args)  # type: ignore[attr-defined]
            return function.apply(*args)  # type: ignore[attr-defined]
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return apply


def _function(
    operator: Any, save: Callable[..., None], gradients: Callable[..., Any]
) -> type[_SingleLevelFunction]:
    """A torch.autograd.Function of one level, whose forward is what is below the Autograd key."""

    class Function(_SingleLevelFunction):
        setup_context = staticmethod(save)
        backward = staticmethod(gradients)

        @staticmethod
        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                if not torch._C._are_functorch_transforms_active():
                    return operator(*args)
                # A Function turns derivatives off for all levels of torch.func, this one only
                # answers for its own.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    return operator(*args)

    return Function
