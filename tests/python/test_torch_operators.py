# SPDX-License-Identifier: Apache-2.0
"""Every operator alone in the same places of torch: each row of docs/support.md for each column.

What only some operators have (states, masks, packed sequences) is in the files of those.
"""

import io
from collections.abc import Callable
from typing import Any

import latte_ext
import pytest
import torch
from helpers import OLD_TORCH
from latte_ext import rotary
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Sizes = tuple[tuple[int, ...], ...]


def sequences(batch: int, tokens: int, *channels: int) -> Sizes:
    return tuple((batch, 2, tokens, c) for c in channels)


def rows(batch: int, tokens: int, *others: tuple[int, ...], count: int) -> Sizes:
    return ((batch, tokens, 5),) * count + others


# Of each operator a function of tensors alone, and their sizes for a batch and a length.
OPERATORS: dict[str, tuple[Callable[..., Tensor], Callable[[int, int], Sizes]]] = {
    "latent_attention": (latte_ext.latent_attention, lambda b, t: sequences(b, t, 3, 3, 4)),
    "linear_recurrence": (
        lambda a, x: latte_ext.linear_recurrence(a.sigmoid(), x), lambda b, t: rows(b, t, count=2)
    ),
    "rg_lru": (latte_ext.rg_lru, lambda b, t: rows(b, t, (5,), count=3)),
    "short_conv": (latte_ext.short_conv, lambda b, t: rows(b, t, (5, 4), (5,), count=1)),
    "sliding_window_attention": (
        lambda q, k, v: latte_ext.sliding_window_attention(q, k, v, window=6),
        lambda b, t: sequences(b, t, 3, 3, 4),
    ),
    "macchiato_attention": (
        lambda *x: latte_ext.macchiato_attention(*x, window=6),
        lambda b, t: sequences(b, t, 6, 5, 3, 3, 4),
    ),
    "macchiato_attention, shared latents": (
        lambda q_latent, k_latent, *x: latte_ext.macchiato_attention(
            q_latent, k_latent[:, :1], *x, window=6
        ),
        lambda b, t: sequences(b, t, 6, 5, 3, 3, 4),
    ),
    "rotate": (
        lambda x: rotary.rotate(x, torch.arange(x.shape[2], device=x.device)),
        lambda b, t: sequences(b, t, 6),
    ),
}  # fmt: skip
OP = pytest.mark.parametrize("op", OPERATORS)
# Of the others test_torch_integration.py and test_mixers_torch.py test the same with more cases.
ALONE_HERE = pytest.mark.parametrize(
    "op", [op for op in OPERATORS if op.startswith(("sliding_window", "macchiato", "rotate"))]
)


@pytest.fixture(autouse=True)
def fresh_compiler(fixed_surroundings: None) -> None:
    torch.compiler.reset()


def inputs_of(op: str, batch: int = 2, tokens: int = 20) -> list[Tensor]:
    return [torch.randn(size) for size in OPERATORS[op][1](batch, tokens)]


def solve(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The result, and the gradient of each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(torch.ones_like(y))
    return [y.detach(), *(x.grad for x in leaves)]  # type: ignore[list-item]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=0.0)


@pytest.mark.supports("meta tensors")
@ALONE_HERE
def test_meta_tensors(op: str) -> None:
    function, inputs = OPERATORS[op][0], inputs_of(op)
    for got, want in zip(
        solve(function, [x.to("meta") for x in inputs]), solve(function, inputs), strict=True
    ):
        assert got.device.type == "meta"
        assert (got.shape, got.dtype) == (want.shape, want.dtype)


@pytest.mark.supports("compile: forward and backward, fullgraph")
@OP
def test_compile(op: str) -> None:
    """One graph for two sizes, none of which is a number of channels: those would be one symbol."""
    function = OPERATORS[op][0]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    stance = "default"
    for batch, tokens in ((7, 20), (9, 70)):
        inputs = inputs_of(op, batch, tokens)
        with torch.compiler.set_stance(stance):
            got = solve(compiled, inputs)
        torch.testing.assert_close(got, solve(function, inputs))
        stance = "fail_on_recompile"


class Module(torch.nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.function = OPERATORS[op][0]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@pytest.mark.supports("export, save and load, dynamic sizes")
@OP
def test_export(op: str) -> None:
    if OLD_TORCH and "shared" in op:
        pytest.skip("torch 2.6 takes the batch of repeated latents for fixed")
    function, inputs = OPERATORS[op][0], inputs_of(op, 3, 20)
    other = inputs_of(op, 4, 70)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    names = {3: batch, 20: tokens}
    shapes = [
        {i: names[n] for i, n in enumerate(x.shape) if n in names and x.shape[i] != y.shape[i]}
        for x, y in zip(inputs, other, strict=True)
    ]
    program = torch.export.export(Module(op), tuple(inputs), dynamic_shapes=(tuple(shapes),))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert_same([loaded(*other)], [function(*other)])


@pytest.mark.supports("autocast (CPU)")
@ALONE_HERE
def test_autocast(op: str) -> None:
    """Nothing is rounded that did not come in half precision."""
    function, inputs = OPERATORS[op][0], inputs_of(op)

    def inside(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*x)

    assert_same(solve(inside, inputs), solve(function, inputs))


@pytest.mark.supports("activation checkpointing")
@ALONE_HERE
def test_checkpoint(op: str) -> None:
    function, inputs = OPERATORS[op][0], inputs_of(op)

    def again(*x: Tensor) -> Any:
        return checkpoint(function, *x, use_reentrant=False)

    assert_same(solve(again, inputs), solve(function, inputs))


@pytest.mark.supports("use_deterministic_algorithms: the same bits again")
@OP
def test_deterministic(op: str) -> None:
    assert torch.are_deterministic_algorithms_enabled()  # in all tests
    function, inputs = OPERATORS[op][0], inputs_of(op, 2, 300)
    assert_same(solve(function, inputs), solve(function, inputs))
