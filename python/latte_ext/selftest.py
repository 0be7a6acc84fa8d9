# SPDX-License-Identifier: Apache-2.0
"""Proves an installation: the compiled operators against the float64 reference, in seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import _core, reference
from .functional import latent_attention, latent_attention_step
from .state import LatentState

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
    failures = 0
    print(f"latte_ext selftest on {_core.cpu_isa()}: largest error over the largest value")
    for name, check, tolerance in checks:
        error = check()
        passed = error <= tolerance
        failures += not passed
        print(f"  {'ok  ' if passed else 'FAIL'} {name:24} {error:.1e} (allowed {tolerance:.0e})")
    print("all checks hold" if not failures else f"{failures} checks FAILED")
    return 1 if failures else 0
