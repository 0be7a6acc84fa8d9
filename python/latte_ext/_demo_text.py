# SPDX-License-Identifier: Apache-2.0
"""The demo's text, which every machine has, and the n-gram baselines on it."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

BYTES = 256
# Every tenth file of the standard library is held out, or the last tenth of another text.
HELD_OUT_EVERY = 10
# Added to every count of the baselines; the best for a trigram of 1, 0.1, 0.01 on the sources.
SMOOTHING = 0.1
# Bytes before a scored window: the trigram looks at two, the model's first input is the last one.
CONTEXT = 2


class Corpus(NamedTuple):
    """Training and held-out text as uint8 tensors (n,), and where they are from."""

    source: str
    train: Tensor
    held_out: Tensor


def standard_library_files() -> list[Path]:
    """Python's own source files, sorted; tests (any name that starts so) and packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    chosen = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not any(p.startswith("test") or p in ("site-packages", "dist-packages") for p in parts):
            chosen.append(path)
    return chosen


def load_corpus(text: Path | None, window: int) -> Corpus:
    """The bytes of a file, or of the standard library's sources if `text` is None.

    Raises:
        ValueError: too little text for windows of so many bytes.
    """
    if text is None:
        source = "the standard library's sources"
        files = [path.read_bytes() for path in standard_library_files()]
        held_out = b"".join(files[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        del files[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        train = b"".join(files)
    else:
        source = str(text)
        data = text.read_bytes()
        border = len(data) - len(data) // HELD_OUT_EVERY
        train, held_out = data[:border], data[border:]
    least = window + CONTEXT
    if min(len(train), len(held_out)) < least:
        raise ValueError(
            f"[demo] {source}: got {len(train)} bytes for training and {len(held_out)} held out, "
            f"expected at least {least} of each"
        )
    tensors = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, held_out)]
    return Corpus(source, *tensors)


def window_starts(text: Tensor, window: int, most: int) -> Tensor:
    """First positions (n,) of at most so many windows of text, evenly spread, without overlap."""
    count = min(most, (len(text) - CONTEXT) // window)
    return CONTEXT + torch.arange(count) * (len(text) - CONTEXT - window) // max(count - 1, 1)


def ngram_bits(train: Tensor, text: Tensor, positions: Tensor, order: int) -> float:
    """Bits per byte of text[positions] given the order - 1 bytes before each.

    Probabilities are counts in `train` plus SMOOTHING. train and text are uint8 (n,), order is at
    most 3, positions (m,) at least order - 1.
    """

    def ngrams(source: Tensor, ends: Tensor) -> Tensor:
        codes = torch.zeros_like(ends)
        for back in reversed(range(order)):
            codes = codes * BYTES + source[ends - back]
        return codes

    codes = ngrams(train, torch.arange(order - 1, len(train)))
    counts = torch.bincount(codes, minlength=BYTES**order)
    contexts = counts.view(-1, BYTES).sum(1)
    codes = ngrams(text, positions)
    seen, total = counts[codes].double(), contexts[codes // BYTES].double()
    p = (seen + SMOOTHING) / (total + BYTES * SMOOTHING)
    return -p.log2().mean().item()
