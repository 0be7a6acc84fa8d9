# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext demo`: train a small language model on real text, sample it, time it.

Trains a causal `LatteLM` on bytes for about two minutes, compares its bits per byte on held-out
text with a unigram's and a trigram's, samples text token by token through the constant-memory
state, and times decode and prefill against scaled_dot_product_attention at growing context.
"""

from __future__ import annotations

import argparse
import codecs
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _demo_timing as timing
from ._command_line import check_folder, positive
from ._demo_text import BYTES, Corpus, load_corpus, ngram_bits, window_starts
from ._progress import Bar
from .nn import VARIANTS, LatteConfig, LatteLM, save
from .nn.model import sample_token

# Bits per byte that the model has to end below the trigram.
REQUIRED_GAIN = 0.2

# The model and its training. Found by trials of 40 s on one core: small and many steps beats wider
# or deeper, and more heads of few latents beat fewer of many.
EMBED_DIM, NUM_LAYERS, NUM_HEADS, NUM_LATENTS = 96, 2, 8, 16
# 16 tokens beat 32 in trials of 30 s.
WINDOW = 16
SEQUENCE, BATCH = 128, 8
# The best of examples/results/language_model.md.
VARIANT = "latte-conv-swa++"
LEARNING_RATE, WARMUP, WEIGHT_DECAY, BETAS = 5e-3, 0.03, 0.01, (0.9, 0.99)
GRADIENT_NORM = 1.0
SEED = 0

# Windows of held-out text that are scored: 2048 * 128 = 262,144 bytes.
HELD_OUT_WINDOWS = 2048
PROMPT_LENGTH, SAMPLE_LENGTH, TEMPERATURE = 48, 400, 0.8
CONTEXTS = tuple(2**i for i in range(10, 17))


class Result(NamedTuple):
    """What training gave: steps, seconds, and the loss (seconds, bits per byte) along the way."""

    steps: int
    seconds: float
    curve: list[tuple[float, float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to `parser`."""
    parser.add_argument(
        "--minutes", type=positive(float), default=2.0, help="training time (default: 2)"
    )
    parser.add_argument(
        "--variant", choices=VARIANTS, default=VARIANT, help=f"the model (default: {VARIANT})"
    )
    parser.add_argument("--text", type=Path, help="text to train on (default: Python's sources)")
    parser.add_argument(
        "--out", type=Path, default=Path("latte_demo"), help="folder for what is saved"
    )
    parser.add_argument(
        "--threads", type=positive(int), help="CPU threads (default: the fastest number)"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the demo with command-line arguments; returns the exit code of `run`."""
    parser = argparse.ArgumentParser(prog="python -m latte_ext demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """The whole demo, with the arguments of `add_arguments`. Prints as it goes.

    Returns:
        0; 1 if the model ends less than 0.2 bits per byte below the trigram; 2 if the text cannot
        be read or is too short.

    Raises:
        SystemExit: nothing can be written to the folder of --out.
    """
    try:
        corpus = load_corpus(args.text, SEQUENCE)
    except OSError as error:
        print(f"[demo] {args.text} is no readable text ({error.strerror})", file=sys.stderr)
        return 2
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    check_folder("demo", args.out)
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or fastest_threads(threads_before, args.variant))
        return 0 if _run(corpus, args.variant, args.minutes * 60, args.out) else 1
    finally:
        torch.set_num_threads(threads_before)


def _run(corpus: Corpus, variant: str, seconds: float, out: Path) -> bool:
    """Whether the target was reached."""
    print(
        f"text: {corpus.source}, {len(corpus.train):,} bytes for training, "
        f"{len(corpus.held_out):,} held out"
    )
    starts = window_starts(corpus.held_out, SEQUENCE, HELD_OUT_WINDOWS)
    targets = starts[:, None] + torch.arange(SEQUENCE)
    baselines = {
        name: ngram_bits(corpus.train, corpus.held_out, targets.flatten(), order)
        for name, order in (("trigram", 3), ("unigram", 1))
    }
    trigram = baselines["trigram"]
    shown = ", ".join(f"{name} {value:.2f}" for name, value in baselines.items())
    print(f"bits per byte of {targets.numel():,} held-out bytes, evenly spread: {shown}")

    torch.manual_seed(SEED)
    model = build_model(variant)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"model: {variant}, {parameters:,} parameters, {torch.get_num_threads()} threads")
    bar = Progress(seconds, shown, sys.stdout)
    training = train(model, corpus.train, seconds, bar.show)
    bar.finish(training.steps, training.curve[-1][1])
    model.eval()
    bits = evaluate(model, corpus.held_out, starts)
    reached = bits <= trigram - REQUIRED_GAIN
    print(
        f"bits per byte of the held-out bytes: {bits:.3f}, {trigram - bits:.3f} below the trigram "
        f"({shown}); {training.steps:,} steps in {training.seconds:.0f} s\n"
    )

    prompt = corpus.held_out[int(starts[0]) :][:PROMPT_LENGTH].long()
    sampled = sample(model, prompt, SAMPLE_LENGTH)

    print(
        f"\nOne layer, {timing.HEADS} heads of {timing.WIDTH} latents and channels, batch 1, "
        f"{torch.get_num_threads()} threads (softmax: scaled_dot_product_attention):"
    )
    rows = timing.measure(CONTEXTS)
    print(timing.table(rows))
    if any(row.sdpa_prefill is None for row in rows):
        print(f"-: would take longer than {timing.PREFILL_LIMIT:.0f} s a call, not measured")

    result = {
        "source": corpus.source,
        "bytes": {"train": len(corpus.train), "held_out": len(corpus.held_out)},
        "scored_bytes": targets.numel(),
        "bits_per_byte": {**baselines, "model": bits},
        "target_reached": reached,
        "variant": variant,
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "training": training._asdict(),
        "sample": sampled,
        "timings": [row._asdict() for row in rows],
    }
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nsaved {out / 'demo.json'}")
    save_model(out / "model.safetensors", model)
    save_plot(out / "demo.png", training, baselines, bits, rows)
    if not reached:
        print(
            f"FAILED: {bits:.3f} bits per byte, expected at most {trigram - REQUIRED_GAIN:.3f} "
            f"({REQUIRED_GAIN} below the trigram)"
        )
    return reached


# Model


def build_model(variant: str = VARIANT) -> LatteLM:
    """The demo's model of bytes, with the parts of a variant; "softmax" sees whole sequences."""
    options = {"num_layers": NUM_LAYERS, "num_heads": NUM_HEADS, "embed_dim": EMBED_DIM}
    if variant == "softmax":
        options["window"] = SEQUENCE
    else:
        options["num_latents"] = NUM_LATENTS
        if "window" in VARIANTS[variant]:
            options["window"] = WINDOW
    return LatteLM(LatteConfig.named(variant, vocab_size=BYTES, **options))


def fastest_threads(most: int, variant: str = VARIANT) -> int:
    """The number of threads, `most` or a smaller power of two, that makes a training step fastest.

    The matrices are small, and a container may own fewer cores than it sees.
    """
    candidates = [1 << i for i in range(most.bit_length()) if 1 << i < most] + [most]
    model = build_model(variant)
    tokens = torch.zeros(BATCH, SEQUENCE + 1, dtype=torch.long)
    times = []
    for threads in candidates:
        torch.set_num_threads(threads)
        times.append(timing.milliseconds(lambda: loss_of(model, tokens).backward()))
    return candidates[times.index(min(times))]


def loss_of(model: LatteLM, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of windows (B,T+1): each byte from those before it."""
    logits: Tensor = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; progress runs from 0 to 1."""
    return LEARNING_RATE * min(1.0, progress / WARMUP) * (1 + math.cos(math.pi * progress)) / 2


def train(
    model: LatteLM,
    text: Tensor,
    seconds: float,
    report: Callable[[float, int, float], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> Result:
    """Train with AdamW on random windows of text (n,) uint8 for so many seconds.

    The schedule follows the clock, so that a slow machine takes fewer steps of the same course.
    clock() is the time in seconds; None: wall time.
    report(elapsed seconds, steps, smoothed bits per byte) is called after every step.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)
    generator = torch.Generator().manual_seed(SEED)
    offsets = torch.arange(SEQUENCE + 1)
    curve: list[tuple[float, float]] = []
    clock = clock or time.perf_counter
    bits, steps, start = math.nan, 0, clock()
    while (elapsed := clock() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed / seconds)
        begins = torch.randint(len(text) - SEQUENCE, (BATCH, 1), generator=generator)
        loss = loss_of(model, text[begins + offsets].long())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        steps += 1
        latest = loss.item() / math.log(2)
        bits = latest if steps == 1 else 0.95 * bits + 0.05 * latest
        curve.append((round(elapsed, 3), round(bits, 4)))
        if report is not None:
            report(elapsed, steps, bits)
    return Result(steps, clock() - start, curve)


@torch.no_grad()
def evaluate(model: LatteLM, held_out: Tensor, starts: Tensor) -> float:
    """Bits per byte of the windows that start at `starts`, each predicted on its own."""
    total = 0.0
    for chosen in starts.split(BATCH * 4):
        # One byte earlier, since the first scored byte needs an input.
        windows = held_out[chosen[:, None] - 1 + torch.arange(SEQUENCE + 1)].long()
        total += loss_of(model, windows).item() * len(chosen)
    return total / len(starts) / math.log(2)


def sample(model: LatteLM, prompt: Tensor, length: int) -> str:
    """Print, as they come, `length` bytes drawn after prompt (n,); returns the whole text."""
    generator = torch.Generator().manual_seed(SEED)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    print(f"sample, token by token, after a held-out prompt of {len(prompt)} bytes:\n{'-' * 80}")
    text = decoder.decode(bytes(prompt.tolist()))
    print(_printable(text), end="")
    logits, cache = model.prefill(prompt[None])
    start = time.perf_counter()
    for _ in range(length):
        token = sample_token(logits, temperature=TEMPERATURE, generator=generator)
        logits = model.step(token, cache)
        piece = decoder.decode(bytes(token.tolist()))
        print(_printable(piece), end="", flush=True)
        text += piece
    elapsed = time.perf_counter() - start
    size = sum(layer.nbytes for layer in cache)
    print(
        f"\n{'-' * 80}\n{1e3 * elapsed / length:.2f} ms per token; all that is kept of the text so "
        f"far: {size:,} bytes, whatever its length"
    )
    return text


def _printable(text: str) -> str:
    """text with a question mark for what the terminal cannot show or would obey."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    encoding = sys.stdout.encoding or "ascii"
    return shown.encode(encoding, "replace").decode(encoding)


# Output


class Progress:
    """A progress bar of `seconds` of training.

    Args:
        seconds: the time at which the bar is full.
        baselines: text shown behind the loss.
        stream: where to draw.
    """

    REDRAW = 0.2  # seconds

    def __init__(self, seconds: float, baselines: str, stream: TextIO) -> None:
        self._bar, self._baselines = Bar(seconds, "s", stream, redraw=self.REDRAW), baselines

    def show(self, elapsed: float, steps: int, bits: float) -> None:
        """Draw the bar if it is time to: elapsed seconds, steps, training bits per byte."""
        self._bar.show(elapsed, self._text(steps, bits))

    def finish(self, steps: int, bits: float) -> None:
        """Draw the full bar and end the line."""
        self._bar.finish(self._text(steps, bits))

    def _text(self, steps: int, bits: float) -> str:
        return f"step {steps:,}: {bits:.2f} bits per byte ({self._baselines})"


def save_model(path: Path, model: LatteLM) -> bool:
    """Write the model for `nn.load` and examples/cpp; false, and a message, without safetensors."""
    try:
        save(model, path)
    except ImportError as error:
        print(f"no model file: {error}")
        return False
    print(f"saved {path}")
    return True


def save_plot(
    path: Path,
    training: Result,
    baselines: dict[str, float],
    bits: float,
    rows: Sequence[timing.Timing],
) -> bool:
    """Draw the loss and the timings to a PNG file; false, and a message, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return False
    figure = Figure(figsize=(14, 4), layout="constrained")
    loss, decode, prefill = figure.subplots(1, 3)
    seconds = [elapsed for elapsed, _ in training.curve]
    loss.plot(seconds, [y for _, y in training.curve], label="training text", linewidth=1)
    loss.axhline(bits, label="held-out text", color="black")
    for (name, value), style in zip(baselines.items(), ("--", ":"), strict=False):
        loss.axhline(value, label=name, color="gray", linestyle=style)
    loss.set(
        xlabel="seconds of training",
        ylabel="bits per byte",
        ylim=(min(bits, *baselines.values()) - 0.3, 6),
    )
    contexts = [row.context for row in rows]
    measured = [row for row in rows if row.sdpa_prefill is not None]
    decode.loglog(contexts, [row.latte_decode for row in rows], "o-", label="latent attention")
    decode.loglog(contexts, [row.sdpa_decode for row in rows], "s-", label="softmax attention")
    prefill.loglog(contexts, [row.latte_prefill for row in rows], "o-", label="latent attention")
    prefill.loglog(
        [row.context for row in measured],
        [row.sdpa_prefill for row in measured],
        "s-",
        label="softmax attention",
    )
    for axes in (decode, prefill):
        axes.set(xlabel="tokens of context", ylabel="ms per token")
    for axes, title in ((loss, "loss"), (decode, "decode"), (prefill, "prefill")):
        axes.set_title(title)
        axes.legend()
    figure.savefig(path, dpi=120)
    print(f"saved {path}")
    return True


if __name__ == "__main__":
    sys.exit(main())
