# SPDX-License-Identifier: Apache-2.0
"""sliding_window_attention and macchiato_attention: limits, caches, steps."""

import itertools

import pytest
import torch
from latte_ext import (
    MacchiatoState,
    WindowSinks,
    latent_attention,
    macchiato_attention,
    macchiato_attention_step,
    sliding_window_attention,
    sliding_window_attention_step,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def attention_inputs(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 23,
    key_dim: int = 5,
    dim: int = 6,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(batch, heads, tokens, key_dim, dtype=dtype),
        normal(batch, kv_heads, tokens, key_dim, dtype=dtype),
        normal(batch, kv_heads, tokens, dim, dtype=dtype),
    )


def band(tokens: int, window: int, causal: bool) -> Tensor:
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (distance.abs() < window) & ((distance >= 0) | (not causal))


CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "symmetric"])


@CAUSAL
@pytest.mark.parametrize("window", [1, 3, 16, 23, 100])
def test_window_is_masked_softmax_attention(window: int, causal: bool) -> None:
    q, k, v = attention_inputs()
    y = sliding_window_attention(q, k, v, window=window, causal=causal)
    mask = band(23, window, causal)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("window", [1, 4, 40])
def test_pieces_and_steps_are_the_whole(window: int) -> None:
    """Packed pieces of different lengths, with a mask, then token by token without one."""
    q, k, v = attention_inputs()
    mask = torch.rand(2, 23) < 0.7
    ends = torch.tensor([[0, 0], [9, 5], [9, 6], [13, 18]])
    for n in range(2):
        mask[n, ends[-1, n] :] = True
    whole = sliding_window_attention(q, k, v, window=window, key_mask=mask)
    cache = None
    for begin, end in itertools.pairwise(ends):
        parts = [slice(int(a), int(b)) for a, b in zip(begin, end, strict=True)]
        joined = [
            torch.cat([x[n : n + 1, :, part] for n, part in enumerate(parts)], 2) for x in (q, k, v)
        ]
        y, cache = sliding_window_attention(
            *joined,
            window=window,
            key_mask=torch.cat([mask[n : n + 1, part] for n, part in enumerate(parts)], 1),
            cu_seqlens=torch.cat([ends[0, :1], (end - begin).cumsum(0)]),
            cache=cache,
            return_cache=True,
        )
        want = torch.cat([whole[n : n + 1, :, part] for n, part in enumerate(parts)], 2)
        torch.testing.assert_close(y, want)
    assert cache is not None
    assert torch.equal(cache.position, ends[-1])
    for _ in range(5):
        at = cache.position.tolist()
        rows = [torch.stack([x[n, :, t] for n, t in enumerate(at)]) for x in (q, k, v, whole)]
        torch.testing.assert_close(sliding_window_attention_step(*rows[:3], cache), rows[3])


def macchiato_inputs(
    latents: int = 3, latent_heads: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    q, k, v = attention_inputs(dtype=dtype)
    return (
        normal(2, 4, 23, 1 + latents, dtype=dtype),
        normal(2, latent_heads, 23, latents, dtype=dtype),
        q,
        k,
        v,
    )


@CAUSAL
def test_macchiato_limits(causal: bool) -> None:
    q_latent, k_latent, q, k, v = macchiato_inputs(latent_heads=2)
    plain = latent_attention(q_latent[..., 1:], k_latent, v, causal=causal)
    y = macchiato_attention(q_latent, k_latent, q, k, v, window=0, causal=causal)
    torch.testing.assert_close(y, plain)

    local = sliding_window_attention(q, k, v, window=5, causal=causal)
    empty = k_latent[..., :0]
    y = macchiato_attention(q_latent[..., :1], empty, q, k, v, window=5, causal=causal)
    torch.testing.assert_close(y, local)

    only_window = q_latent.clone()
    only_window[..., 1:] = -torch.inf
    y = macchiato_attention(only_window, k_latent, q, k, v, window=5, causal=causal)
    torch.testing.assert_close(y, local)
    y = macchiato_attention(only_window, k_latent, q, k, v, window=23, causal=causal)
    full = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(y, full)

    no_window = q_latent.clone()
    no_window[..., 0] = -torch.inf
    y = macchiato_attention(no_window, k_latent, q, k, v, window=5, causal=causal)
    torch.testing.assert_close(y, plain)


@pytest.mark.parametrize("latent_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 4])
def test_macchiato_pieces_and_steps_are_the_whole(window: int, latent_heads: int) -> None:
    inputs = macchiato_inputs(latent_heads=latent_heads)
    whole = macchiato_attention(*inputs, window=window)
    head = [x[:, :, :9] for x in inputs]
    y, state = macchiato_attention(*head, window=window, return_state=True)
    torch.testing.assert_close(y, whole[:, :, :9])
    rest = [x[:, :, 9:] for x in inputs]
    y, final = macchiato_attention(*rest, window=window, state=state, return_state=True)
    torch.testing.assert_close(y, whole[:, :, 9:])
    assert isinstance(state, MacchiatoState)
    stepped = state.clone()
    for t in range(9, 23):
        y = macchiato_attention_step(*(x[:, :, t] for x in inputs), stepped)
        torch.testing.assert_close(y, whole[:, :, t])
    for got, want in zip(stepped, final, strict=True):
        if want is not None:
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)


def test_sinks_are_tokens_that_left_the_window() -> None:
    """The first tokens as sinks: as if the window reached back to them as well."""
    q, k, v = attention_inputs()
    position = torch.arange(3).expand(2, 3)
    sinks = WindowSinks(q, k[:, :, :3], v[:, :, :3], position)
    y = sliding_window_attention(q, k, v, window=4, sinks=sinks)
    mask = band(23, 4, True) | ((torch.arange(23) < 3) & (torch.ones(23, 23) > 0).tril())
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(y, expected)
    cache = None
    for piece in (slice(0, 2), slice(2, 11), slice(11, 23)):
        part = sinks._replace(q=q[:, :, piece])
        got, cache = sliding_window_attention(
            q[:, :, piece], k[:, :, piece], v[:, :, piece], window=4, sinks=part, cache=cache,
            return_cache=True,
        )  # fmt: skip
        torch.testing.assert_close(got, expected[:, :, piece])
