# SPDX-License-Identifier: Apache-2.0
"""Recurrences and convolutions, which move memory: shares of the bandwidth of a copy, and peers.

What counts is what has to move: every input and output once. The kernels may move more, such as h
of every token for a backward pass.

Notation: B batch, T tokens, C channels, K convolution width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _core
from ..convolution import short_conv
from ..recurrence import linear_recurrence, rg_lru
from .cases import BACKWARD, FORWARD, Bench, buffer_bytes, memory_calls, optional_calls
from .measure import Call, ratios, spread, times

_CHANNELS, _WIDTH = 512, 4
# Tensors (B,T,C) that have to be read or written, forward and backward.
_MOVED = {"linear_recurrence": (3, 5), "rg_lru": (4, 7), "short_conv": (2, 3)}


class Buffers:
    """Kernel calls on memory that is allocated beforehand: tensors (1,T,C)."""

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        def tensor() -> Tensor:
            return torch.randn(1, tokens, _CHANNELS).to(dtype)

        self.x, self.gate_a, self.gate_x, self.dy = (tensor() for _ in range(4))
        self.y, self.dx, self.d_gate_a, self.d_gate_x = (tensor() for _ in range(4))
        self.a = torch.sigmoid(tensor() + 2)
        # What a backward pass reads: the output itself, or its float32 form for half precision.
        self.h = self.y if dtype == torch.float32 else torch.randn(1, tokens, _CHANNELS)
        self.log_lambda, self.d_log_lambda = torch.full((_CHANNELS,), -4.0), torch.zeros(_CHANNELS)
        self.weight, self.bias = torch.randn(_CHANNELS, _WIDTH), torch.randn(_CHANNELS)
        self.d_weight, self.d_bias = torch.zeros_like(self.weight), torch.zeros(_CHANNELS)
        self.bytes = self.x.nbytes

    def linear_recurrence(self, threads: int, which: str) -> None:
        if which == FORWARD:
            _core.linear_recurrence(self.a, self.x, None, None, False, threads, (self.y, None))
        else:
            _core.linear_recurrence_backward(
                self.a, None, self.h, None, None, self.dy, None, False, threads,
                (self.d_gate_a, self.dx, None),
            )  # fmt: skip

    def rg_lru(self, threads: int, which: str) -> None:
        inputs = (self.x, self.gate_a, self.gate_x, self.log_lambda)
        if which == FORWARD:
            _core.rg_lru(*inputs, None, None, None, None, False, threads, (self.y, None))
        else:
            _core.rg_lru_backward(
                *inputs, None, None, None, None, self.h, self.dy, None, False, threads,
                (self.dx, self.d_gate_a, self.d_gate_x, self.d_log_lambda, None),
            )  # fmt: skip

    def short_conv(self, threads: int, which: str) -> None:
        if which == FORWARD:
            _core.short_conv(
                self.x, self.weight, self.bias, None, None, True, threads, (self.y, None)
            )
        else:
            _core.short_conv_backward(
                self.x, self.weight, self.bias, None, None, self.dy, None, True, threads,
                (self.dx, self.d_weight, self.d_bias, None),
            )  # fmt: skip


def recurrences(bench: Bench) -> None:
    """Bytes per second over those of a copy, and over those of a pass in place."""
    size = buffer_bytes(bench.sizes)
    tokens = max(8, size // (4 * _CHANNELS))
    for dtype in (torch.float32, torch.bfloat16):
        buffers = Buffers(tokens, dtype)
        what = str(dtype).removeprefix("torch.")
        for suffix, threads in bench.thread_counts().items():
            yardsticks = memory_calls(2 * size, threads)
            for op, moved in _MOVED.items():
                _bandwidth_rows(bench, buffers, op, moved, what, suffix, threads, yardsticks)


def _bandwidth_rows(
    bench: Bench,
    buffers: Buffers,
    op: str,
    moved: tuple[int, int],
    what: str,
    suffix: str,
    threads: int,
    yardsticks: dict[str, Call],
) -> None:
    def call(which: str) -> Call:
        return Call(lambda: getattr(buffers, op)(threads, which), threads, True)

    calls = {which: call(which) for which in (FORWARD, BACKWARD)} | yardsticks
    samples = bench.sample(calls)
    tokens = buffers.x.shape[1]
    size = 2 * buffer_bytes(bench.sizes)
    for which, count in zip((FORWARD, BACKWARD), moved, strict=True):
        for name in yardsticks:
            value = spread([
                (count * buffers.bytes / ours.seconds) / (size / theirs.seconds)
                for ours, theirs in zip(samples[which], samples[name], strict=True)
            ])  # fmt: skip
            bench.add(
                f"recurrences/{op}/{which}/{what}/{name}/{suffix}",
                f"{op} {which}, {what}, T = {tokens:,}, C = {_CHANNELS}, over a pass by {name}"
                if name != "copy" else
                f"{op} {which}, {what}, T = {tokens:,}, C = {_CHANNELS}",
                "of copy", value, calls[which],
                ns_per_token=1e9 * times(samples[which]).value / tokens,
            )  # fmt: skip


def loop(a: Tensor, b: Tensor) -> Tensor:
    """The recurrence in plain torch, token by token."""
    rows, h = [], torch.zeros_like(b[:, 0])
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = torch.addcmul(b_t, a_t, h)
        rows.append(h)
    return torch.stack(rows, 1)


def gates(x: Tensor, gate_a: Tensor, gate_x: Tensor, log_lambda: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of RG-LRU in plain torch."""
    log_a = -8 * torch.sigmoid(gate_a) * F.softplus(log_lambda)
    root = torch.sqrt(-torch.expm1(2 * log_a))
    first = torch.arange(x.shape[1]).view(-1, 1) == 0
    return log_a.exp(), torch.where(first, 1, root) * torch.sigmoid(gate_x) * x


def _combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return left[0] * right[0], right[0] * left[1] + right[1]


def compiled_scan() -> Callable[[Tensor, Tensor], Tensor]:
    """torch's associative scan, compiled."""
    scan: Any = importlib.import_module("torch._higher_order_ops.associative_scan").associative_scan

    def recurrence(a: Tensor, b: Tensor) -> Tensor:
        h: Tensor = scan(_combine, (a, b), dim=1, combine_mode="generic")[1]
        return h

    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(recurrence, dynamic=False)
    return compiled


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The causal convolution by torch."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0]).transpose(1, 2)


def recurrence_peers(bench: Bench) -> None:
    """Time of what torch offers over ours, through the public functions, forward and backward."""
    tokens, threads = bench.sizes.tokens, bench.threads
    x, gate_a, gate_x, dy = torch.randn(4, 1, tokens, _CHANNELS).unbind()
    a = torch.sigmoid(gate_a + 2)
    log_lambda = torch.full((_CHANNELS,), -4.0)
    weight, bias = torch.randn(_CHANNELS, _WIDTH), torch.randn(_CHANNELS)
    inputs = {
        "linear_recurrence": (a, x),
        "rg_lru": (x, gate_a, gate_x, log_lambda),
        "short_conv": (x, weight, bias),
    }
    peers: dict[str, dict[str, Callable[[], Callable[..., Tensor]]]] = {
        "linear_recurrence": {
            "ours": lambda: linear_recurrence,
            "torch loop": lambda: loop,
        },
        "rg_lru": {
            "ours": lambda: rg_lru,
            "torch loop": lambda: lambda *args: loop(*gates(*args)),
        },
        "short_conv": {"ours": lambda: short_conv, "torch conv1d": lambda: conv1d},
    }
    if bench.sizes.slow:
        peers["linear_recurrence"]["associative_scan compiled"] = compiled_scan
    for op, tensors in inputs.items():
        leaves = [t.clone().requires_grad_() for t in tensors]

        def forward(
            function: Callable[..., Tensor], tensors: tuple[Tensor, ...] = tensors
        ) -> object:
            with torch.no_grad():
                return function(*tensors)

        def both(function: Callable[..., Tensor], leaves: list[Tensor] = leaves) -> object:
            return torch.autograd.grad(function(*leaves), leaves, dy)

        for which, run in ((FORWARD, forward), ("training", both)):

            def make(
                maker: Callable[[], Callable[..., Tensor]],
                run: Callable[[Callable[..., Tensor]], object] = run,
            ) -> Callable[[], Call]:
                def build() -> Call:
                    function = maker()
                    run(function)
                    return Call(lambda: run(function), threads, True)

                return build

            calls: dict[str, Call] = {}
            optional_calls(bench, {n: make(maker) for n, maker in peers[op].items()}, calls)
            samples = bench.sample(calls)
            for name, call in calls.items():
                if name != "ours":
                    bench.add(
                        f"recurrence peers/{op}/{which}/{name}",
                        f"{name} over {op}, {which}, T = {tokens:,}, C = {_CHANNELS}", "times",
                        ratios(samples[name], samples["ours"]), call,
                        ns_per_token=1e9 * times(samples[name]).value / tokens,
                    )  # fmt: skip


GROUPS: dict[str, Callable[[Bench], None]] = {
    "recurrences": recurrences,
    "recurrence peers": recurrence_peers,
}
