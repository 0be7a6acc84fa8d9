# SPDX-License-Identifier: Apache-2.0
"""Calls of sliding_window_attention and macchiato_attention, and their float64 solution.

Notation: B batch, T tokens, H query heads, Hk key/value heads, L latents, D value channels.
"""

import math
from collections.abc import Callable

import pytest
import torch
from helpers import TOLERANCES, assert_close, compute_dtype, random_mask, rms
from torch import Tensor

Attention = Callable[..., Tensor]

CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "symmetric"])

FEATURES: dict[str, dict[str, object]] = {
    "mask": {"key_mask": random_mask(2, 131)},
    "mask_left": {"key_mask": torch.arange(131) >= torch.tensor([[70], [3]])},
    "mask_one_row_empty": {"key_mask": torch.arange(131) < torch.tensor([[0], [131]])},
    "mask_strided": {"key_mask": random_mask(131, 2).t()},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 69, 70, 131])},
    "packed_empty": {"cu_seqlens": torch.tensor([0, 0, 1, 1, 131, 131], dtype=torch.int32)},
    "packed_mask": {"cu_seqlens": torch.tensor([0, 90, 131]), "key_mask": random_mask(1, 131)},
    "scale": {"scale": -0.7},
}


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def band(tokens: int, window: int, causal: bool) -> Tensor:
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (distance.abs() < window) & ((distance >= 0) | (not causal))


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


def solve(
    attention: Attention, inputs: tuple[Tensor, ...], dy: Tensor, **options: object
) -> list[Tensor]:
    """y and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = attention(*leaves, **options)
    if not y.numel():
        return [y, *(torch.zeros_like(x) for x in inputs)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, materialize_grads=True)]


def check(attention: Attention, *inputs: Tensor, **options: object) -> None:
    """The compiled operator against the reference on the same numbers in float64."""
    v = inputs[-1]
    heads = inputs[0].shape[1]
    dy = normal(v.shape[0], heads, *v.shape[2:], dtype=v.dtype)
    got = solve(attention, inputs, dy, **options)
    doubles = tuple(x.double() for x in inputs)
    want = solve(attention, doubles, dy.double(), backend="reference", **options)
    tolerance = TOLERANCES[compute_dtype(v.dtype)]
    assert got[0].dtype == v.dtype
    # A gradient keeps the error of its terms, also where they cancel.
    scale = rms(v) * rms(dy) * math.sqrt(v.shape[-1])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i:
            assert a.dtype == inputs[i - 1].dtype
        size = max(scale if i else rms(v), float(b.abs().max()) if b.numel() else 0.0)
        bound = 2 * (tolerance.gradient if i else tolerance.value)
        # Values with fewer heads than the latents: torch adds two gradients of half precision.
        if i == 5 and v.dtype.itemsize == 2 and v.shape[1] % inputs[1].shape[1]:
            bound += torch.finfo(v.dtype).eps
        assert_close(a, b, tolerance=bound, scale=size, name=f"output {i}")
