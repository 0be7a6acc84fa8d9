# SPDX-License-Identifier: Apache-2.0
"""Proves an installation: the compiled operators against the float64 reference, in seconds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import _core, reference
from ._device import EMULATED, unusable
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


class Setting(NamedTuple):
    """Where the operators run, and on how much."""

    device: str = "cpu"
    tokens: int = 130
    sizes: tuple[tuple[int, int], ...] = ((10, 32), (43, 43), (64, 64))  # L, D

    @property
    def on_cuda(self) -> bool:
        return EMULATED or self.device == "cuda"


# Two chunks of every kernel, for tools that make each instruction a thousand times slower.
SMALL = Setting(tokens=70, sizes=((16, 32),))


def _inputs(setting: Setting, dtype: torch.dtype, latents: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = setting.tokens
    shapes = ((2, 4, tokens, latents), (2, 2, tokens, latents), (2, 2, tokens, dim))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(setting.device, dtype)
        for shape in shapes
    ]


def _error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    return float((got - expected).abs().max() / expected.abs().max())


def _leaves(inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs, and the same values in float64 on the CPU."""
    doubles = [x.double().cpu().requires_grad_() for x in inputs]
    return [x.requires_grad_() for x in inputs], doubles


def _worst(y: Tensor, inputs: list[Tensor], expected: Tensor, doubles: list[Tensor]) -> float:
    """Largest error of y and of the gradients over the reference's largest value."""
    got = torch.autograd.grad(y.double().square().sum(), inputs)
    want = torch.autograd.grad(expected.square().sum(), doubles)
    return max(_error(y, expected), *map(_error, got, want))


def _attention(setting: Setting, dtype: torch.dtype, causal: bool) -> float:
    worst = 0.0
    for latents, dim in setting.sizes:
        inputs, doubles = _leaves(_inputs(setting, dtype, latents, dim))
        y = latent_attention(*inputs, causal=causal)
        expected, _ = reference.latent_attention(*doubles, causal=causal)
        worst = max(worst, _worst(y, inputs, expected, doubles))
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


def _operator(setting: Setting, name: str) -> float:
    operator, shapes = _OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    # tanh: a recurrence with |a| > 1 grows beyond float32.
    inputs, doubles = _leaves(
        [
            torch.randn(shape, generator=generator, dtype=torch.float64)
            .tanh()
            .to(setting.device, torch.float32)
            for shape in shapes
        ],
    )
    return _worst(operator(*inputs), inputs, operator(*doubles, backend="reference"), doubles)


def _split_and_step(setting: Setting) -> float:
    """T1: whole sequence = two pieces = token by token."""
    latents, dim = setting.sizes[-1]
    q, k, v = _inputs(setting, torch.float32, latents, dim)
    whole, _ = latent_attention(q, k, v, return_state=True)
    head, state = latent_attention(q[:, :, :51], k[:, :, :51], v[:, :, :51], return_state=True)
    tail = latent_attention(q[:, :, 51:], k[:, :, 51:], v[:, :, 51:], state=state)
    empty = LatentState.empty(2, 2, latents, dim, device=setting.device)
    steps = [
        latent_attention_step(q[:, :, t], k[:, :, t], v[:, :, t], empty)
        for t in range(setting.tokens)
    ]
    return max(
        _error(torch.cat((head, tail), dim=2), whole), _error(torch.stack(steps, dim=2), whole)
    )


class Check(NamedTuple):
    name: str
    error: Callable[[], float]
    allowed: float


def _checks(setting: Setting) -> list[Check]:
    allowed = {
        dtype: tolerance
        for dtype, tolerance in _TOLERANCE.items()
        if not (setting.on_cuda and dtype == torch.float64)
    }
    checks = [
        Check(
            f"{'causal' if causal else 'bidirectional'} {str(dtype).removeprefix('torch.')}",
            partial(_attention, setting, dtype, causal),
            tolerance,
        )
        for dtype, tolerance in allowed.items()
        for causal in (True, False)
    ]
    float32 = allowed[torch.float32]
    checks.append(Check("split and step", partial(_split_and_step, setting), float32))
    return checks + [Check(name, partial(_operator, setting, name), float32) for name in _OPERATORS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the self test's options to `parser`."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what to prove")
    parser.add_argument("--small", action="store_true", help="for compute-sanitizer")


def run(args: argparse.Namespace) -> int:
    """The self test that the options ask for."""
    return main((SMALL if args.small else Setting())._replace(device=args.device))


def main(setting: Setting | None = None) -> int:
    """Prints one line per check; 0 if all hold, 1 otherwise."""
    setting = setting or Setting()
    if setting.device == "cuda" and (unusable() or not torch.cuda.is_available()):
        print(f"[selftest] {unusable() or 'this torch cannot make CUDA tensors'}: expected a GPU")
        return 1
    place = torch.cuda.get_device_name() if setting.device == "cuda" else _core.cpu_isa()
    failures = 0
    print(f"latte_ext selftest on {place}: largest error over the largest value")
    for name, measure, allowed in _checks(setting):
        error = measure()
        passed = error <= allowed
        failures += not passed
        print(f"  {'ok  ' if passed else 'FAIL'} {name:24} {error:.1e} (allowed {allowed:.0e})")
    print("all checks hold" if not failures else f"{failures} checks FAILED")
    return 1 if failures else 0
