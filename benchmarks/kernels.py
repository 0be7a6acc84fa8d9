# SPDX-License-Identifier: Apache-2.0
"""Forward and backward against this machine's own matrix product, in one process.

python benchmarks/kernels.py [threads]

Work is counted as 4 L D operations per token and head forward, 12 L D backward; the yardstick is
torch.mm in float32 on as many threads. Ratios only: absolute times of shared machines mislead.
"""

import statistics
import sys
import time
from collections.abc import Callable

import latte_ext
import torch

SHAPES = [(1, 8, 8192, 64, 64), (1, 4, 8192, 32, 64), (1, 8, 8192, 128, 64), (1, 8, 4096, 43, 43)]
REPEATS = 9
MATRIX = 1024


def seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    a = torch.randn(MATRIX, MATRIX)
    peak = 2 * MATRIX**3 / seconds(lambda: a @ a)
    print(f"{latte_ext._core.cpu_isa()}, {torch.get_num_threads()} threads, share of torch.mm")
    print(f"{'(B, H, T, L, D)':26} {'causal':>8} {'gradient':>9} {'bidirectional':>14}")
    for shape in SHAPES:
        batch, heads, tokens, latents, dim = shape
        q, k = (torch.randn(batch, heads, tokens, latents, requires_grad=True) for _ in range(2))
        v = torch.randn(batch, heads, tokens, dim, requires_grad=True)
        work = batch * heads * tokens * latents * dim
        y = latte_ext.latent_attention(q, k, v)
        dy = torch.randn_like(y)
        with torch.no_grad():
            causal = seconds(lambda q=q, k=k, v=v: latte_ext.latent_attention(q, k, v))
            both = seconds(lambda q=q, k=k, v=v: latte_ext.latent_attention(q, k, v, causal=False))
        gradient = seconds(
            lambda y=y, q=q, k=k, v=v, dy=dy: torch.autograd.grad(
                y, (q, k, v), dy, retain_graph=True
            )
        )
        shares = (4 * work / causal, 12 * work / gradient, 4 * work / both)
        print(
            f"{shape!s:26} {shares[0] / peak:8.2f} {shares[1] / peak:9.2f} {shares[2] / peak:14.2f}"
        )


if __name__ == "__main__":
    main()
