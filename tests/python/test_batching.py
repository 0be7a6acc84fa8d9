# SPDX-License-Identifier: Apache-2.0
"""Sequences join and leave a batch: select, concat and scatter of states and caches."""

from collections.abc import Callable
from typing import Any

import latte_ext
import pytest
import torch
from helpers import load_example
from latte_ext import LatentState, MacchiatoState, WindowCache
from latte_ext.nn import VARIANTS, LatteConfig, LatteLM, LayerCache, RecurrentState
from torch.utils._pytree import tree_leaves


def latents(batch: int, heads: int = 2, dtype: torch.dtype = torch.float32) -> LatentState:
    k, v = torch.randn(batch, heads, 3, 5, dtype=dtype), torch.randn(batch, heads, 3, 4).to(dtype)
    return latte_ext.latent_attention(k, k, v, return_state=True)[1]


def window(batch: int) -> WindowCache:
    x = torch.randn(batch, 2, 9, 4)
    return latte_ext.sliding_window_attention(x, x, x, window=3, return_cache=True)[1]


def macchiato(batch: int) -> MacchiatoState:
    return MacchiatoState(latents(batch), window(batch))


def windowless(batch: int) -> MacchiatoState:
    return MacchiatoState(latents(batch), None)


def layer(batch: int) -> LayerCache:
    state = RecurrentState(torch.randn(batch, 6), torch.rand(batch) < 0.5)
    return LayerCache(macchiato(batch), state)


KINDS = [latents, window, macchiato, windowless, layer]
kinds = pytest.mark.parametrize("make", KINDS)


def same_bits(got: object, want: object) -> None:
    for x, y in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y))


@kinds
def test_concat_is_undone_by_select(make: Callable[[int], Any]) -> None:
    parts = [make(2), make(0), make(1), make(3)]
    whole = type(parts[0]).concat(iter(parts))
    for part, index in zip(parts, ([0, 1], [], [2], [3, 4, 5]), strict=True):
        same_bits(whole.select(index), part)
    only = type(parts[0]).concat(parts[:1])
    same_bits(only, parts[0])
    assert tree_leaves(only)[0].data_ptr() != tree_leaves(parts[0])[0].data_ptr()


@kinds
def test_scatter_replaces_some(make: Callable[[int], Any]) -> None:
    state, source = make(5), make(2)
    before = state.clone()
    state.scatter([3, -5], source)
    same_bits(state.select([3, 0]), source)
    same_bits(state.select([1, 2, 4]), before.select([1, 2, 4]))
    again = before.clone()
    again.scatter(torch.tensor([True, False, False, True, False]), source.select([1, 0]))
    same_bits(again, state)
    before.scatter([], make(0))
    same_bits(before.select([1]), state.select([1]))


def test_gradients_reach_the_parts() -> None:
    parts = [latents(1, dtype=torch.float64) for _ in range(2)]
    for part in parts:
        part.mean.requires_grad_()
    whole = LatentState.concat(parts)
    (whole.mean * torch.arange(1.0, 3)[:, None, None, None]).sum().backward()
    for i, part in enumerate(parts):
        assert (part.mean.grad == i + 1).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LatentState.concat([]), ValueError, r"\[LatentState.concat\] got no states"),
        (
            lambda: LatentState.concat([latents(1), window(1)]),  # type: ignore[list-item]
            TypeError,
            r"\[LatentState.concat\] states\[1\] is a WindowCache",
        ),
        (
            lambda: LatentState.concat([latents(1), latents(1, 3)]),
            ValueError,
            r"\[LatentState.concat\] states\[1\].max has shape \(1, 3, 5\), expected \('N', 2, 5\)",
        ),
        (
            lambda: LatentState.concat([latents(1), latents(1, dtype=torch.float64)]),
            TypeError,
            r"states\[1\].max has dtype torch.float64, expected torch.float32",
        ),
        (
            lambda: MacchiatoState.concat([macchiato(1), windowless(1)]),
            TypeError,
            r"\[MacchiatoState.concat\] states\[1\]",
        ),
        (lambda: latents(3).scatter([0, 0], latents(2)), ValueError, "expected no place twice"),
        (lambda: latents(3).scatter([-3, 0], latents(2)), ValueError, "expected no place twice"),
        (lambda: latents(3).scatter([0], latents(2)), ValueError, "index has 1 places, expected 2"),
        (lambda: latents(3).scatter([3], latents(1)), ValueError, "index does not fit"),
        (lambda: latents(3).scatter([0.5], latents(1)), TypeError, "index has dtype"),  # type: ignore[list-item]
        (lambda: latents(3).scatter([0], window(1)), TypeError, "source is a WindowCache"),  # type: ignore[arg-type]
        (lambda: layer(3).scatter([0], layer(1)._replace(mixer=None)), TypeError, "source"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_changing_batch_gives_the_tokens_of_one_at_a_time(variant: str) -> None:
    sizes = {"vocab_size": 32, "embed_dim": 16, "num_layers": 2, "num_heads": 4}
    if variant != "softmax":
        sizes["num_latents"] = 5
    if "window" in VARIANTS[variant]:
        sizes["window"] = 4
    model = LatteLM(LatteConfig.named(variant, **sizes), dtype=torch.float64).eval()
    example = load_example("continuous_batching")
    scheduler = example.Scheduler(model, max_batch=3)
    requests, seen = [], set()
    # A request per step, of lengths such that sequences come and go at most steps.
    for length, count in [(7, 4), (1, 1), (12, 6), (3, 2), (5, 9), (2, 1), (9, 3), (4, 5)]:
        request = example.Request(torch.randint(32, (length,)), count)
        requests.append(scheduler.submit(request))
        scheduler.step()
        seen.add(len(scheduler.running))
    while scheduler.busy:
        scheduler.step()
        seen.add(len(scheduler.running))
    assert seen == {0, 1, 2, 3}
    for request in requests:
        alone = model.generate(request.prompt[None], request.max_new_tokens, temperature=0)
        assert request.tokens == alone[0, request.prompt.shape[0] :].tolist()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    load_example("continuous_batching").main([])
    assert "tokens of 10 requests in" in capsys.readouterr().out
