# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of docs/figures: what small trained models of bytes do with a held-out text.

python tools/draw_figures.py --out docs/figures

Two variants are trained as `python -m latte_ext demo` trains, for a fixed number of steps. Whom a
token attends to is read off the operators themselves: with the identity as values their output is
the matrix p(s|t).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import latte_ext
import matplotlib
import torch
from latte_ext import demo
from latte_ext._demo_text import load_corpus
from latte_ext.nn import LatteLM
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

LATENTS, MACCHIATO = "latte-conv++", "latte-conv-swa++"
STEPS = 1200
# The second block's, whose input already knows the neighbours.
LAYER = 1
SHOWN, LONG = 72, 4096
# Square roots: most weights of a row are small.
COLOURS: dict[str, Any] = {"cmap": "magma_r", "norm": PowerNorm(0.5, 0, 1)}
BYTES_PER_NUMBER = 4


def trained(variant: str, text: Tensor, steps: int) -> LatteLM:
    """The demo's model of that name after so many steps on text (n,) uint8."""
    torch.manual_seed(demo.SEED)
    model = demo.build_model(variant)
    demo.train(model, text, steps, clock=itertools.count().__next__)
    return model.eval()


@torch.no_grad()
def operands(model: LatteLM, tokens: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """What one layer's operator is called with for tokens (T,): tensors and options."""
    calls: list[tuple[list[Tensor], dict[str, Any]]] = []
    layer: Any = model.blocks[LAYER].attention
    plain = layer.operators

    def recorded(name: str) -> Any:
        def call(*tensors: Tensor, **options: Any) -> Any:
            calls.append((list(tensors), options))
            return getattr(plain, name)(*tensors, **options)

        return call

    names = ("latent_attention", "macchiato_attention")
    layer.operators = dataclasses.replace(plain, **{name: recorded(name) for name in names})
    model(tokens[None].long())
    layer.operators = plain
    ((tensors, options),) = calls
    return tensors, options


def identity(heads: int, tokens: int) -> Tensor:
    """Values (1,heads,T,T) with which the output of an operator is p(s|t)."""
    return torch.eye(tokens).expand(1, heads, -1, -1)


def past(matrix: Tensor) -> Tensor:
    """A causal matrix whose future, exact zeros, is not drawn."""
    assert matrix.triu(1).count_nonzero() == 0
    return matrix.masked_fill(torch.ones_like(matrix, dtype=torch.bool).triu(1), torch.nan)


def characters(tokens: Tensor) -> list[str]:
    """One visible sign for every byte."""
    signs = {" ": "·", "\n": "¶"}
    text = tokens.numpy().tobytes().decode("latin-1")
    return [signs.get(sign, sign if sign.isprintable() else "?") for sign in text]


def label(ax: Axes, text: list[str], axes: str) -> None:
    """Writes the text along the axes named in `axes`."""
    for axis in axes:
        ticks = {"x": ax.set_xticks, "y": ax.set_yticks}[axis]
        ticks(range(len(text)), text, fontsize=5.5, family="monospace")
    ax.tick_params(length=0, pad=1)


def save(figure: Any, path: Path) -> None:
    """A PNG that does not say when and by what it was written."""
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def draw_attention(model: LatteLM, tokens: Tensor, path: Path) -> None:
    """p(l|t), the weights of the keys and their product, of the head that spreads least."""
    (q, k, v), _ = operands(model, tokens)
    matrix = latte_ext.latent_attention(q, k, identity(v.shape[1], len(tokens)))[0]
    assert (matrix.sum(-1) - 1).abs().max() < 1e-5
    head = int(matrix.square().sum((1, 2)).argmax())
    text = characters(tokens)
    figure, axes = plt.subplots(
        1, 3, figsize=(8.6, 5.2), width_ratios=[0.25, 0.25, 1], layout="constrained"
    )
    axes[0].imshow(q[0, head].softmax(-1), aspect="auto", **COLOURS)
    axes[0].set_title("p(l|t)\nasked by t", fontsize=9)
    label(axes[0], text, "y")
    keys = k[0, head]
    axes[1].imshow((keys - keys.amax(0)).exp(), aspect="auto", **COLOURS)
    axes[1].set_title("exp(k - max)\ntold by s", fontsize=9)
    label(axes[1], text, "y")
    for ax in axes[:2]:
        ax.set_xticks([0, q.shape[-1] - 1], ["1", str(q.shape[-1])], fontsize=8)
        ax.set_xlabel("latent l", fontsize=9)
    shown = axes[2].imshow(past(matrix[head]), **COLOURS)
    axes[2].set_title("p(s|t) = sum over l of p(l|t) p(s|l,t)", fontsize=9)
    axes[2].set_xlabel("s, the token that is read", fontsize=9)
    axes[2].set_ylabel("t, the token that reads", fontsize=9)
    label(axes[2], text, "xy")
    figure.colorbar(shown, ax=axes[2], shrink=0.6)
    save(figure, path)


def draw_latents(model: LatteLM, tokens: Tensor, path: Path) -> None:
    """Over a text, what the queries ask and what the keys tell the latents of one head."""
    (q, k, v), _ = operands(model, tokens)
    matrix = latte_ext.latent_attention(q, k, identity(v.shape[1], len(tokens)))[0]
    head = int(matrix.square().sum((1, 2)).argmax())
    text = characters(tokens)
    rows = (
        (q[0, head].softmax(-1), "p(l|t): where a token reads"),
        (k[0, head].softmax(0), "p(s|l): what each latent has kept at the end of the text"),
    )
    figure, axes = plt.subplots(len(rows), 1, figsize=(11, 4.8), layout="constrained")
    for ax, (values, title) in zip(axes, rows, strict=True):
        shown = ax.imshow(values.T, aspect="auto", **COLOURS)
        ax.set_title(title, fontsize=9)
        ax.set_ylabel("latent l", fontsize=9)
        ax.set_yticks([0, values.shape[1] - 1], ["1", str(values.shape[1])], fontsize=8)
        label(ax, text, "x")
    figure.colorbar(shown, ax=axes, shrink=0.6)
    save(figure, path)


def draw_state(model: LatteLM, tokens: Tensor, path: Path) -> None:
    """How the state of one head grows full over a long text, and how many bytes all states take."""
    (_, k, _), _ = operands(model, tokens)
    keys = k[0, 0].double()
    lse = keys.logcumsumexp(0)
    spread = (2 * lse - (2 * keys).logcumsumexp(0)).exp()
    lengths = [2**i for i in range(5, LONG.bit_length())]
    sizes = []
    for length in lengths:
        _, cache = model.prefill(tokens[None, :length].long())
        sizes.append(sum(layer.nbytes for layer in cache))
    layers, width = len(model.blocks), 2 * model.config.embed_dim
    softmax = [BYTES_PER_NUMBER * layers * width * length for length in lengths]

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    axes[0].plot(lse, linewidth=0.9)
    axes[0].set_title("log-normaliser of each latent", fontsize=9)
    axes[1].loglog(range(1, len(spread) + 1), spread, linewidth=0.9)
    axes[1].set_title("tokens that a latent's mean is spread over", fontsize=9)
    axes[2].loglog(lengths, softmax, label="keys and values of softmax attention")
    axes[2].loglog(lengths, sizes, label="states of Latte")
    axes[2].set_title("bytes kept of the text", fontsize=9)
    axes[2].legend(fontsize=8)
    for ax in axes:
        ax.set_xlabel("tokens read", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    save(figure, path)


def draw_macchiato(model: LatteLM, tokens: Tensor, path: Path) -> None:
    """The parts of p(s|t) that the window and the latents have, in two heads."""
    (q_latent, k_latent, q, k, v), options = operands(model, tokens)
    values = identity(v.shape[1], len(tokens))
    options = {**options, "state": None, "return_state": False}
    matrix = latte_ext.macchiato_attention(q_latent, k_latent, q, k, values, **options)[0]
    assert (matrix.sum(-1) - 1).abs().max() < 1e-5
    local = q_latent[0].softmax(-1)[..., 0].mean(-1)
    text = characters(tokens)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    for ax, head in zip(axes, (int(local.argmax()), int(local.argmin())), strict=True):
        shown = ax.imshow(past(matrix[head]), **COLOURS)
        ax.set_title(
            f"p(s|t), head {head + 1}: {local[head]:.0%} of it by the window of "
            f"{options['window']} tokens",
            fontsize=9,
        )
        ax.set_xlabel("s, the token that is read", fontsize=9)
        label(ax, text, "xy")
    axes[0].set_ylabel("t, the token that reads", fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.6)
    save(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, for each model")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(None, demo.SEQUENCE)
    long = corpus.held_out[:LONG]
    short = corpus.held_out[200 : 200 + SHOWN]
    model = trained(LATENTS, corpus.train, args.steps)
    draw_attention(model, short, args.out / "attention.png")
    draw_latents(model, short, args.out / "latents.png")
    draw_state(model, long, args.out / "state.png")
    model = trained(MACCHIATO, corpus.train, args.steps)
    draw_macchiato(model, short, args.out / "macchiato.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
