# SPDX-License-Identifier: Apache-2.0
"""Quantised idle states: bounds of the error, the report of it, and storage."""

from typing import Any

import latte_ext
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latte_ext import LatentState, QuantisedState, storage
from latte_ext.nn import LatteConfig, LatteLM
from torch.utils._pytree import tree_leaves

SETTINGS = settings(deadline=None, max_examples=25, derandomize=True, database=None)
formats = pytest.mark.parametrize("format", ["int8", "float16"])


def make_state(size: float = 1.0, dtype: torch.dtype = torch.float32) -> LatentState:
    k = torch.randn(3, 2, 9, 5, dtype=dtype)
    k[0] = -torch.inf
    k[:, :, :, 1] = -torch.inf
    v = size * torch.randn(3, 2, 9, 33, dtype=dtype)
    return latte_ext.latent_attention(k, k, v, return_state=True)[1]


@formats
@SETTINGS
@given(
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e30]), seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_the_error_is_bounded(format: Any, size: float, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    state = make_state(size, dtype)
    back = latte_ext.quantise(state, format).dequantise()
    assert torch.equal(back.max, state.max)
    assert torch.equal(back.norm, state.norm)
    assert back.dtype == dtype
    largest = state.mean.abs().amax(3, keepdim=True)
    if format == "int8":
        bound = (largest / 254 * (1 + 1e-6)).expand_as(state.mean)
    else:
        bound = state.mean.abs() * 2**-11 + largest * 2**-24
    assert ((back.mean - state.mean).abs() <= bound).all()
    assert (back.mean[0] == 0).all()


@formats
def test_memory(format: Any) -> None:
    state = make_state()
    bytes_per_code = 1 if format == "int8" else 2
    quantised = latte_ext.quantise(state, format)
    assert quantised.nbytes == 3 * 2 * 5 * (33 * bytes_per_code + 12)
    assert quantised.nbytes < state.nbytes * (0.35 if format == "int8" else 0.6)


@pytest.mark.parametrize("heads", [2, 4])
@formats
def test_the_reported_error_is_that_of_the_output(format: Any, heads: int) -> None:
    state, q = make_state(), torch.randn(3, heads, 6, 5)
    restored = latte_ext.quantise(state, format).dequantise()
    # A token without a key leaves the state alone: y is what the state says.
    k, v = torch.full((3, 2, 6, 5), -torch.inf), torch.zeros(3, 2, 6, 33)
    want, got = (
        latte_ext.latent_attention(q.double(), k.double(), v.double(), scale=0.7, state=x).double()
        for x in (
            LatentState(*(part.double() for part in state)),
            LatentState(*(part.double() for part in restored)),
        )
    )
    error = got - want
    report = latte_ext.quantisation_error(state, q, format, scale=0.7)
    assert report.largest == pytest.approx(error.abs().max().item(), rel=1e-9)
    assert report.rms == pytest.approx(error.square().mean().sqrt().item(), rel=1e-9)
    size = want.square().mean().sqrt().item()
    assert report.relative == pytest.approx(report.rms / size, rel=1e-9)
    assert 0 < report.relative < (1e-2 if format == "int8" else 3e-4)


@formats
def test_quantised_states_come_back_bit_for_bit(format: Any) -> None:
    quantised = latte_ext.quantise(make_state(), format)
    back = storage.from_bytes(storage.to_bytes(quantised))
    assert isinstance(back, QuantisedState)
    for got, want in zip(back, quantised, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@formats
def test_a_whole_cache(format: Any) -> None:
    """The latents are rounded, the rest is what it was; decoding goes on."""
    config = LatteConfig.named(
        "latte-rglru-swa++", vocab_size=32, embed_dim=64, num_layers=2, num_heads=2,
        num_latents=3, window=3,
    )  # fmt: skip
    model = LatteLM(config).eval()
    logits, cache = model.prefill(torch.randint(32, (2, 50)))
    stored = storage.to_bytes(latte_ext.quantise(cache, format))
    assert len(stored) < len(storage.to_bytes(cache))
    back = latte_ext.dequantise(storage.from_bytes(stored))
    for got, want in zip(back, cache, strict=True):
        assert isinstance(got.attention.latent, LatentState)
        for x, y in zip(
            tree_leaves(got._replace(attention=got.attention._replace(latent=None))),
            tree_leaves(want._replace(attention=want.attention._replace(latent=None))),
            strict=True,
        ):
            assert (x is None and y is None) or torch.equal(x, y)
    token = logits.argmax(1)
    exact, rounded = model.step(token, cache), model.step(token, back)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05 if format == "int8" else 2e-3)


@formats
def test_the_largest_numbers_do_not_overflow(format: Any) -> None:
    state = make_state()
    state.mean.sign_().mul_(torch.finfo(torch.float32).max)
    back = latte_ext.quantise(state, format).dequantise()
    torch.testing.assert_close(back.mean, state.mean, rtol=5e-3, atol=0)


def test_bad_input() -> None:
    state = make_state()
    with pytest.raises(ValueError, match=r"^\[quantise\] format is 'int4', expected one of"):
        latte_ext.quantise(state, "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^\[quantisation_error\] q has shape"):
        latte_ext.quantisation_error(state, torch.randn(3, 3, 2, 5))
    state.mean[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"^\[quantise\] state.mean holds infinity or NaN"):
        latte_ext.quantise(state)
    mean = make_state().mean
    bad = QuantisedState(state.max, state.norm, mean, state.max)
    with pytest.raises(ValueError, match=r"code has dtype torch.float32"):
        storage.from_bytes(storage.to_bytes(bad))
    good = latte_ext.quantise(make_state())
    with pytest.raises(ValueError, match=r"\[QuantisedState\] scale has shape"):
        storage.from_bytes(storage.to_bytes(good._replace(scale=good.scale[:, :1])))
