# SPDX-License-Identifier: Apache-2.0
"""Calls of linear_recurrence, rg_lru and short_conv, and their float64 solution.

Notation: B batch, T tokens, C channels, K width, N sequences.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import latte_ext
import torch
from helpers import assert_close, compute_dtype, on_cuda, rms, threads
from latte_ext import reference
from torch import Tensor

OPS = ("linear_recurrence", "rg_lru", "short_conv")
STATE = {"linear_recurrence": "h0", "rg_lru": "h0", "short_conv": "state"}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6}
# exp and division of float32 are approximate there.
CUDA_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5}


@dataclasses.dataclass
class Call:
    """Differentiable inputs by name, the other arguments, and cotangents of the outputs."""

    op: str
    inputs: dict[str, Tensor]
    options: dict[str, Any]
    dy: Tensor
    d_final: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Call":
        inputs = {name: function(x) for name, x in self.inputs.items()}
        return dataclasses.replace(
            self, inputs=inputs, dy=function(self.dy), d_final=function(self.d_final)
        )

    def to(self, device: torch.device | str) -> "Call":
        """The call with every tensor there."""
        options = {
            name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()
        }
        return dataclasses.replace(self.map(lambda x: x.to(device)), options=options)

    @property
    def state(self) -> str:
        return STATE[self.op]


def make_call(
    op: str,
    tokens: int = 37,
    channels: int = 20,
    *,
    batch: int = 2,
    width: int = 4,
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] | None = None,
    state: bool = False,
    masked: bool = False,
    bias: bool = True,
    seed: int = 0,
    **options: Any,
) -> Call:
    """Normally distributed inputs, decays around those of trained models."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(dtype)

    sequences = batch
    if lengths is not None:
        batch, tokens, sequences = 1, sum(lengths), len(lengths)
        borders = torch.tensor([0, *lengths], device="cpu").cumsum(0)
        options["cu_seqlens"] = borders.to(torch.int32 if seed % 2 == 0 else torch.int64)
    shape, wide = (batch, tokens, channels), compute_dtype(dtype)
    state_shape = (sequences, channels)
    causal = options.get("causal", True)
    if op == "linear_recurrence":
        inputs = {"a": (1 - 0.3 * normal(*shape).square()).clamp(-1, 1), "b": normal(*shape)}
    elif op == "rg_lru":
        inputs = {name: normal(*shape) for name in ("x", "gate_a", "gate_x")}
        inputs["log_lambda"] = normal(channels) - 4
        if masked:
            keep = torch.rand(batch, tokens, generator=generator, device="cpu") < 0.6
            options["key_mask"] = keep
    else:
        inputs = {"x": normal(*shape), "weight": normal(channels, width)}
        if bias:
            inputs["bias"] = normal(channels)
        state_shape, wide = (sequences, width - 1 if causal else 0, channels), dtype
    if state:
        inputs[STATE[op]] = normal(*state_shape, dtype=wide)
    call = Call(op, inputs, options, normal(*shape), normal(*state_shape, dtype=wide))
    return call.to(torch.get_default_device())


def library(call: Call, inputs: dict[str, Tensor], backend: str | None = None) -> Any:
    """The outputs of the public function; without a final state if it has none."""
    returns = call.options.get("causal", True)
    function = getattr(latte_ext, call.op)
    outputs = function(**inputs, **call.options, return_state=returns, backend=backend)
    return outputs if returns else (outputs,)


def oracle(call: Call, inputs: dict[str, Tensor]) -> Any:
    outputs = getattr(reference, call.op)(**inputs, **call.options)
    return outputs if call.options.get("causal", True) else outputs[:1]


def solve(call: Call, function: Callable[..., Any] = library) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in call.inputs.items()}
    outputs = function(call, leaves)
    used = [
        (output, cotangent)
        for output, cotangent in zip(outputs, (call.dy, call.d_final), strict=False)
        if output.requires_grad
    ]
    gradients = torch.autograd.grad(
        [output for output, _ in used],
        list(leaves.values()),
        [cotangent for _, cotangent in used],
        allow_unused=True,
        materialize_grads=True,
    )
    solution = dict(zip(("y", "final"), (x.detach() for x in outputs), strict=False))
    return solution | {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}


def solve_reference(call: Call) -> dict[str, Tensor]:
    """The float64 solution of the call as stored in its own dtypes."""
    with threads(1), torch.device("cpu"):
        return solve(call.to("cpu").map(Tensor.double), oracle)


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], call: Call, factor: float = 1.0
) -> None:
    """All outputs and gradients within the tolerance, relative to the size of their largest."""
    assert actual.keys() == expected.keys()
    dtype, allowed = compute_dtype(call.dy.dtype), CUDA_TOLERANCE if on_cuda() else TOLERANCE
    for name, want in expected.items():
        if not want.numel():
            assert actual[name].shape == want.shape
            continue
        size = max(want.abs().max().item(), rms(call.dy) if name.startswith("d_") else 0.0)
        assert_close(actual[name], want, tolerance=factor * allowed[dtype], scale=size, name=name)


def check(call: Call, factor: float = 1.0) -> dict[str, Tensor]:
    """Solves a call, compares with float64 and checks the dtypes; returns the solution."""
    solution = solve(call)
    assert_same(solution, solve_reference(call), call, factor)
    values = next(name for name in ("b", "x") if name in call.inputs)
    assert solution["y"].dtype == call.inputs[values].dtype
    for name, x in call.inputs.items():
        assert solution[f"d_{name}"].dtype == x.dtype
    if "final" in solution and call.op != "short_conv":
        assert solution["final"].dtype == compute_dtype(call.dy.dtype)
    return solution


def assert_identical(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(actual[name], want), f"{name} differs"
