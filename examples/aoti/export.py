# SPDX-License-Identifier: Apache-2.0
"""Compiles a language model into two packages that need no Python: examples/aoti/main.cpp.

    python examples/aoti/export.py MODEL FOLDER

MODEL is a folder that `latte_ext.nn.save` wrote; FOLDER receives prefill.pt2 and step.pt2, for one
sequence of any length.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from latte_ext import nn
from torch import Tensor
from torch.utils import _pytree as pytree


class Prefill(torch.nn.Module):
    """Tokens (1,T) to logits (1,V) and the tensors of the cache."""

    def __init__(self, model: nn.LatteLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> list[Tensor]:
        logits, cache = self.model.prefill(tokens)
        return [logits, *(x for x in pytree.tree_leaves(cache) if isinstance(x, Tensor))]


class Step(torch.nn.Module):
    """A token (1,) and the tensors of a cache like `cache`, updated in place, to logits (1,V)."""

    def __init__(self, model: nn.LatteLM, cache: Sequence[nn.LayerCache]) -> None:
        super().__init__()
        self.model = model
        leaves, self.structure = pytree.tree_flatten(cache)
        self.is_tensor = [isinstance(x, Tensor) for x in leaves]

    def forward(self, token: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        left = iter(tensors)
        leaves = [next(left) if here else None for here in self.is_tensor]
        return self.model.step(token, pytree.tree_unflatten(leaves, self.structure))


@torch.no_grad()
def export(model: nn.LatteLM, folder: Path) -> None:
    """Writes prefill.pt2 and step.pt2 into a folder."""
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    prefill = torch.export.export(
        Prefill(model), (tokens,), dynamic_shapes=({1: torch.export.Dim("length", min=2)},)
    )
    _, cache = model.prefill(tokens)
    tensors = [x for x in pytree.tree_leaves(cache) if isinstance(x, Tensor)]
    step = torch.export.export(Step(model, cache), (tokens[:, 0], tensors))
    for name, program in (("prefill", prefill), ("step", step)):
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{name}.pt2"))


if __name__ == "__main__":
    export(nn.load(sys.argv[1]).eval(), Path(sys.argv[2]))
