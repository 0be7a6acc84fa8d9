# SPDX-License-Identifier: Apache-2.0
"""What context parallelism costs: one ratio measured here, and tables computed from assumptions.

    python tools/project_context_parallel.py

Nothing of the tables is measured on GPUs. They are bytes, which tests/python/test_distributed_runs
counts, and operations, divided by the rates below.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable

import latte_ext
import torch
import torch.distributed as dist
from latte_ext.distributed import context_parallel
from torch import Tensor

# A layer of a model of 7 billion parameters, in bfloat16.
WIDTH, HEADS, LATENTS, DIM = 4096, 32, 64, 128
# Assumed, per GPU: matrix products, latent attention, network.
PRODUCTS_PER_SECOND, SCAN_PER_SECOND, BYTES_PER_SECOND = 400e12, 100e12, 50e9
STATE_BYTES = 4 * HEADS * (2 * LATENTS + LATENTS * DIM)
TOKENS, RANKS = (10**6, 10**7, 10**8), (8, 64, 256, 1024)


def measured_ratio(tokens: int = 8192, repeats: int = 7) -> float:
    """Forward and backward over one rank, by the time of the plain operator, interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/x", rank=0, world_size=1)
    torch.set_num_threads(1)
    inputs = [torch.randn(1, 4, tokens, 64, requires_grad=True) for _ in range(3)]
    plain = latte_ext.latent_attention
    sharded = context_parallel(plain)

    def seconds(op: Callable[..., Tensor]) -> float:
        start = time.perf_counter()
        op(*inputs).sum().backward()
        return time.perf_counter() - start

    times = [(seconds(sharded), seconds(plain)) for _ in range(repeats + 1)][1:]
    dist.destroy_process_group()
    return statistics.median(ours for ours, _ in times) / statistics.median(t for _, t in times)


def compute_seconds(tokens: int) -> float:
    """Forward and backward of one layer: 12 E^2 weights, and 6 L D operations per head in the
    forward pass, where a state before the scan takes 2 of them; three times that in both."""
    products = 2 * 12 * WIDTH**2 / PRODUCTS_PER_SECOND
    scan = 6 * LATENTS * DIM * HEADS / SCAN_PER_SECOND
    return 3 * tokens * (products + scan)


def received_bytes(ranks: int) -> int:
    """By the rank that receives most: all states, and of the gradients as many."""
    return 2 * (ranks - 1) * STATE_BYTES


def ring_bytes(tokens: int, ranks: int) -> float:
    """Ring attention in bfloat16: all other keys and values, again with their gradients."""
    return 3 * 2 * 2 * HEADS * DIM * tokens * (ranks - 1) / ranks


def table() -> str:
    lines = [
        "| tokens | ranks | per rank | received, MB | ring attention, MB | exchange / compute |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in TOKENS:
        for ranks in RANKS:
            share = received_bytes(ranks) / BYTES_PER_SECOND / compute_seconds(tokens // ranks)
            received, ring = received_bytes(ranks) / 1e6, ring_bytes(tokens, ranks) / 1e6
            lines.append(
                f"| {tokens:,} | {ranks:,} | {tokens // ranks:,} | {received:,.0f} | {ring:,.0f} "
                f"| {share:.2%} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    print(f"measured, one rank against the plain operator: {measured_ratio():.2f}")
