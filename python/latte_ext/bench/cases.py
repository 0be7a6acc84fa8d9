# SPDX-License-Identifier: Apache-2.0
"""What is measured: groups of rows, each a function of a `Bench`.

Work is counted as 4 L D operations per token and head forward and 12 L D backward, whatever the
kernels really do. Kernels are called with their outputs allocated beforehand, since the first touch
of fresh memory costs the system up to a third of a forward pass; comparisons with other libraries
go through the public functions on both sides.

Notation: B batch, T tokens, H heads, L latents per head, D value channels per head.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..functional import latent_attention, latent_attention_step
from ..state import LatentState
from . import peers
from .measure import Call, Sample, Spread, elapsed, interleave, ratios, shares, spread, times

FORWARD, BACKWARD = "forward", "backward"
# Of decode steps and comparisons with peers: heads, and latents and channels of each.
HEADS, WIDTH = 8, 64
_OPERATIONS = {FORWARD: 4, BACKWARD: 12}


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `TINY` only proves that everything runs."""

    name: str
    repeats: int
    budget: float  # seconds of repeats per set of interleaved calls
    tokens: int  # of a sequence with several heads
    long: int  # of a sequence with a single head
    lengths: tuple[int, ...]  # for the time per token
    peer_lengths: tuple[int, ...]
    cache: int  # tokens of the softmax cache
    memory: int  # most bytes of a buffer larger than the last-level cache
    slow: bool  # whether to measure compiled peers, and the gradient of softmax attention


FULL = Sizes(
    "full", 15, 3.0, 8192, 65536, tuple(2**i for i in range(10, 23)),
    tuple(2**i for i in range(7, 14)), 65536, 2**30, True,
)  # fmt: skip
QUICK = Sizes(
    "quick", 5, 0.5, 8192, 65536, tuple(2**i for i in range(10, 21, 2)),
    (128, 256, 1024, 4096), 65536, 2**28, False,
)  # fmt: skip
TINY = Sizes("tiny", 1, 0.0, 128, 256, (128, 256), (64, 128), 256, 2**21, False)
SIZES = {sizes.name: sizes for sizes in (FULL, QUICK, TINY)}


@dataclass(frozen=True)
class Row:
    """One measured number.

    Args:
        key: "group/what/threads", what `targets` look for.
        label: the same for a reader.
        unit: "of peak", "times", "us", "ns/token" or "of copy".
        value, low, high: median and quartiles of the repeats.
        threads, clock: how it was timed; "cpu" is the CPU time of the calling thread.
        ns_per_token, rate, intensity: time, operations per second, and operations per byte of
            inputs and outputs, where they make sense.
    """

    key: str
    label: str
    unit: str
    value: float
    low: float
    high: float
    repeats: int
    threads: int
    clock: str
    ns_per_token: float | None = None
    rate: float | None = None
    intensity: float | None = None


@dataclass
class Bench:
    """Settings, and what has been measured so far."""

    sizes: Sizes
    threads: int
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def sample(self, calls: Mapping[str, Call]) -> dict[str, list[Sample]]:
        return interleave(calls, repeats=self.sizes.repeats, budget=self.sizes.budget)

    def add(self, key: str, label: str, unit: str, value: Spread, call: Call, **more: Any) -> None:
        self.rows.append(Row(key, label, unit, *value, call.threads, call.clock, **more))

    def thread_counts(self) -> dict[str, int]:
        return {"1": 1} if self.threads == 1 else {"1": 1, "all": self.threads}


def _shifted(shape: Sequence[int], dtype: torch.dtype, offset: int) -> Tensor:
    """An uninitialised tensor that starts `offset` bytes after a multiple of 64."""
    size = torch.Size(shape).numel()
    buffer = torch.empty(size + 128 // dtype.itemsize, dtype=dtype)
    first = ((offset - buffer.data_ptr()) % 64) // dtype.itemsize
    return buffer[first : first + size].view(*shape)


class Problem:
    """Inputs and outputs of the kernels: q, k, dq, dk (B,H,T,L) and v, y, dy, dv (B,H,T,D).

    Args:
        shape: (B, H, T, L, D).
        causal: which of the two forms.
        dtype: of all tensors.
        offset: bytes by which every tensor starts after a multiple of 64.
        time_major: stored as (B,T,H,.), the view that a projection gives.
        rise: what a key grows by from token to token.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int, int],
        *,
        causal: bool = True,
        dtype: torch.dtype = torch.float32,
        offset: int = 0,
        time_major: bool = False,
        rise: float = 0.0,
    ) -> None:
        batch, heads, tokens, latents, dim = shape
        self.shape, self.causal = shape, causal
        self.work = batch * heads * tokens * latents * dim
        self.tokens = batch * tokens
        generator = torch.Generator().manual_seed(0)

        def tensor(channels: int, *, random: bool) -> Tensor:
            order = (batch, tokens, heads) if time_major else (batch, heads, tokens)
            x = _shifted((*order, channels), dtype, offset)
            if random:
                # Repeated beyond some length: drawing is slower than what is measured.
                period = min(tokens, 2**16)
                values = torch.randn(batch, heads, period, channels, generator=generator)
                view = x.transpose(1, 2) if time_major else x
                for piece in view.split(period, 2):
                    piece.copy_(values[:, :, : piece.shape[2]])
            else:
                x.zero_()
            return x.transpose(1, 2) if time_major else x

        self.q, self.k = tensor(latents, random=True), tensor(latents, random=True)
        self.v, self.y = tensor(dim, random=True), tensor(dim, random=False)
        if rise:
            self.k += rise * torch.arange(tokens).view(-1, 1)
        self._tensor = tensor

    def forward(self, threads: int) -> None:
        """y through the compiled core."""
        _core.latent_attention(
            self.q, self.k, self.v, None, None, None, None, None, self.causal, 1.0, threads,
            (self.y, None, None, None),
        )  # fmt: skip

    @functools.cached_property
    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dy, and memory for dq, dk and dv."""
        latents, dim = self.shape[3:]
        dy, dv = self._tensor(dim, random=True), self._tensor(dim, random=False)
        dq, dk = self._tensor(latents, random=False), self._tensor(latents, random=False)
        return dy, dq, dk, dv

    def backward(self, threads: int) -> None:
        """dq, dk and dv through the compiled core."""
        dy, dq, dk, dv = self.gradients
        _core.latent_attention_backward(
            self.q, self.k, self.v, None, None, None, None, None, dy, None, None, self.causal,
            1.0, threads, (dq, dk, dv, None, None),
        )  # fmt: skip

    def both(self, threads: int) -> None:
        self.forward(threads)
        self.backward(threads)

    def call(self, which: str, threads: int, *, wall: bool = False) -> Call:
        """A call of the forward, backward or both passes."""
        return Call(functools.partial(getattr(self, which), threads), threads, wall)

    def operations(self, which: str) -> int:
        return _OPERATIONS[which] * self.work

    def intensity(self, which: str) -> float:
        """Operations per byte of inputs and outputs."""
        latents, dim = self.shape[3:]
        per_token = 2 * latents + 2 * dim if which == FORWARD else 4 * latents + 3 * dim
        return _OPERATIONS[which] * latents * dim / (per_token * self.q.element_size())


def _name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _share_rows(
    bench: Bench, group: str, problem: Problem, which: Sequence[str], what: str
) -> None:
    """Rows "group/pass/what/threads": the shares of the peak."""
    for suffix, threads in bench.thread_counts().items():
        calls = {name: problem.call(name, threads) for name in which}
        for name, samples in bench.sample(calls).items():
            seconds = times(samples).value
            bench.add(
                f"{group}/{name}/{what}/{suffix}", f"{group} {name} {what}", "of peak",
                shares(samples, problem.operations(name)), calls[name],
                ns_per_token=1e9 * seconds / problem.tokens,
                rate=problem.operations(name) / seconds, intensity=problem.intensity(name),
            )  # fmt: skip


def _ratio_rows(
    bench: Bench, group: str, label: str, above: Problem, below: Problem, which: Sequence[str]
) -> None:
    """Rows "group/pass": the time of one problem over that of another, on one thread."""
    for name in which:
        calls = {"above": above.call(name, 1), "below": below.call(name, 1)}
        samples = bench.sample(calls)
        value = ratios(samples["above"], samples["below"])
        bench.add(f"{group}/{name}", f"{label}, {name}", "times", value, calls["above"])


def causal(bench: Bench) -> None:
    """Causal forward and backward, and both over forward."""
    for heads, latents in ((8, 64), (8, 128), (4, 32)):
        problem = Problem((1, heads, bench.sizes.tokens, latents, 64))
        _share_rows(bench, "causal", problem, (FORWARD, BACKWARD), _name(problem.shape))
        for suffix, threads in bench.thread_counts().items():
            calls = {name: problem.call(name, threads) for name in ("both", FORWARD)}
            samples = bench.sample(calls)
            bench.add(
                f"training/{_name(problem.shape)}/{suffix}",
                f"forward + backward over forward {_name(problem.shape)}", "times",
                ratios(samples["both"], samples[FORWARD]), calls["both"],
            )  # fmt: skip


def odd(bench: Bench) -> None:
    """Heads whose sizes fill no vector."""
    for latents, dim in ((43, 43), (10, 32)):
        problem = Problem((1, 8, bench.sizes.tokens // 2, latents, dim))
        _share_rows(bench, "odd", problem, (FORWARD, BACKWARD), f"{latents}x{dim}")


def bidirectional(bench: Bench) -> None:
    problem = Problem((1, 8, bench.sizes.tokens, 64, 64), causal=False)
    _share_rows(bench, "bidirectional", problem, (FORWARD, BACKWARD), _name(problem.shape))


def scaling(bench: Bench) -> None:
    """All threads over one: over the heads of a sequence, and within a single head."""
    if bench.threads == 1:
        bench.notes.append("no scaling: one thread")
        return
    shapes = {"heads": (1, 8, bench.sizes.tokens, 64, 64), "long": (1, 1, bench.sizes.long, 64, 64)}
    for group, shape in shapes.items():
        problem = Problem(shape)
        for which in (FORWARD, BACKWARD):
            calls = {
                "1": problem.call(which, 1, wall=True),
                "all": problem.call(which, bench.threads),
            }
            samples = bench.sample(calls)
            bench.add(
                f"{group}/{which}", f"{bench.threads} threads over 1, {which} {_name(shape)}",
                "times", ratios(samples["1"], samples["all"]), calls["all"],
            )  # fmt: skip


def order(bench: Bench) -> None:
    shape = (1, 8, bench.sizes.tokens, 64, 64)
    above, below = Problem(shape, time_major=True), Problem(shape)
    _ratio_rows(bench, "order", "(B,T,H,.) over (B,H,T,.)", above, below, (FORWARD, BACKWARD))


def rising(bench: Bench) -> None:
    """Keys that keep raising the running maximum."""
    shape = (1, 8, bench.sizes.tokens, 64, 64)
    below = Problem(shape)
    for rise in (50.0, 1.0, 0.25):
        label = f"keys rising by {rise:g} per token over random keys"
        above = Problem(shape, rise=rise)
        _ratio_rows(bench, f"rising/{rise:g}", label, above, below, (FORWARD, BACKWARD))


def half(bench: Bench) -> None:
    shape = (1, 8, bench.sizes.tokens, 64, 64)
    below = Problem(shape)
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        above = Problem(shape, dtype=dtype)
        label = f"{name} over float32"
        _ratio_rows(bench, f"half/{name}", label, above, below, (FORWARD, BACKWARD))


def alignment(bench: Bench) -> None:
    """Tensors that start at a multiple of 64 bytes, and of 16 only."""
    for offset, what in ((0, "aligned 64"), (16, "aligned 16")):
        problem = Problem((1, 8, bench.sizes.tokens, 64, 64), offset=offset)
        _share_rows(bench, "alignment", problem, (FORWARD, BACKWARD), what)


def narrow(bench: Bench) -> None:
    """`alignment` with the x86-64-v3 kernels, in a process of their own."""
    isa = "x86-64-v3"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = ["bench", "--size", bench.sizes.name, "--groups", "alignment", "--json", path]
        run = subprocess.run(
            [sys.executable, "-m", "latte_ext", *map(str, command)],
            env=os.environ | {"LATTE_CPU_ISA": isa, "OMP_NUM_THREADS": str(bench.threads)},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            bench.notes.append(f"no {isa}: {run.stderr.strip().splitlines()[-1]}")
            return
        result = json.loads(path.read_text())
    bench.notes.append(f"{isa}: shares of its own peak, {peak_text(result['machine']['peak'])}")
    for row in result["rows"]:
        named = {"key": f"{isa}/{row['key']}", "label": f"{isa} {row['label']}", "intensity": None}
        bench.rows.append(Row(**(row | named)))


def lengths(bench: Bench) -> None:
    """Time per token of a single head from short to long sequences."""
    points: list[tuple[int, float]] = []
    share: list[float] = []
    for tokens in bench.sizes.lengths:
        problem = Problem((1, 1, tokens, 64, 64))
        call = problem.call(FORWARD, 1)
        samples = bench.sample({"": call})[""]
        seconds, value = times(samples), shares(samples, problem.operations(FORWARD))
        points.append((tokens, 1e9 * seconds.value / tokens))
        share.append(value.value)
        bench.add(
            f"length/{tokens}", f"one head, T = {tokens:,}", "of peak", value, call,
            ns_per_token=points[-1][1],
        )  # fmt: skip
    bench.curves["latte, one head, 1 thread"] = points
    bench.add(
        "flat", f"slowest over fastest token, T = {points[0][0]:,} to {points[-1][0]:,}, "
        "relative to the peak around each", "times", spread([max(share) / min(share)]), call,
    )  # fmt: skip


@torch.inference_mode()
def decode(bench: Bench) -> None:
    """One token: here, in plain torch, and softmax attention over a cache."""
    q, k, v = torch.randn(3, 1, HEADS, WIDTH)
    _, state = latent_attention(*torch.randn(3, 1, HEADS, 64, WIDTH), return_state=True)
    plain = state.clone().tensors()
    keys, values = torch.randn(2, 1, HEADS, bench.sizes.cache, WIDTH)
    threads = bench.threads
    calls = {
        "latte": Call(lambda: latent_attention_step(q, k, v, state), threads, True),
        "torch": Call(lambda: peers.step_in_place(q, k, v, plain), threads, True),
        "sdpa": Call(lambda: peers.softmax_full(q.unsqueeze(2), keys, values), threads, True),
    }
    labels = {
        "latte": "latent_attention_step",
        "torch": "the same in plain torch",
        "sdpa": f"softmax attention over {bench.sizes.cache:,} cached tokens",
    }
    for name, samples in bench.sample(calls).items():
        seconds = spread([1e6 * sample.seconds for sample in samples])
        bench.add(f"decode/{name}", f"decode step, {labels[name]}", "us", seconds, calls[name])


def last_level_cache() -> int:
    """Bytes of the largest cache that Linux reports, 32 MiB where it does not."""
    units = {"K": 2**10, "M": 2**20}
    sizes = [2**25]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units.get(text[-1], 1))
    return max(sizes)


def buffer_bytes(sizes: Sizes) -> int:
    """Twice the last-level cache, within the memory that the run may take."""
    return min(2 * last_level_cache(), sizes.memory)


def memory_calls(size: int, threads: int) -> dict[str, Call]:
    """Calls that read and write `size` bytes in all: a copy, and a pass over a buffer in place.

    A plain copy reads the memory that it is about to overwrite, which counts here as nothing, so
    the pass in place is the stricter yardstick on most machines.
    """
    source, target = torch.ones(2, size // 8)
    return {
        "copy": Call(lambda: target.copy_(source), threads, True),
        "in place": Call(source.neg_, threads, True),
    }


@torch.inference_mode()
def states(bench: Bench) -> None:
    """Decode steps of so many sequences that the states come from memory: read and written."""
    size = buffer_bytes(bench.sizes)
    sequences = max(1, size // 2 // (HEADS * WIDTH * (WIDTH + 2) * 4))
    state = LatentState.empty(sequences, HEADS, WIDTH, WIDTH)
    q, k, v = torch.randn(3, sequences, HEADS, WIDTH)
    for suffix, threads in bench.thread_counts().items():
        calls = {
            "step": Call(lambda: latent_attention_step(q, k, v, state), threads, True),
        } | memory_calls(size, threads)
        samples = bench.sample(calls)
        traffic = 2 * state.nbytes
        value = spread(
            [
                traffic / step.seconds / (size / min(copy.seconds, in_place.seconds))
                for step, copy, in_place in zip(*samples.values(), strict=True)
            ]
        )
        bench.add(
            f"states/{suffix}", f"decode step of {sequences:,} sequences, "
            f"{state.nbytes / 2**20:.0f} MiB of states, bytes per second", "of copy", value,
            calls["step"], ns_per_token=1e9 * times(samples["step"]).value / sequences,
        )  # fmt: skip


def _optional(bench: Bench, name: str, make: Callable[[], Call]) -> Call | None:
    """The call of a peer, tried once, or None and a note: no peer may break the run."""
    try:
        call = make()
        elapsed(call)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        note = f"no {name}: {lines[0][:160]}"
        if note not in bench.notes:
            bench.notes.append(note)
        return None
    return call


def optional_calls(
    bench: Bench, makers: Mapping[str, Callable[[], Call]], calls: dict[str, Call]
) -> None:
    for name, make in makers.items():
        call = _optional(bench, name, make)
        if call is not None:
            calls[name] = call


@torch.no_grad()
def against(bench: Bench) -> None:
    """Forward passes of everything that computes the same, or replaces it, at rising length."""
    threads, sizes = bench.threads, bench.sizes
    for tokens in sizes.peer_lengths:
        q, k, v = torch.randn(3, 1, HEADS, tokens, WIDTH)
        causal_and_full: dict[str, Callable[..., Tensor]] = {
            "latte": latent_attention,
            "sdpa": peers.softmax_causal,
            "latte full": functools.partial(latent_attention, causal=False),
            "sdpa full": peers.softmax_full,
        }
        calls: dict[str, Call] = {}
        for suffix, dtype in (("", torch.float32), (" bfloat16", torch.bfloat16)):
            triple = [x.to(dtype) for x in (q, k, v)]
            for name, function in causal_and_full.items():
                calls[name + suffix] = Call(functools.partial(function, *triple), threads, True)
        attentions: dict[str, Callable[[], peers.Attention]] = {
            "torch loop": lambda: peers.looped,
            "torch batched": lambda: peers.batched,
            "fla linear": peers.fla_linear,
        }
        # For one length only, since every other one would be compiled again.
        if sizes.slow and tokens == max(sizes.peer_lengths):
            attentions["torch loop compiled"] = peers.compiled_looped
            attentions["torch batched compiled"] = peers.compiled_batched
            attentions["flex"] = functools.partial(peers.flex_causal, tokens)
        makers: dict[str, Callable[[], Call]] = {
            name: functools.partial(_attention_call, make, (q, k, v), threads)
            for name, make in attentions.items()
        }
        makers["jax scan"] = functools.partial(_jax_call, (q, k, v), threads)
        optional_calls(bench, makers, calls)
        _peer_rows(bench, "peers", tokens, calls, curves=True)


def _attention_call(
    make: Callable[[], peers.Attention], inputs: Sequence[Tensor], threads: int
) -> Call:
    return Call(functools.partial(make(), *inputs), threads, True)


def _jax_call(inputs: Sequence[Tensor], threads: int) -> Call:
    return Call(peers.jax_scan(*inputs), threads, True)


# Which of our forms stands beside which peer; the causal one otherwise.
_COUNTERPART = {
    "sdpa full": "latte full",
    "sdpa bfloat16": "latte bfloat16",
    "sdpa full bfloat16": "latte full bfloat16",
}


def _peer_rows(
    bench: Bench, group: str, tokens: int, calls: Mapping[str, Call], *, curves: bool
) -> None:
    samples = bench.sample(calls)
    for name, call in calls.items():
        per_token = 1e9 * times(samples[name]).value / tokens
        if curves:
            bench.curves.setdefault(name, []).append((tokens, per_token))
        if name.startswith("latte"):
            bench.add(
                f"{group}/{tokens}/{name}", f"{name}, T = {tokens:,}", "ns/token",
                spread([1e9 * sample.seconds / tokens for sample in samples[name]]), call,
                ns_per_token=per_token,
            )  # fmt: skip
            continue
        ours = _COUNTERPART.get(name, "latte")
        bench.add(
            f"{group}/{tokens}/{name}", f"{name} over {ours}, T = {tokens:,}", "times",
            ratios(samples[name], samples[ours]), call, ns_per_token=per_token,
        )  # fmt: skip


def training(bench: Bench) -> None:
    """Forward and backward of the peers over ours."""
    tokens, threads = bench.sizes.tokens, bench.threads
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, HEADS, tokens, WIDTH).unbind()]
    dy = torch.randn(1, HEADS, tokens, WIDTH)

    def both(attention: Callable[..., Tensor]) -> Call:
        return Call(lambda: torch.autograd.grad(attention(*inputs), inputs, dy), threads, wall=True)

    calls = {
        "latte": both(latent_attention),
        "torch loop": both(peers.looped),
        "torch batched": both(peers.batched),
    }
    if bench.sizes.slow:
        calls["sdpa"] = both(peers.softmax_causal)
        makers = {
            "torch loop compiled": lambda: both(peers.compiled_looped()),
            "torch batched compiled": lambda: both(peers.compiled_batched()),
        }
        optional_calls(bench, makers, calls)
    _peer_rows(bench, "training peers", tokens, calls, curves=False)


def peak_text(peak: Mapping[str, float]) -> str:
    """The measured peaks in words."""
    return ", ".join(
        f"{rate / 1e9:,.0f} Gflop/s on {'1 thread' if name == '1' else 'all threads'}"
        for name, rate in peak.items()
    )


GROUPS: dict[str, Callable[[Bench], None]] = {
    "causal": causal,
    "odd": odd,
    "bidirectional": bidirectional,
    "scaling": scaling,
    "order": order,
    "rising": rising,
    "half": half,
    "narrow": narrow,
    "lengths": lengths,
    "decode": decode,
    "states": states,
    "peers": against,
    "training": training,
}
# Run on request only: `narrow` asks for it.
EXTRA_GROUPS: dict[str, Callable[[Bench], None]] = {"alignment": alignment}
