# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext bench --device cuda`: the kernels against the device's memory and peers.

A floor is the time that reading every input and writing every output once takes at the bandwidth
that copying reaches on this device, measured in the same run. Nothing is timed before its result
agrees with the float64 reference.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import __version__, reference
from .._device import unusable
from ..convolution import short_conv
from ..functional import latent_attention, latent_attention_step
from ..recurrence import linear_recurrence, rg_lru
from ..state import LatentState
from .cuda_peers import PEERS

SCHEMA = 1
# Largest error over the largest value of the float64 result, of bfloat16 results.
ALLOWED = 2e-2
# More than any L2: it is overwritten before each call, so that inputs come from memory.
FLUSH_BYTES = 256 << 20

# Microseconds of one call.
Clock = Callable[[Callable[[], object]], float]


class Sizes(NamedTuple):
    """What is measured: (B,H,T,L,D) of attention, (B,T,C) of recurrences, states of a step."""

    attention: tuple[tuple[int, int, int, int, int], ...]
    recurrence: tuple[int, int, int]
    states: tuple[int, int, int, int]
    copy_bytes: int
    product: int
    checked_tokens: int


SIZES = {
    "full": Sizes(
        ((8, 16, 4096, 64, 64), (1, 16, 65536, 64, 64), (4, 16, 8192, 128, 128)),
        (8, 4096, 4096), (64, 16, 64, 64), 1 << 30, 8192, 2048,
    ),
    "tiny": Sizes(
        ((2, 2, 70, 16, 16),), (2, 20, 16), (2, 2, 8, 8), 1 << 16, 64, 70,
    ),
}  # fmt: skip
SIZES["quick"] = SIZES["full"]._replace(attention=SIZES["full"].attention[:1])


class Case(NamedTuple):
    """One call of ours.

    Args:
        name, shape: what the row says.
        call: what is timed.
        bytes: inputs read and outputs written once.
        error: of a part of the result against float64.
        peers: calls that take the place of ours, by name.
    """

    name: str
    shape: str
    call: Callable[[], object]
    bytes: int
    error: Callable[[], float]
    peers: dict[str, Callable[[], object]]


@dataclasses.dataclass
class Row:
    """Microseconds, GB/s, share of the floor, error; peers in times of ours."""

    name: str
    shape: str
    us: float
    gb_per_s: float
    of_floor: float
    error: float
    peers: dict[str, float]


def device_clock(call: Callable[[], object], repeats: int = 25) -> float:
    """The median by the device's events; the launches of later calls hide behind earlier ones."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        flush.zero_()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return float(statistics.median(1e3 * start.elapsed_time(stop) for start, stop in events))


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected).abs().max() / expected.abs().max())


def _nbytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def attention_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """Causal and bidirectional, forward and, where there is a kernel, with the gradients."""
    for batch, heads, tokens, latents, dim in sizes.attention:
        q, k = (
            torch.randn(batch, heads, tokens, latents, device=device, dtype=torch.bfloat16)
            for _ in range(2)
        )
        v = torch.randn(batch, heads, tokens, dim, device=device, dtype=torch.bfloat16)
        shape = f"{batch}x{heads}x{tokens}, L {latents}, D {dim}"
        moved = 2 * _nbytes(q) + 2 * _nbytes(v)
        for causal in (True, False):
            yield Case(
                "causal" if causal else "bidirectional",
                shape,
                partial(latent_attention, q, k, v, causal=causal),
                moved,
                partial(_attention_error, q, k, v, causal, sizes.checked_tokens),
                {name: peer(q, k, v, False) for name, peer in PEERS.items()} if causal else {},
            )
        yield Case(
            "causal, with gradients",
            shape,
            partial(_with_gradients, q, k, v),
            # Inputs twice and dy in; y, dq, dk and dv out.
            2 * moved + _nbytes(q, k),
            partial(_gradient_error, q, k, v, sizes.checked_tokens),
            {name: peer(q, k, v, True) for name, peer in PEERS.items()},
        )


def _attention_error(q: Tensor, k: Tensor, v: Tensor, causal: bool, tokens: int) -> float:
    """Of the first head, up to a token that the later ones do not change."""
    y = latent_attention(q, k, v, causal=causal)[:1, :1]
    part = [x[:1, :1, :tokens] if causal else x[:1, :1] for x in (q, k, v)]
    expected, _ = reference.latent_attention(*(x.double() for x in part), causal=causal)
    return _error(y[:, :, : expected.shape[2]], expected)


def _with_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(latent_attention(*leaves), leaves, v)


def _gradient_error(q: Tensor, k: Tensor, v: Tensor, tokens: int) -> float:
    """Of the first head, on its first tokens alone."""
    part = [x[:1, :1, :tokens].contiguous() for x in (q, k, v)]
    got = _with_gradients(*part)
    wide = [x.double().requires_grad_() for x in part]
    y, _ = reference.latent_attention(*wide)
    expected = torch.autograd.grad(y, wide, wide[2].detach())
    return max(_error(a, b) for a, b in zip(got, expected, strict=True))


def step_case(sizes: Sizes, device: str) -> Case:
    """One token of many sequences: the time is that of reading and writing the states."""
    batch, heads, latents, dim = sizes.states
    state = LatentState.empty(batch, heads, latents, dim, device=device)
    q, k = (
        torch.randn(batch, heads, latents, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    v = torch.randn(batch, heads, dim, device=device, dtype=torch.bfloat16)

    def error() -> float:
        fresh = LatentState.empty(batch, heads, latents, dim, device=device)
        y = latent_attention_step(q, k, v, fresh)
        rows = (x.unsqueeze(2).double() for x in (q, k, v))
        return _error(y, reference.latent_attention(*rows)[0].squeeze(2))

    return Case(
        "step",
        f"{batch}x{heads}, L {latents}, D {dim}",
        lambda: latent_attention_step(q, k, v, state),
        2 * state.nbytes + _nbytes(q, k, v, v),
        error,
        {},
    )


def recurrence_cases(sizes: Sizes, device: str) -> Iterator[Case]:
    batch, tokens, channels = sizes.recurrence
    shape = f"{batch}x{tokens}x{channels}"
    x, gate = (torch.randn(sizes.recurrence, device=device, dtype=torch.bfloat16) for _ in range(2))
    log_lambda = torch.full((channels,), -4.0, device=device)
    weight = torch.randn(channels, 4, device=device, dtype=torch.bfloat16)
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "linear_recurrence": (linear_recurrence, (gate.sigmoid(), x)),
        "rg_lru": (rg_lru, (x, gate, gate.flip(2), log_lambda)),
        "short_conv": (short_conv, (x, weight)),
    }

    for name, (function, inputs) in calls.items():
        yield Case(
            name,
            shape,
            partial(function, *inputs),
            _nbytes(*inputs, x),
            partial(_recurrence_error, function, inputs, sizes.checked_tokens),
            {},
        )


def _recurrence_error(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], tokens: int
) -> float:
    """Of the first row, up to a token that the later ones do not change."""
    part = [x[:1, :tokens] if x.dim() == 3 else x for x in inputs]
    expected = function(*(x.double() for x in part), backend="reference")
    return _error(function(*inputs)[:1, :tokens], expected)


def cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """Every case; its tensors are made when it is asked for."""
    yield from attention_cases(sizes, device)
    yield step_case(sizes, device)
    yield from recurrence_cases(sizes, device)


def ceilings(sizes: Sizes, device: str, clock: Clock) -> dict[str, float]:
    """Bytes per second of copying, and operations per second of a bfloat16 matrix product."""
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = sizes.product
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return {
        "copy": 2 * sizes.copy_bytes / clock(lambda: target.copy_(source)) * 1e6,
        "bfloat16 product": 2 * n**3 / clock(lambda: a @ b) * 1e6,
    }


def measure(
    sizes: Sizes, device: str, clock: Clock, note: Callable[[str], None] = print
) -> tuple[dict[str, float], list[Row]]:
    """The ceilings, and a row for every case whose result is right; `note` hears of the others."""
    found = ceilings(sizes, device, clock)
    rows = []
    for case in cases(sizes, device):
        error = case.error()
        if not error <= ALLOWED:
            note(f"NOT timed: {case.name} {case.shape} is off by {error:.1e} of the largest value")
            continue
        us = clock(case.call)
        peers = {}
        for name, call in case.peers.items():
            try:
                peers[name] = clock(call) / us
            except (ImportError, RuntimeError, ValueError, TypeError) as problem:
                note(f"{name} at {case.shape}: {type(problem).__name__}: {str(problem)[:200]}")
        floor_us = 1e6 * case.bytes / found["copy"]
        rows.append(
            Row(case.name, case.shape, us, case.bytes / us / 1e3, floor_us / us, error, peers)
        )
    return found, rows


def markdown(name: str, found: dict[str, float], rows: Sequence[Row]) -> str:
    """The tables as a page; a peer's number is how many times as long it takes."""
    peers = sorted({peer for row in rows for peer in row.peers})
    head = ["", "shape", "us", "GB/s", "of the DRAM floor", "error vs float64", *peers]
    lines = [
        f"# {name}",
        "",
        f"copy {found['copy'] / 1e9:,.0f} GB/s read + written, bfloat16 product "
        f"{found['bfloat16 product'] / 1e12:,.1f} Tflop/s, measured; latte_ext {__version__}, "
        f"torch {torch.__version__}. Medians; peers in times of ours.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * 2 + "---:|" * (len(head) - 2),
    ]
    for row in rows:
        cells = [
            row.name, row.shape, f"{row.us:,.1f}", f"{row.gb_per_s:,.0f}",
            f"{100 * row.of_floor:.0f} %", f"{row.error:.1e}",
            *(f"{row.peers[peer]:.2f}" if peer in row.peers else "" for peer in peers),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def refusal() -> str | None:
    """Why nothing can be measured here."""
    if unusable() or not torch.cuda.is_available():
        return f"[bench] {unusable() or 'this torch cannot make CUDA tensors'}: expected a GPU"
    return None


def run(size: str, json_path: Path | None, once: bool) -> int:
    """Measure and print; returns the exit code.

    Args:
        size: a key of SIZES.
        json_path: where the numbers go, and beside it the page as .md.
        once: only call each case, for a profiler.
    """
    if problem := refusal():
        print(problem)
        return 1
    torch.manual_seed(0)
    if once:
        for case in cases(SIZES[size], "cuda"):
            case.call()
        torch.cuda.synchronize()
        return 0
    name = torch.cuda.get_device_name()
    found, rows = measure(SIZES[size], "cuda", device_clock)
    page = markdown(name, found, rows)
    print(page)
    if json_path is not None:
        facts = {
            "schema": SCHEMA, "device": name, "latte_ext": __version__, "torch": torch.__version__,
            "ceilings": found, "rows": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        json_path.write_text(json.dumps(facts, indent=1) + "\n")
        json_path.with_suffix(".md").write_text(page)
    return 0
