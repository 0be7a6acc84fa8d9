# SPDX-License-Identifier: Apache-2.0
"""Proves an installation: the compiled operators against the float64 reference, in seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import _core, reference
from .convolution import short_conv
from .functional import latent_attention, latent_attention_step
from .macchiato import macchiato_attention
from .recurrence import linear_recurrence, rg_lru
from .state import LatentState
from .window import sliding_window_attention

# Rounding of the output to the dtype, plus float32 arithmetic over a few hundred tokens.
_TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}


def _inputs(dtype: torch.dtype, tokens: int, latents: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, tokens, latents), (2, 2, tokens, latents), (2, 2, tokens, dim))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def _values_and_gradients(dtype: torch.dtype, causal: bool) -> float:
    """Largest error of y, dq, dk and dv over the reference's largest value."""
    worst = 0.0
    for latents, dim in ((10, 32), (43, 43), (64, 64)):
        inputs = [x.requires_grad_() for x in _inputs(dtype, 130, latents, dim)]
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        y = latent_attention(*inputs, causal=causal)
        expected, _ = reference.latent_attention(*doubles, causal=causal)
        gradients = torch.autograd.grad(y.double().square().sum(), inputs)
        expected_gradients = torch.autograd.grad(expected.square().sum(), doubles)
        pairs = zip((y.detach(), *gradients), (expected.detach(), *expected_gradients), strict=True)
        worst = max(worst, *(_error(got, want) for got, want in pairs))
    return worst


_Operator = Callable[..., Tensor]
# Each with the shapes of its arguments.
_OPERATORS: dict[str, tuple[_Operator, tuple[tuple[int, ...], ...]]] = {
    "sliding_window_attention": (
        partial(sliding_window_attention, window=40),
        ((2, 4, 130, 43), (2, 2, 130, 43), (2, 2, 130, 32)),
    ),
    "macchiato_attention": (
        partial(macchiato_attention, window=40),
        ((2, 4, 130, 17), (2, 1, 130, 16), (2, 4, 130, 43), (2, 2, 130, 43), (2, 2, 130, 32)),
    ),
    "linear_recurrence": (linear_recurrence, ((2, 130, 43), (2, 130, 43))),
    "rg_lru": (rg_lru, ((2, 130, 43), (2, 130, 43), (2, 130, 43), (43,))),
    "short_conv": (short_conv, ((2, 130, 43), (43, 4), (43,))),
}


def _operator(name: str) -> float:
    """Largest error of a float32 operator and its gradients over the reference's largest value."""
    operator, shapes = _OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    # tanh: a recurrence with |a| > 1 grows beyond float32.
    doubles = [
        torch.randn(shape, generator=generator, dtype=torch.float64).tanh().requires_grad_()
        for shape in shapes
    ]
    inputs = [x.detach().float().requires_grad_() for x in doubles]
    y, expected = operator(*inputs), operator(*doubles, backend="reference")
    gradients = torch.autograd.grad(y.double().square().sum(), inputs)
    expected_gradients = torch.autograd.grad(expected.square().sum(), doubles)
    pairs = zip((y.detach(), *gradients), (expected.detach(), *expected_gradients), strict=True)
    return max(_error(got, want) for got, want in pairs)


def _split_and_step() -> float:
    """T1: whole sequence = two pieces = token by token."""
    q, k, v = _inputs(torch.float32, 130, 43, 43)
    whole, _ = latent_attention(q, k, v, return_state=True)
    head, state = latent_attention(q[:, :, :51], k[:, :, :51], v[:, :, :51], return_state=True)
    tail = latent_attention(q[:, :, 51:], k[:, :, 51:], v[:, :, 51:], state=state)
    empty = LatentState.empty(2, 2, 43, 43)
    steps = [latent_attention_step(q[:, :, t], k[:, :, t], v[:, :, t], empty) for t in range(130)]
    return max(
        _error(torch.cat((head, tail), dim=2), whole), _error(torch.stack(steps, dim=2), whole)
    )


def main() -> int:
    """Prints one line per check; 0 if all hold, 1 otherwise."""
    checks: list[tuple[str, Callable[[], float], float]] = [
        (
            f"{'causal' if causal else 'bidirectional'} {str(dtype).removeprefix('torch.')}",
            partial(_values_and_gradients, dtype, causal),
            tolerance,
        )
        for dtype, tolerance in _TOLERANCE.items()
        for causal in (True, False)
    ]
    checks.append(("split and step", _split_and_step, _TOLERANCE[torch.float32]))
    checks += [(name, partial(_operator, name), _TOLERANCE[torch.float32]) for name in _OPERATORS]
    failures = 0
    print(f"latte_ext selftest on {_core.cpu_isa()}: largest error over the largest value")
    for name, check, tolerance in checks:
        error = check()
        passed = error <= tolerance
        failures += not passed
        print(f"  {'ok  ' if passed else 'FAIL'} {name:24} {error:.1e} (allowed {tolerance:.0e})")
    print("all checks hold" if not failures else f"{failures} checks FAILED")
    return 1 if failures else 0
