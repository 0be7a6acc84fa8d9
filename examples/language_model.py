# SPDX-License-Identifier: Apache-2.0
"""The demo's language model for every variant of the paper and softmax attention: same budget.

Each model trains for as many seconds of CPU time on one thread, with the demo's text, optimizer
and seed. Writes language_model.md, .json and, where matplotlib is installed, .png.

    python examples/language_model.py                # ~5 minutes on two cores
    python examples/language_model.py --quick        # seconds: shows that it runs, trains nothing
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from latte_ext import demo
from latte_ext._demo_text import load_corpus, ngram_bits, window_starts
from latte_ext.nn import VARIANTS

SECONDS = 90.0
# Points of the training curve that are kept.
POINTS = 60


def run(variant: str, seconds: float, windows: int) -> dict[str, Any]:
    """Train one model and score it: a row of the result."""
    torch.set_num_threads(1)
    corpus = load_corpus(None, demo.SEQUENCE)
    starts = window_starts(corpus.held_out, demo.SEQUENCE, windows)
    torch.manual_seed(demo.SEED)
    model = demo.build_model(variant)
    result = demo.train(model, corpus.train, seconds, clock=time.process_time)
    model.eval()
    cache = model.empty_cache(1)
    token = torch.zeros(1, dtype=torch.long)
    decode = []
    for _ in range(200):
        start = time.process_time()
        model.step(token, cache)
        decode.append(time.process_time() - start)
    return {
        "variant": variant,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": result.steps,
        "step_ms": round(1e3 * result.seconds / result.steps, 2),
        "decode_ms": round(1e3 * min(decode), 3),
        "cache_bytes": sum(layer.nbytes for layer in cache),
        "bits_per_byte": round(demo.evaluate(model, corpus.held_out, starts), 4),
        "curve": result.curve[:: max(1, len(result.curve) // POINTS)],
    }


def markdown(rows: Sequence[dict[str, Any]], seconds: float, trigram: float) -> str:
    lines = [
        f"Bits per byte of held-out text after {seconds:.0f} CPU seconds of training on one thread"
        f" (trigram: {trigram:.3f}):",
        "",
        "| variant | bits per byte | parameters | steps | step time | token time | cache, bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    # Times as multiples of the first variant's, since a machine's own say little.
    base = rows[0]
    for row in sorted(rows, key=lambda row: row["bits_per_byte"]):
        lines.append(
            f"| {row['variant']} | {row['bits_per_byte']:.3f} | {row['parameters']:,} | "
            f"{row['steps']:,} | {row['step_ms'] / base['step_ms']:.2f} x | "
            f"{row['decode_ms'] / base['decode_ms']:.2f} x | "
            f"{row['cache_bytes']:,} |"
        )
    return "\n".join(lines) + "\n"


def save_plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the training curves; a message without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        curve = [(elapsed, bits) for elapsed, bits in row["curve"] if elapsed > 0]
        axes.plot(*zip(*curve, strict=True), label=row["variant"], linewidth=1)
    axes.set(xlabel="CPU seconds of training", ylabel="bits per byte, training", ylim=(None, 4))
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a moment of each model, no results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"default: {SECONDS:.0f}")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    if args.quick:
        for variant in args.variants:
            print({**run(variant, 0.1, 8), "curve": None})
        return 0
    rows = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(run, variant, args.seconds, demo.HELD_OUT_WINDOWS)
            for variant in args.variants
        ]
        for future in futures:
            rows.append(future.result())
            print({**rows[-1], "curve": None}, flush=True)
    corpus = load_corpus(None, demo.SEQUENCE)
    starts = window_starts(corpus.held_out, demo.SEQUENCE, demo.HELD_OUT_WINDOWS)
    targets = (starts[:, None] + torch.arange(demo.SEQUENCE)).flatten()
    trigram = ngram_bits(corpus.train, corpus.held_out, targets, 3)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "seconds": args.seconds,
        "torch": torch.__version__,
        "trigram": trigram,
        "rows": rows,
    }
    (args.out / "language_model.json").write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(rows, args.seconds, trigram)
    (args.out / "language_model.md").write_text(table)
    print(table)
    save_plot(args.out / "language_model.png", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
