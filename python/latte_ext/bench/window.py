# SPDX-License-Identifier: Apache-2.0
"""Windows and Macchiato: shares of the peak, and softmax attention with the same band beside them.

Work is counted over the pairs of query and key within the band only: 2 (Dk + D) operations forward
and 2.5 times that backward, whatever the kernels really do.

Notation: B batch, T tokens, H heads, D channels per head, w window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _core
from ..functional import latent_attention
from ..macchiato import macchiato_attention
from ..rotary import positions, rotate
from ..window import sliding_window_attention, sliding_window_attention_step
from ..window_cache import WindowCache
from . import peers
from .cases import HEADS, WIDTH, Bench, optional_calls
from .measure import Call, ratios, shares, spread, times

WINDOW = 128
# Mask, borders, and sinks with their positions and start.
_ABSENT = (None, None, None, None, None, None, None)


class Problem:
    """Inputs and outputs (1,H,T,D) of the window kernels, allocated beforehand."""

    def __init__(self, tokens: int, window: int) -> None:
        shape = (1, HEADS, tokens, WIDTH)
        self.q, self.k, self.v, self.dy = torch.randn(4, *shape).unbind()
        self.y, self.dq, self.dk, self.dv = torch.zeros(4, *shape).unbind()
        self.log_sum = torch.zeros(shape[:3])
        self.window = window
        seen = min(window, tokens)
        self.pairs = HEADS * (tokens * seen - seen * (seen - 1) // 2)

    def forward(self, threads: int) -> None:
        _core.sliding_window_attention(
            self.q, self.k, self.v, *_ABSENT, self.window, 0, True, WIDTH**-0.5, 0.0, False,
            threads, (self.y, self.log_sum, None),
        )  # fmt: skip

    def backward(self, threads: int) -> None:
        _core.sliding_window_attention_backward(
            self.q, self.k, self.v, *_ABSENT, self.log_sum, self.y, self.dy, None, self.window, 0,
            True, WIDTH**-0.5, 0.0, threads, (self.dq, self.dk, self.dv, None, None, None),
        )  # fmt: skip

    def operations(self, name: str) -> float:
        return (4.0 if name == "forward" else 10.0) * WIDTH * self.pairs


def kernels(bench: Bench) -> None:
    """The kernels' shares of the peak."""
    for window in (WINDOW, 4 * WINDOW):
        problem = Problem(bench.sizes.tokens, window)
        for suffix, threads in bench.thread_counts().items():
            calls = {
                name: Call(functools.partial(getattr(problem, name), threads), threads)
                for name in ("forward", "backward")
            }
            for name, samples in bench.sample(calls).items():
                seconds = times(samples).value
                bench.add(
                    f"window/{name}/{window}/{suffix}", f"window {name}, w = {window}", "of peak",
                    shares(samples, problem.operations(name)), calls[name],
                    ns_per_token=1e9 * seconds / bench.sizes.tokens,
                    rate=problem.operations(name) / seconds,
                )  # fmt: skip


def against(bench: Bench) -> None:
    """What softmax attention takes for the same band, over ours."""
    tokens, threads = bench.sizes.tokens, bench.threads
    window = min(WINDOW, tokens // 2)
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, HEADS, tokens, WIDTH).unbind()]
    dy = torch.randn(1, HEADS, tokens, WIDTH)
    ours = functools.partial(sliding_window_attention, window=window)
    blocks = functools.partial(peers.blockwise, window=window)

    plain = [x.detach() for x in inputs]

    def forward(attention: Callable[..., Tensor]) -> Call:
        return Call(lambda: attention(*plain), threads, wall=True)

    def both(attention: Callable[..., Tensor]) -> Call:
        return Call(lambda: torch.autograd.grad(attention(*inputs), inputs, dy), threads, wall=True)

    forwards = {"latte": forward(ours), "blockwise": forward(blocks)}
    if bench.sizes.slow:
        banded = functools.partial(
            F.scaled_dot_product_attention, attn_mask=peers.band_mask(tokens, window)
        )
        forwards["sdpa"] = forward(banded)
        optional_calls(
            bench, {"flex": lambda: forward(peers.flex_causal(tokens, window))}, forwards
        )
    for group, calls in (
        ("window peers", forwards),
        ("window training peers", {"latte": both(ours), "blockwise": both(blocks)}),
    ):
        samples = bench.sample(calls)
        for name, call in calls.items():
            if name != "latte":
                bench.add(
                    f"{group}/{tokens}/{name}", f"{group}: {name} over latte, w = {window}",
                    "times", ratios(samples[name], samples["latte"]), call,
                    ns_per_token=1e9 * times(samples[name]).value / tokens,
                )  # fmt: skip


def macchiato(bench: Bench) -> None:
    """The gated pair over the sum of its branches, on one thread through the public functions."""
    tokens, latents = bench.sizes.tokens, WIDTH
    inputs = [torch.randn(1, HEADS, tokens, c) for c in (1 + latents, latents)]
    inputs += torch.randn(3, 1, HEADS, tokens, WIDTH).unbind()
    q_latent, k_latent, q, k, v = (x.requires_grad_() for x in inputs)
    latent_inputs = (q_latent.detach()[..., 1:].contiguous().requires_grad_(), k_latent, v)
    dy = torch.randn(1, HEADS, tokens, WIDTH)
    branches: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "gated": (
            functools.partial(macchiato_attention, window=WINDOW),
            (q_latent, k_latent, q, k, v),
        ),
        "window": (functools.partial(sliding_window_attention, window=WINDOW), (q, k, v)),
        "latents": (latent_attention, latent_inputs),
    }

    def forward(attention: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Call:
        def call() -> None:
            with torch.no_grad():
                attention(*tensors)

        return Call(call)

    def both(attention: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Call:
        return Call(lambda: torch.autograd.grad(attention(*tensors), tensors, dy))

    for name, make in (("forward", forward), ("both", both)):
        calls = {branch: make(*what) for branch, what in branches.items()}
        samples = bench.sample(calls)
        value = spread(
            [
                gated.seconds / (window.seconds + latent.seconds)
                for gated, window, latent in zip(*samples.values(), strict=True)
            ]
        )
        bench.add(
            f"macchiato/{name}", f"macchiato {name} over the sum of its branches", "times", value,
            calls["gated"],
        )  # fmt: skip


@torch.inference_mode()
def rotations(bench: Bench) -> None:
    """Rotations over the attention that they serve, through the public functions."""
    tokens = bench.sizes.tokens
    q, k, v = torch.randn(3, 1, HEADS, tokens, WIDTH).unbind()
    position = positions(tokens)
    calls = {
        "window": Call(lambda: sliding_window_attention(q, k, v, window=WINDOW), bench.threads),
        "rotary": Call(lambda: (rotate(q, position), rotate(k, position)), bench.threads),
        "latents": Call(lambda: latent_attention(q, k, v), bench.threads),
        "VAPOR": Call(
            lambda: (rotate(v, position), rotate(v, position, inverse=True)), bench.threads
        ),
    }
    samples = bench.sample(calls)
    for name, attention in (("rotary", "window"), ("VAPOR", "latents")):
        bench.add(
            f"rotations/{name}", f"{name} rotations over {attention}, T = {tokens:,}", "times",
            ratios(samples[name], samples[attention]), calls[name],
        )  # fmt: skip


@torch.inference_mode()
def decode(bench: Bench) -> None:
    """One token against a full ring."""
    cache = WindowCache.empty(1, HEADS, WINDOW, WIDTH, WIDTH)
    cache.valid.fill_(True)
    cache.position.fill_(WINDOW)
    q, k, v = torch.randn(3, 1, HEADS, WIDTH)
    call = Call(lambda: sliding_window_attention_step(q, k, v, cache), bench.threads, True)
    seconds = [1e6 * sample.seconds for sample in bench.sample({"": call})[""]]
    bench.add(
        "window decode/latte", f"decode step, window of {WINDOW}", "us", spread(seconds), call
    )


def window(bench: Bench) -> None:
    """All of the above."""
    for part in (kernels, against, macchiato, rotations, decode):
        part(bench)


GROUPS: dict[str, Callable[[Bench], None]] = {"window": window}
