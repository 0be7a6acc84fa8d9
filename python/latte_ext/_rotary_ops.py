# SPDX-License-Identifier: Apache-2.0
"""The operator of rotations. Its gradient is the inverse rotation, by the same operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._autograd import differentiable, linearised
from ._batching import ROTATION
from ._checks import check_rank
from ._direct import direct
from ._register import register


def _fake(x: Tensor, *_: Any) -> Tensor:
    check_rank("rotate", 4, x=x)
    # In x's order of memory: a transposed projection stays one.
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, position, rates, *ctx.options, ctx.inverse = inputs
    ctx.save_for_backward(position, rates)


def _gradients(ctx: Any, dy: Tensor) -> Any:
    return rotate(dy, *ctx.saved_tensors, *ctx.options, not ctx.inverse), *[None] * 6


def _tangents(*args: Any) -> Any:
    """Linear in x."""

    def jvp(primals: Any, tangents: Any, outputs: Any) -> tuple[Tensor]:
        if tangents[2] is not None:
            raise RuntimeError(
                "[rotate] got rates that carry a tangent, expected constants: use "
                'backend="reference" for their derivative'
            )
        return (rotate(tangents[0], *primals[1:]),)

    return linearised(rotate, jvp)(*args)


rotate = register(
    "rotate",
    _fake,
    differentiable(_save, _gradients, _tangents, constants=("rates",)),
    ROTATION,
)
rotate_direct = direct(rotate)
