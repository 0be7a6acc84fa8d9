# SPDX-License-Identifier: Apache-2.0
"""What each kind of attention can remember: two synthetic tasks, trained short and tested longer.

copy    Noise of 32 symbols, a marker somewhere in its first half, and a question at the end: which
        symbol stood behind the marker?
recall  Multi-query associative recall (MQAR, arXiv 2312.04927): 8 pairs of a key and a value, then
        noise, then the 8 keys in another order: which value had each of them?

Models of about as many parameters, the same blocks ("++"), two layers, a window of 32 tokens where
there is one; trained at 64 to 256 tokens, tested at 256 to 2048, from fixed seeds on one thread
each. Writes recall.md and recall.json.

    python examples/recall.py               # ~10 minutes on two cores
    python examples/recall.py --quick       # seconds: shows that it runs, trains nothing
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from latte_ext.nn import LatteConfig, LatteLM
from torch import Tensor
from torch.nn import functional as F

PAIRS, SYMBOLS = 8, 32
# Symbols; keys and values, which are symbols of their own in the recall task; marker, question.
MARKER, QUESTION, VOCABULARY = 3 * SYMBOLS, 3 * SYMBOLS + 1, 3 * SYMBOLS + 2
TRAIN_LENGTHS, TEST_LENGTHS = (64, 128, 256), (256, 512, 1024, 2048)
WINDOW = 32
STEPS = {"copy": 1000, "recall": 1500}
TOKENS, LEARNING_RATE = 4096, 3e-3
TEST_SEQUENCES = 128
PARAMETERS = 150_000

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "embed_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "norm": "rms",
    "mlp": "silu",
    "bias": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "latte": {"num_latents": 32},
    "window": {"num_latents": 0, "window": WINDOW},
    "macchiato": {"num_latents": 32, "window": WINDOW},
    "latte-conv-swa++": {"num_latents": 32, "window": WINDOW, "mixer": "conv"},
    "latte-rglru-swa++": {"num_latents": 32, "window": WINDOW, "mixer": "rglru"},
    "softmax": {"num_latents": 0, "window": max(TEST_LENGTHS)},
}


def copy_task(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (count,length) and what to answer after each, -100 where nothing is asked."""
    tokens = torch.randint(SYMBOLS, (count, length), generator=generator)
    place = torch.randint(length // 2 - 1, (count,), generator=generator)
    row = torch.arange(count)
    tokens[row, place] = MARKER
    tokens[:, -1] = QUESTION
    targets = torch.full_like(tokens, -100)
    targets[:, -1] = tokens[row, place + 1]
    return tokens, targets


def recall_task(count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (count,length) and what to answer after each, -100 where nothing is asked."""

    def draws() -> Tensor:
        return torch.rand(count, SYMBOLS, generator=generator).argsort(1)[:, :PAIRS]

    keys = SYMBOLS + draws()
    values = 2 * SYMBOLS + torch.randint(SYMBOLS, keys.shape, generator=generator)
    order = torch.rand(keys.shape, generator=generator).argsort(1)
    tokens = torch.randint(SYMBOLS, (count, length), generator=generator)
    tokens[:, : 2 * PAIRS] = torch.stack([keys, values], 2).flatten(1)
    tokens[:, -PAIRS:] = keys.gather(1, order)
    targets = torch.full_like(tokens, -100)
    targets[:, -PAIRS:] = values.gather(1, order)
    return tokens, targets


TASKS = {"copy": copy_task, "recall": recall_task}


def build_model(name: str) -> LatteLM:
    """A model of about PARAMETERS parameters: the width of the MLP makes up for the attention."""

    def count(mlp_dim: int) -> int:
        with torch.device("meta"):
            model = LatteLM(LatteConfig(**SIZES, **MODELS[name], mlp_dim=mlp_dim))
        return sum(p.numel() for p in model.parameters())

    slope = count(2) - count(1)
    return LatteLM(
        LatteConfig(**SIZES, **MODELS[name], mlp_dim=1 + (PARAMETERS - count(1)) // slope)
    )


def run(task: str, name: str, steps: int, sequences: int, lengths: Sequence[int]) -> dict[str, Any]:
    """Train one model on one task and test it: a row of the result."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(name)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    generator = torch.Generator().manual_seed(1)
    started, loss = time.process_time(), torch.zeros(())
    for step in range(steps):
        progress = step / steps
        rate = min(1.0, progress / 0.05) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        # As many tokens in every step, each length for a third of the steps.
        length = TRAIN_LENGTHS[len(TRAIN_LENGTHS) * step // steps]
        tokens, targets = TASKS[task](TOKENS // length, length, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.process_time() - started
    model.eval()
    return {
        "task": task,
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "seconds": round(seconds, 1),
        "loss": round(loss.item(), 4),
        "accuracy": {str(length): test(model, task, length, sequences) for length in lengths},
    }


@torch.no_grad()
def test(model: LatteLM, task: str, length: int, sequences: int) -> float:
    """Share of right answers in so many sequences."""
    generator = torch.Generator().manual_seed(length)
    right = asked = 0
    for _ in range(max(1, sequences // 8)):
        tokens, targets = TASKS[task](8, length, generator)
        wanted = targets != -100
        right += int((model(tokens).argmax(-1) == targets)[wanted].sum())
        asked += int(wanted.sum())
    return round(right / asked, 4)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table per task."""
    lines = []
    for task in TASKS:
        chosen = [row for row in rows if row["task"] == task]
        lengths = list(chosen[0]["accuracy"])
        lines += [
            f"**{task}**: share of right answers by length (guessing: {1 / SYMBOLS:.1%})",
            "",
            f"| model | parameters | CPU s | {' | '.join(lengths)} |",
            "|---|---|---|" + "---|" * len(lengths),
        ]
        for row in chosen:
            accuracies = " | ".join(f"{value:.1%}" for value in row["accuracy"].values())
            lines.append(
                f"| {row['model']} | {row['parameters']:,} | {row['seconds']:.0f} | {accuracies} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a step of each model, no results")
    parser.add_argument("--steps", type=int, help=f"of training (default: {STEPS})")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    jobs = [(task, name) for task in args.tasks for name in args.models]
    if args.quick:
        for task, name in jobs:
            print(run(task, name, 1, 8, (64,)))
        return 0
    rows = []
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = [
            pool.submit(run, task, name, args.steps or STEPS[task], TEST_SEQUENCES, TEST_LENGTHS)
            for task, name in jobs
        ]
        for future in futures:
            rows.append(future.result())
            print(rows[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "sizes": {**SIZES, "parameters": PARAMETERS},
        "models": MODELS,
        "training": {"steps": STEPS, "lengths": TRAIN_LENGTHS, "tokens_per_step": TOKENS},
        "torch": torch.__version__,
        "rows": rows,
    }
    (args.out / "recall.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "recall.md").write_text(markdown(rows))
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
