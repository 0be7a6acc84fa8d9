# SPDX-License-Identifier: Apache-2.0
"""Trains a small causal language model on real text, samples from it, and times its decoding.

`python -m latte_ext demo`: bits per byte beside a unigram and a trigram on the same held-out text,
text sampled token by token through the constant-memory state, and milliseconds per token of
decode and prefill against scaled_dot_product_attention at growing context.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .functional import latent_attention, latent_attention_step
from .nn import LatteLM

WINDOW = 128  # tokens of a training sequence
BATCH = 8
LEARNING_RATE = 5e-3
WARMUP = 0.02  # of the training time
TRIGRAM_COUNT = 0.1  # added to every count; best of 0.1, 0.01, 0.003, 0.001 on the default corpus
REQUIRED_GAIN = 0.2  # bits per byte below the trigram
HEADS, LATENTS, DIM = 8, 64, 64  # the timed attention layer
CONTEXTS = (256, 1024, 4096, 16384)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=2.0, help="training time (default 2)")
    parser.add_argument("--text", type=Path, help="a file to train on instead of Python's sources")
    parser.add_argument("--out", type=Path, default=Path("latte_demo"), help="folder for results")
    parser.add_argument("--threads", type=int, help="default: 1 or torch's, the faster")


def stdlib_files() -> list[Path]:
    """The standard library's own sources, sorted; tests and site-packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in sorted(files) if left_out.isdisjoint(path.parts)]


def load_corpus(text: Path | None) -> tuple[Tensor, Tensor]:
    """Training and held-out bytes (n,) uint8: every tenth file, or the last tenth of `text`.

    Raises:
        ValueError: too little text for one window of each.
    """
    if text is None:
        contents = [path.read_bytes() for path in stdlib_files()]
        train = b"".join(data for i, data in enumerate(contents) if i % 10 != 9)
        held_out = b"".join(contents[9::10])
    else:
        data = text.read_bytes()
        border = len(data) * 9 // 10
        train, held_out = data[:border], data[border:]
    if min(len(train), len(held_out)) <= WINDOW:
        raise ValueError(
            f"[demo] got {len(train)} training and {len(held_out)} held-out bytes, expected more "
            f"than {WINDOW} of each"
        )
    as_tensor = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (train, held_out)]
    return as_tensor[0], as_tensor[1]


def unigram_bits(train: Tensor, held_out: Tensor) -> float:
    """Bits per byte of the byte frequencies of `train`."""
    counts = torch.bincount(train.long(), minlength=256).double() + TRIGRAM_COUNT
    return float(-(counts / counts.sum()).log2()[held_out.long()].mean())


def trigram_bits(train: Tensor, held_out: Tensor) -> float:
    """Bits per byte given the two bytes before, from the frequencies of `train`."""

    def codes(data: Tensor) -> Tensor:
        wide = data.int()
        return (wide[:-2] * 256 + wide[1:-1]) * 256 + wide[2:]

    counts = torch.bincount(codes(train), minlength=256**3)
    code = codes(held_out)
    seen = counts.view(-1, 256).sum(1)[code // 256]
    p = (counts[code].double() + TRIGRAM_COUNT) / (seen.double() + 256 * TRIGRAM_COUNT)
    return float(-p.log2().mean())


@torch.no_grad()
def model_bits(model: LatteLM, held_out: Tensor, windows: int) -> float:
    """Bits per byte of about `windows` evenly spread ones, each predicted from its own bytes."""
    pieces = held_out[: len(held_out) // (WINDOW + 1) * (WINDOW + 1)].view(-1, WINDOW + 1)
    pieces = pieces[:: max(1, len(pieces) // windows)].long()
    total = 0.0
    for piece in pieces.split(64):
        total += float(_loss(model, piece)) * piece.shape[0]
    return total / len(pieces) / math.log(2)


def build_model() -> LatteLM:
    return LatteLM(256, embed_dim=128, num_layers=2, num_heads=4, num_latents=16, conv_width=4)


def _loss(model: LatteLM, tokens: Tensor) -> Tensor:
    """Mean next-byte cross-entropy, in nats, over tokens (B,T+1)."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def learning_rate(fraction: float) -> float:
    """Linear warm-up, then linear decay to zero, by the fraction of the training time."""
    return LEARNING_RATE * min(fraction / WARMUP, 1 - fraction)


def train_model(
    model: LatteLM,
    train: Tensor,
    held_out: Tensor,
    seconds: float,
    report: Callable[[float, int, float, float | None], None],
) -> int:
    """Trains for `seconds` of wall time; returns the number of steps.

    report(fraction, steps, training bits, held-out bits or None) is called every so often.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(WINDOW + 1)
    start = reported = time.perf_counter()
    steps, average, held_out_bits, next_check = 0, math.nan, None, 0.1
    while (fraction := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            # The first step would have rate 0.
            group["lr"] = max(learning_rate(fraction), 1e-5)
        first = torch.randint(len(train) - WINDOW, (BATCH, 1), generator=generator)
        loss = _loss(model, train[first + offsets].long())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        bits = loss.item() / math.log(2)
        average = bits if steps == 1 else 0.95 * average + 0.05 * bits
        if fraction >= next_check:
            next_check += 0.1
            held_out_bits = model_bits(model, held_out, 100)
        if (now := time.perf_counter()) - reported > 0.2:
            reported = now
            report(fraction, steps, average, held_out_bits)
    report(1.0, steps, average, held_out_bits)
    return steps


def progress_bar(seconds: float) -> Callable[[float, int, float, float | None], None]:
    """A `report` that draws a bar, redrawn in place on a terminal, else a line per tenth."""
    terminal, shown = sys.stdout.isatty(), -1

    def report(fraction: float, steps: int, bits: float, held_out: float | None) -> None:
        nonlocal shown
        tenth = int(fraction * 10)
        if not terminal and tenth == shown:
            return
        shown = tenth
        bar = "#" * int(30 * fraction)
        checked = "" if held_out is None else f", held out {held_out:.2f}"
        line = (
            f"[{bar:30}] {fraction * seconds:4.0f}/{seconds:.0f} s  step {steps:5}  "
            f"bits per byte: train {bits:.2f}{checked}"
        )
        end = "\n" if not terminal or fraction >= 1 else ""
        print(("\r" if terminal else "") + line, end=end, flush=True)

    return report


def sample(model: LatteLM, prompt: str, count: int) -> str:
    """`prompt` and `count` more bytes, drawn one by one through the constant-memory state."""
    tokens = torch.tensor([list(prompt.encode())])
    generator = torch.Generator().manual_seed(0)
    out = model.generate(tokens, count, temperature=0.7, generator=generator)
    return bytes(out[0].tolist()).decode(errors="replace")


def _milliseconds(call: Callable[[], Any], budget: float = 0.3) -> float:
    """Median time of a call after a first one, over calls that fill `budget` seconds."""
    call()
    times: list[float] = []
    start = time.perf_counter()
    while not times or time.perf_counter() - start < budget:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return 1e3 * sorted(times)[len(times) // 2]


@torch.no_grad()
def timings(contexts: tuple[int, ...]) -> list[dict[str, float]]:
    """Milliseconds per token of one layer (H=8, L=D=64, float32, batch 1) at each context length.

    Decode: one more token after `context` tokens. Prefill: all of them, divided by their number.
    The state's and the key-value cache's bytes stand beside them.
    """
    sdpa = F.scaled_dot_product_attention
    rows = []
    for context in contexts:
        generator = torch.Generator().manual_seed(0)
        latent_q, latent_k = torch.randn(2, 1, HEADS, context, LATENTS, generator=generator)
        q, k, v = torch.randn(3, 1, HEADS, context, DIM, generator=generator)
        inputs = latent_q, latent_k, v
        last = latent_q[:, :, -1], latent_k[:, :, -1], v[:, :, -1]
        _, state = latent_attention(*inputs, return_state=True)
        rows.append(
            {
                "context": context,
                "latte_decode_ms": _milliseconds(partial(latent_attention_step, *last, state)),
                "sdpa_decode_ms": _milliseconds(partial(sdpa, q[:, :, -1:], k, v)),
                "latte_prefill_ms": _milliseconds(partial(latent_attention, *inputs)) / context,
                "sdpa_prefill_ms": _milliseconds(partial(sdpa, q, k, v, is_causal=True)) / context,
                "latte_bytes": state.nbytes,
                "sdpa_bytes": 2 * k.numel() * k.element_size(),
            }
        )
    return rows


def table(rows: list[dict[str, float]]) -> str:
    """The timings as aligned text."""
    header = ("context", "decode ms/token", "", "prefill ms/token", "", "memory KiB", "")
    names = ("tokens", "latte", "sdpa", "latte", "sdpa", "latte", "sdpa")
    lines: list[tuple[str, ...]] = [header, names]
    for row in rows:
        times = [f"{row[f'{name}_{kind}_ms']:.4f}" for kind in ("decode", "prefill")
                 for name in ("latte", "sdpa")]  # fmt: skip
        sizes = [f"{row[f'{name}_bytes'] / 1024:.0f}" for name in ("latte", "sdpa")]
        lines.append((f"{row['context']:.0f}", *times, *sizes))
    return "\n".join("  ".join(f"{cell:>16}" for cell in line).rstrip() for line in lines)


def save_plot(rows: list[dict[str, float]], path: Path) -> bool:
    """Draws decode and prefill times over the context; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    contexts = [row["context"] for row in rows]
    for axis, kind in zip(axes, ("decode", "prefill"), strict=True):
        for name, label in (("latte", "latent attention"), ("sdpa", "softmax attention")):
            axis.loglog(contexts, [row[f"{name}_{kind}_ms"] for row in rows], "o-", label=label)
        axis.set(title=kind, xlabel="context (tokens)", ylabel="milliseconds per token")
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def faster_thread_count() -> int:
    """1 or torch's number of threads, whichever trains faster: on shared cores 1 often does."""
    times = {}
    tokens = torch.zeros(BATCH, WINDOW + 1, dtype=torch.long)
    model = build_model()
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        times[threads] = _milliseconds(lambda: _loss(model, tokens).backward(), budget=1.0)
    return min(times, key=times.__getitem__)


def run(args: argparse.Namespace) -> int:
    """The whole demo; 1 if the model ends too close to the trigram on the default corpus."""
    if not args.minutes > 0 or (args.threads is not None and args.threads < 1):
        raise ValueError(
            f"[demo] got --minutes {args.minutes} --threads {args.threads}, expected positive ones"
        )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or faster_thread_count())
        return _run(args)
    finally:
        torch.set_num_threads(before)


def _run(args: argparse.Namespace) -> int:
    train, held_out = load_corpus(args.text)
    source = "Python's standard library" if args.text is None else str(args.text)
    print(f"{source}: {len(train):,} bytes to train on, {len(held_out):,} held out")
    unigram, trigram = unigram_bits(train, held_out), trigram_bits(train, held_out)
    print(f"bits per byte on the held-out text: unigram {unigram:.2f}, trigram {trigram:.2f}")

    torch.manual_seed(0)
    model = build_model()
    parameters = sum(p.numel() for p in model.parameters())
    threads = torch.get_num_threads()
    print(f"training a latent attention model of {parameters:,} parameters, threads: {threads}")
    seconds = 60 * args.minutes
    steps = train_model(model, train, held_out, seconds, progress_bar(seconds))
    model.eval()
    bits = model_bits(model, held_out, len(held_out))
    print(f"{bits:.2f} bits per byte: {trigram - bits:+.2f} below the trigram ({trigram:.2f})\n")

    text = sample(model, "def ", 300)
    print(f"sampled, token by token, in constant memory:\n{text}\n")
    rows = timings(CONTEXTS)
    print("one attention layer, milliseconds per token (medians) and memory of the past:")
    print(table(rows))

    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "bits_per_byte": {"model": bits, "trigram": trigram, "unigram": unigram},
        "parameters": parameters, "steps": steps, "seconds": seconds,
        "threads": threads, "sample": text, "timings": rows,
    }  # fmt: skip
    (args.out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    plotted = save_plot(rows, args.out / "demo.png")
    print(f"\nsaved demo.json{' and demo.png' if plotted else ''} in {args.out}")
    if not plotted:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
    if args.text is None and bits > trigram - REQUIRED_GAIN:
        print(f"FAILED: expected at least {REQUIRED_GAIN} bits per byte below the trigram")
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m latte_ext.demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
