# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext extend`: convert a pretrained model, train it a little, measure it."""

from __future__ import annotations

import argparse
import html
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from .._command_line import check_folder, positive
from .._progress import Bar
from .convert import convert, save_adapter
from .evaluation import (
    Difference,
    bucket_means,
    decode_costs,
    difference,
    forgetful_latents,
    full_attention,
    token_losses,
    without_latents,
)
from .layerwise import suggest_layers
from .training import Recipe, Training

BORDERS = (0, 256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
# What the paired differences are taken over.
SPANS = ((0, 256), (256, 1024), (1024, 8192), (8192, 16384))
_CHECKPOINT, _ADAPTER, _REPORT = "training.pt", "adapter", "report"
_SAVE_EVERY = 60.0  # seconds
_DECODED = 32  # tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def option(name: str, kind: Any, default: Any, text: str, **more: Any) -> None:
        parser.add_argument(name, type=kind, default=default, help=text, **more)

    option("--model", str, None, "a folder of save_pretrained, or a .gguf file", required=True)
    option("--text", Path, None, "files or folders to train on", nargs="+", required=True)
    option("--evaluate", Path, [], "documents to measure on; not trained on", nargs="+")
    option("--out", Path, Path("extended"), "where checkpoint, adapter and report go")
    option(
        "--minutes", positive(float), 15.0, "of training; the first steps tell how many that makes"
    )
    option("--steps", positive(int), None, "of training, instead of --minutes")
    option("--window", positive(int), 256, "tokens that attention sees")
    option("--sinks", int, 4, "first tokens that stay visible")
    option("--latents", int, 64, "per head")
    option("--layers", layers, "suggest", "with latents: suggest, all, or a list such as 3,4,7")
    option("--mixer", str, "none", "in front of the latents", choices=["none", "conv", "rglru"])
    option("--output-rank", int, 0, "of a trained addition to the output projections")
    option("--gate", float, 3.0, "the window starts with 1 / (1 + exp(-gate)) of a token's weight")
    option("--tokens", positive(int), 2048, "of a training text")
    option("--batch", positive(int), 1, "training texts per step")
    option("--rate", positive(float), Recipe.rate, "highest learning rate")
    option("--teacher", float, Recipe.teacher, "weight of the pretrained model as a teacher")
    option("--layerwise", int, 0, "steps of a layer-wise warm start")
    option("--length", positive(int), 16384, "tokens of an evaluated document")
    option("--seed", int, 0, "of weights and texts")
    parser.add_argument("--decay", action="store_true", help="latents that forget at trained rates")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--skip-full", action="store_true", help="do not run full attention")


def layers(text: str) -> str | list[int]:
    """The type of --layers."""
    if text in ("suggest", "all"):
        return text
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text}, expected suggest, all, or a list such as 3,4,7"
        ) from None


def run(args: argparse.Namespace) -> int:
    """The whole of it; see the module."""
    check_folder("extend", args.out)
    for path in args.evaluate:
        if not path.is_file():
            raise SystemExit(f"[extend] {path} of --evaluate is no file, expected a document")
    held_out = {path.resolve() for path in args.evaluate}
    files = [path for path in text_files(args.text) if path.resolve() not in held_out]
    if not files:
        raise SystemExit("[extend] --text has no file that is not in --evaluate, expected some")
    torch.manual_seed(args.seed)
    print(f"loading {args.model}", flush=True)
    try:
        model, tokenizer = load(args.model)
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"[extend] --model is {args.model}, expected a folder of save_pretrained or a .gguf "
            f"file ({error})"
        ) from error
    texts = torch.cat([tokenize(tokenizer, path) for path in files])
    print(f"{texts.shape[0]:,} tokens of {len(files)} files to train on", flush=True)
    convert(
        model, window=args.window, sinks=args.sinks, latents=args.latents, mixer=args.mixer,
        gate=args.gate, output_rank=args.output_rank, decay=args.decay,
        layers=choose_layers(model, texts, args),
    )  # fmt: skip
    print(f"layers with latents: {model.config.latte['layers']}", flush=True)
    speed = train(model, texts, args)
    documents = {path.stem: tokenize(tokenizer, path)[: args.length + 1] for path in args.evaluate}
    report = measure(model, documents, args)
    report["training tokens per second"] = speed
    text = markdown(report, model)
    (args.out / f"{_REPORT}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"{_REPORT}.md").write_text(text)
    print(text)
    if documents:
        plot(report, args.out / f"{_REPORT}.png")
    return 0


def load(model: str) -> tuple[Any, Any]:
    """Model, bfloat16, and tokenizer, of a folder or a GGUF file."""
    path = Path(model)
    if path.suffix != ".gguf":
        return (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
            AutoTokenizer.from_pretrained(model),
        )
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    return loaded, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and those in the folders, in order; raises SystemExit for what does not exist."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise SystemExit(f"[extend] {path} does not exist, expected a file or a folder")
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files += inside
    return files


def read_text(path: Path) -> str:
    """A file's text; the tags of HTML are dropped."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix not in (".html", ".htm"):
        return text
    text = re.sub(r"(?is)<(script|style)\b.*?</\1>", "", text)
    text = re.sub(r"(?i)<(?:br|/p|/h\d|/li|/tr)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", text))


def tokenize(tokenizer: Any, path: Path) -> Tensor:
    """(T,) int64."""
    ids = tokenizer(read_text(path), verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def choose_layers(model: Any, texts: Tensor, args: argparse.Namespace) -> list[int] | None:
    if args.layers == "all":
        return None
    if args.layers != "suggest":
        return list(args.layers)
    length = min(8 * args.window, texts.shape[0] - 1)
    ids = texts[: texts.shape[0] // length * length].view(-1, length)
    # A text from each quarter.
    chosen = ids[:: max(1, ids.shape[0] // 4)][:4]
    return suggest_layers(model, chosen, window=args.window, sinks=args.sinks)


def train(model: Any, texts: Tensor, args: argparse.Namespace) -> float:
    """Trains, or goes on, with a progress bar; tokens per second."""
    checkpoint = args.out / _CHECKPOINT
    recipe = Recipe(
        steps=args.steps or 1, tokens=args.tokens, batch=args.batch, rate=args.rate,
        teacher=args.teacher, layerwise=args.layerwise, seed=args.seed,
    )  # fmt: skip
    if args.resume and checkpoint.exists():
        recipe = replace(recipe, steps=torch.load(checkpoint, weights_only=True)["recipe"]["steps"])
        run = Training(model, texts, recipe)
        run.load(checkpoint)
    else:
        if args.steps is None:
            recipe = replace(recipe, steps=steps_in(model, texts, recipe, 60 * args.minutes))
        run = Training(model, texts, recipe)
    bar = Bar(recipe.steps, "steps", sys.stderr, redraw=1)
    begun, first = time.monotonic(), run.step_index
    saved = begun
    while not run.done:
        run.step()
        recent = run.losses[-20:]
        bar.show(run.step_index, f"loss {sum(recent) / len(recent):.3f}")
        if time.monotonic() - saved > _SAVE_EVERY:
            run.save(checkpoint)
            saved = time.monotonic()
    seconds = time.monotonic() - begun
    bar.finish(f"{seconds / 60:.1f} minutes")
    run.save(checkpoint)
    save_adapter(model, args.out / _ADAPTER)
    return (run.step_index - first) * recipe.tokens * recipe.batch / max(seconds, 1e-9)


def steps_in(model: Any, texts: Tensor, recipe: Recipe, seconds: float) -> int:
    """How many steps fit, from two that are undone."""
    before = [parameter.detach().clone() for parameter in model.latte_parameters()]
    trial = Training(model, texts, replace(recipe, layerwise=0, steps=2))
    trial.step()
    begun = time.monotonic()
    trial.step()
    each = time.monotonic() - begun
    with torch.no_grad():
        for parameter, value in zip(model.latte_parameters(), before, strict=True):
            parameter.copy_(value)
    return max(1, int(seconds / each))


def measure(model: Any, documents: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Losses of each document by each way to read it, and paired differences."""
    window = args.window
    report: dict[str, Any] = {
        "settings": {**model.config.latte, "rotations": None, "layer_rotations": None},
        "model": Path(args.model).name,
        "recipe": {
            name: value
            for name, value in vars(args).items()
            if isinstance(value, (int, float, str)) and name not in ("model", "command")
        },
        "parameters": sum(p.numel() for p in model.latte_parameters()),
        "documents": {},
    }
    bar = Bar(4 * len(documents), "passes", sys.stderr, redraw=1)
    for done, (name, ids) in enumerate(documents.items()):
        losses: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}

        def read(way: str, text: Tensor, chunk: int | None = 2048, done: int = done) -> None:
            begun = time.monotonic()
            losses[way] = token_losses(model, text, chunk=chunk)  # noqa: B023
            seconds[way] = time.monotonic() - begun  # noqa: B023
            bar.show(4 * done + len(losses), f"{way} of {name}")  # noqa: B023

        if not args.skip_full:
            with full_attention(model):
                read("full attention", ids)
        with without_latents(model):
            read("window and sinks", ids)
        read("with latents", ids)
        with forgetful_latents(model, window):
            read("latents that forget", ids[: 8192 + 1], None)
        spans = [span for span in SPANS if span[1] <= losses["with latents"].shape[0]]
        near = losses["latents that forget"].shape[0]
        report["documents"][name] = {
            "buckets": {way: bucket_means(x, BORDERS) for way, x in losses.items()},
            "tokens per second": {way: x.shape[0] / seconds[way] for way, x in losses.items()},
            "against": {
                way: {f"{span[0]}-{span[1]}": gain(losses, way, *span) for span in spans}
                for way in ("window and sinks", "full attention")
                if way in losses
            },
        }
        report["documents"][name]["against"]["latents that forget"] = {
            f"{2 * window}-{near}": gain(losses, "latents that forget", 2 * window, near)
        }
    if documents:
        bar.finish("measured")
        longest = max(documents.values(), key=len)
        room = longest.shape[0] - _DECODED
        positions = [n for n in (room // 16, room) if n > 0]
        report["decoding"] = [
            cost._asdict() for cost in decode_costs(model, longest, positions, steps=_DECODED)
        ]
    return report


def gain(losses: dict[str, Tensor], way: str, first: int, last: int) -> dict[str, float]:
    """The model with latents against another way to read, see `difference`."""
    other = losses[way]
    return difference(losses["with latents"][: other.shape[0]], other, first, last)._asdict()


def markdown(report: dict[str, Any], model: Any) -> str:
    """The report as a page."""
    lines = [
        f"# {report['model']} as {model.config.architectures[0]}",
        "",
        f"{report['parameters']:,} new weights, window {report['settings']['window']} + "
        f"{report['settings']['sinks']} sinks, layers {report['settings']['layers']}; training "
        f"{report['training tokens per second']:.0f} tokens per second. Losses in nats per token.",
    ]
    for name, document in report["documents"].items():
        count = len(document["buckets"]["with latents"])
        heads = [f"{a}-{b}" for a, b in pairwise(BORDERS)][:count]
        lines += ["", f"## {name}", "", "| | " + " | ".join(heads) + " | tokens/s |"]
        lines += ["|---" * (count + 2) + "|"]
        for way, means in document["buckets"].items():
            cells = [f"{mean:.3f}" for mean in means] + [""] * (count - len(means))
            speed = document["tokens per second"][way]
            lines.append(f"| {way} | " + " | ".join(cells) + f" | {speed:.0f} |")
        lines += ["", "Paired differences of the model with latents, ± a standard error:", ""]
        for way, values in document["against"].items():
            for span, value in values.items():
                lines.append(f"* against {way}, {span}: {Difference(**value)}")
    costs = report.get("decoding", [])
    if len(costs) == 2:
        near, far = costs
        lines += [
            "",
            f"A decoding step behind {far['position']:,} tokens over one behind "
            f"{near['position']:,}: {far['seconds'] / near['seconds']:.2f} times the time, "
            f"{far['nbytes'] / near['nbytes']:.2f} times the {near['nbytes']:,} bytes of cache. "
            f"Prefill between them: {far['prefill']:.0f} tokens per second.",
        ]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Loss by position, a panel per document, if matplotlib is there."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    documents = report["documents"]
    figure, panels = pyplot.subplots(
        1, len(documents), figsize=(5 * len(documents), 4), squeeze=False
    )
    for panel, (name, document) in zip(panels[0], documents.items(), strict=True):
        for way, means in document["buckets"].items():
            panel.plot(BORDERS[1 : len(means) + 1], means, marker="o", label=way)
        panel.set(xscale="log", xlabel="position", ylabel="nats per token", title=name)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
