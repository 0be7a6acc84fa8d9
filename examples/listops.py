# SPDX-License-Identifier: Apache-2.0
"""Long-range classification: ListOps (arXiv 1804.06028), generated here, by both-way attention.

    [MAX 2 [MIN 7 4 ] [SM 8 9 5 ] [MED 1 6 3 ] 0 ]  =  4

An expression nests maximum, minimum, median and sum modulo 10 of digits: its value, one of ten
classes, depends on all of its levels. Encoders with latent attention and one with softmax
attention have the same blocks, the same number of parameters and read the same expressions in the
same order, long ones last; they are tested on others, up to 4 times as long as any they were
trained on. Beside them: the most common class, the most common class of each outermost operator,
and a network on the number of times that each token occurs. Writes listops.md and listops.json.

    python examples/listops.py             # ~3 minutes of one core
    python examples/listops.py --quick     # seconds: shows that it runs, trains nothing
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from latte_ext.nn import LatteConfig, LatteEncoder
from torch import Tensor, nn
from torch.nn import functional as F

# The grammar, with the numbers of the Long Range Arena (arXiv 2011.04006).
OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
OPERATOR_SHARE, MAX_ARGUMENTS, MAX_DEPTH = 0.25, 10, 10

PAD, *WORDS = ("", *map(str, range(10)), *OPERATORS, "]")
IDS = {word: index for index, word in enumerate(WORDS, 1)}
CLASSES = 10

# Shortest and longest expressions, in tokens.
TRAIN_BANDS = ((4, 32), (32, 64), (64, 128), (128, 256))
TEST_BANDS = (*TRAIN_BANDS, (256, 512), (512, 1024))
BAND_BEGINS = (0, 0.35, 0.6, 0.8)  # of the training
STEPS, TOKENS, LEARNING_RATE = 700, 2048, 2e-3
TEST_COUNT = 500
PARAMETERS = 150_000
SEED = 0

SIZES: dict[str, Any] = {
    "vocab_size": 1 + len(WORDS),
    "embed_dim": 64,
    "num_layers": 3,
    "num_heads": 4,
    "norm": "rms",
    "mlp": "silu",
    "bias": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "latte-conv-swa++": {"num_latents": 16, "mixer": "conv", "window": 16},
    "softmax": {"num_latents": 0, "window": TEST_BANDS[-1][1]},
    "latte": {"num_latents": 16},
}


def expression(rng: random.Random, shortest: int, longest: int) -> tuple[list[str], int]:
    """The words of a random expression of so many tokens, and its value."""
    while True:
        words: list[str] = []
        value = _grow(rng, words, longest, MAX_DEPTH)
        if value is not None and shortest <= len(words) <= longest:
            return words, value


def _grow(rng: random.Random, words: list[str], longest: int, depth: int) -> int | None:
    """Append an expression and return its value; None if it gets too long."""
    if words and (depth == 1 or rng.random() >= OPERATOR_SHARE):
        digit = rng.randrange(10)
        words.append(str(digit))
        return digit
    operator = rng.choice(list(OPERATORS))
    words.append(operator)
    values = []
    for _ in range(rng.randint(2, MAX_ARGUMENTS)):
        value = _grow(rng, words, longest, depth - 1)
        if value is None or len(words) >= longest:
            return None
        values.append(value)
    words.append("]")
    return OPERATORS[operator](values)


Batch = tuple[Tensor, Tensor]


def batch(rng: random.Random, band: tuple[int, int], count: int) -> Batch:
    """Tokens (count,T) uint8, padded with 0 at the end, and values (count,)."""
    found = [expression(rng, *band) for _ in range(count)]
    rows = [torch.tensor([IDS[word] for word in words], dtype=torch.uint8) for words, _ in found]
    values = torch.tensor([value for _, value in found])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), values


def training_batches(steps: int) -> list[Batch]:
    """As many tokens in every batch; longer expressions join the shorter ones as training goes."""
    rng, batches = random.Random(SEED), []
    for step in range(steps):
        bands = sum(step >= begin * steps for begin in BAND_BEGINS)
        band = TRAIN_BANDS[rng.randrange(bands)]
        batches.append(batch(rng, band, TOKENS // band[1]))
    return batches


def test_batches(count: int) -> dict[str, list[Batch]]:
    """`count` expressions of each band, in pieces."""
    rng = random.Random(SEED + 1)
    return {
        f"{low}-{high}": [batch(rng, (low, high), 25) for _ in range(-(-count // 25))]
        for low, high in TEST_BANDS
    }


class BagOfTokens(nn.Module):
    """A network on how often each token occurs, of all and of the first: without their order."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(1 + len(WORDS), hidden), nn.GELU(), nn.Linear(hidden, CLASSES)
        )

    def forward(self, tokens: Tensor, *, key_mask: Tensor) -> Tensor:
        counts = F.one_hot(tokens, 1 + len(WORDS)).masked_fill(~key_mask[..., None], 0).sum(1)
        return self.layers(counts.float().log1p())


def build_model(name: str) -> nn.Module:
    """A model; encoders have about PARAMETERS parameters, by the width of their MLP."""
    if name == "bag of tokens":
        return BagOfTokens()

    def build(mlp_dim: int) -> LatteEncoder:
        return LatteEncoder(LatteConfig(**SIZES, **MODELS[name], mlp_dim=mlp_dim), CLASSES)

    def count(mlp_dim: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(mlp_dim).parameters())

    slope = count(2) - count(1)
    return build(1 + (PARAMETERS - count(1)) // slope)


def run(name: str, training: list[Batch], tests: dict[str, list[Batch]]) -> dict[str, Any]:
    """Train one model and test it: a row of the result."""
    torch.manual_seed(SEED)
    model, steps = build_model(name), len(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.05
    )
    started, recent = time.process_time(), list[float]()
    for step, (tokens, values) in enumerate(training, 1):
        loss = F.cross_entropy(model(tokens.long(), key_mask=tokens > 0), values)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % (steps // 10 or 1) == 0:
            print(f"{name}: step {step} of {steps}, loss {statistics.mean(recent):.3f}", flush=True)
            recent = []
    seconds = time.process_time() - started
    model.eval()

    @torch.no_grad()
    def answer(tokens: Tensor) -> Tensor:
        return model(tokens.long(), key_mask=tokens > 0).argmax(1)

    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        **examine(answer, tests),
    }


def guesses(training: list[Batch], tests: dict[str, list[Batch]]) -> list[dict[str, Any]]:
    """Rows of the most common value, and of the most common one of each outermost operator."""
    counts = torch.zeros(1 + len(WORDS), CLASSES)
    for tokens, values in training:
        counts.index_put_((tokens[:, 0].long(), values), torch.ones(()), accumulate=True)
    common, by_operator = counts.sum(0).argmax(), counts.argmax(1)
    return [
        {"model": name, "parameters": 0, "seconds": 0.0, **examine(answer, tests)}
        for name, answer in (
            ("most common value", lambda tokens: common.expand(len(tokens))),
            ("by the outermost operator", lambda tokens: by_operator[tokens[:, 0].long()]),
        )
    ]


def examine(answer: Callable[[Tensor], Tensor], tests: dict[str, list[Batch]]) -> dict[str, Any]:
    """Share of right answers, and CPU seconds per expression, by length."""
    accuracy, seconds = {}, {}
    for band, batches in tests.items():
        started = time.process_time()
        right = [bool(x) for tokens, values in batches for x in answer(tokens) == values]
        seconds[band] = (time.process_time() - started) / len(right)
        accuracy[band] = round(statistics.mean(right), 4)
    return {"accuracy": accuracy, "test_seconds": seconds}


def markdown(rows: Sequence[dict[str, Any]], test_count: int) -> str:
    """Accuracies, and times as multiples of the first encoder's."""
    bands = list(rows[0]["accuracy"])
    base = next(row for row in rows if row["model"] in MODELS)
    lines = [
        f"Share of right values by length in tokens, {test_count} expressions each; trained up to"
        f" {TRAIN_BANDS[-1][1]} tokens. Times: CPU time as a multiple of {base['model']}'s.",
        "",
        f"| model | parameters | {' | '.join(bands)} | training | reading {bands[-1]} |",
        "|---|---|" + "---|" * (len(bands) + 2),
    ]
    for row in rows:
        cells = [row["model"], f"{row['parameters']:,}"]
        cells += [f"{value:.1%}" for value in row["accuracy"].values()]
        if row["model"] in MODELS:
            last = row["test_seconds"][bands[-1]] / base["test_seconds"][bands[-1]]
            cells += [f"{row['seconds'] / base['seconds']:.2f} x", f"{last:.2f} x"]
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save(folder: Path, rows: Sequence[dict[str, Any]], steps: int, test_count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "sizes": {**SIZES, "parameters": PARAMETERS},
        "models": MODELS,
        "training": {"steps": steps, "tokens_per_step": TOKENS, "bands": TRAIN_BANDS},
        "test_count": test_count,
        "torch": torch.__version__,
        "rows": rows,
    }
    (folder / "listops.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "listops.md").write_text(markdown(rows, test_count))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, no results")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    steps, test_count = (4, 25) if args.quick else (args.steps, TEST_COUNT)
    torch.set_num_threads(args.threads)
    print("generating expressions", flush=True)
    training, tests = training_batches(steps), test_batches(test_count)
    rows = guesses(training, tests)
    for name in ("bag of tokens", *args.models):
        rows.append(run(name, training, tests))
        if not args.quick and name in MODELS:
            save(args.out, rows, steps, test_count)
    print(markdown(rows, test_count))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
