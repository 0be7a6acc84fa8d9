# SPDX-License-Identifier: Apache-2.0
"""What a conversion costs and gains: losses by position, and paired differences with errors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import LatteCache
from .convert import attention_layers, check_converted


@contextmanager
def full_attention(model: Any) -> Iterator[None]:
    """The pretrained model: full attention, nothing of what the conversion added."""
    check_converted("full_attention", model)
    with implementation(model, model.config.latte["implementation"]):
        yield


@contextmanager
def implementation(model: Any, name: str) -> Iterator[None]:
    """Another attention implementation for a while."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


@contextmanager
def without_latents(model: Any) -> Iterator[None]:
    """Window and sinks alone, with the pretrained weights."""
    check_converted("without_latents", model)
    with _planned(model, latents=False):
        yield


@contextmanager
def forgetful_latents(model: Any, every: int) -> Iterator[None]:
    """The same weights with latents that forget all, every so many tokens: what is lost then is
    what they knew from further back. For one sequence at a time, without a cache."""
    check_converted("forgetful_latents", model)
    with _planned(model, reset=every):
        yield


@contextmanager
def _planned(model: Any, **changes: Any) -> Iterator[None]:
    layers = attention_layers(model)
    plans = [layer.latte_plan for layer in layers]
    for layer, plan in zip(layers, plans, strict=True):
        layer.latte_plan = replace(plan, **changes)
    try:
        yield
    finally:
        for layer, plan in zip(layers, plans, strict=True):
            layer.latte_plan = plan


@torch.inference_mode()
def token_losses(model: Any, ids: Tensor, *, chunk: int | None = 2048) -> Tensor:
    """Negative log-likelihood in nats of ids[1:] given what is before them, float32.

    Args:
        model: any causal language model of transformers.
        ids: (T,) of one document.
        chunk: tokens per call, with a cache between them, so that memory does not grow with the
            vocabulary times T; None: all in one call.
    """
    model.eval()
    cache = None
    losses: list[Tensor] = []
    for part in ids.split(ids.shape[0] if chunk is None else chunk):
        first = sum(x.shape[0] for x in losses)
        options = {"use_cache": chunk is not None, "cache": cache}
        out = model(input_ids=part[None], **options)
        cache = out.cache if chunk is not None else None
        targets = ids[first + 1 : first + 1 + part.shape[0]]
        logits = out.logits[0, : targets.shape[0]]
        losses.append(
            torch.cat([
                F.cross_entropy(rows.float(), want, reduction="none")
                for rows, want in zip(logits.split(512), targets.split(512), strict=True)
            ])
        )  # fmt: skip
    return torch.cat(losses)


class DecodeCost(NamedTuple):
    """Median seconds of a decoding step behind `position` tokens, bytes of the cache there, and
    tokens per second of the prefill from the position before it."""

    position: int
    seconds: float
    nbytes: int
    prefill: float


@torch.inference_mode()
def decode_costs(
    model: Any, ids: Tensor, positions: Sequence[int], *, steps: int = 32
) -> list[DecodeCost]:
    """What a token costs behind the first tokens of a document.

    Args:
        model: a converted one.
        ids: (T,).
        positions: rising, steps apart, within T.
    """
    check_converted("decode_costs", model)
    model.eval()
    cache, costs = LatteCache(model.config), []
    for position in positions:
        unread = ids[cache.get_seq_length() : position]
        begun = time.perf_counter()
        for part in unread.split(2048):
            model(input_ids=part[None], use_cache=True, cache=cache, logits_to_keep=1)
        prefill = unread.shape[0] / (time.perf_counter() - begun)
        times = []
        for token in ids[position : position + steps].split(1):
            begun = time.perf_counter()
            model(input_ids=token[None], use_cache=True, cache=cache)
            times.append(time.perf_counter() - begun)
        costs.append(DecodeCost(position, sorted(times)[len(times) // 2], cache.nbytes, prefill))
    return costs


class Difference(NamedTuple):
    """A mean paired difference of losses and its standard error, in nats per token."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


def difference(
    losses: Tensor, other: Tensor, first: int, last: int, *, block: int = 64, draws: int = 2000
) -> Difference:
    """Mean of losses - other at positions [first, last), by a bootstrap over blocks of tokens.

    Neighbouring tokens are not independent; blocks of 64 nearly are.
    """
    paired = (losses - other)[first:last].double()
    count = paired.shape[0] // block
    if count < 2:
        raise ValueError(
            f"[difference] {paired.shape[0]} tokens, expected at least two blocks of {block}"
        )
    blocks = paired[: count * block].view(count, block).mean(1)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(count, (draws, count), generator=generator)
    return Difference(float(paired.mean()), float(blocks[picks].mean(1).std()))


def bucket_means(losses: Tensor, borders: Sequence[int]) -> list[float]:
    """Mean loss between each two borders that the document reaches."""
    return [
        float(losses[first:last].mean())
        for first, last in pairwise(borders)
        if first < losses.shape[0]
    ]
