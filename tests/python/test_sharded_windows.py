# SPDX-License-Identifier: Apache-2.0
"""Windows and Macchiato over ranks are those of one process, whatever the window reaches across."""

from typing import Any

import pytest
import torch
from helpers import random_mask
from sharded_helpers import LENGTHS, PACKED, Call, Pool, assert_sharded_is_whole, normal, packed

OPS = ["sliding_window_attention", "macchiato_attention"]


def make_call(op: str, batch: int = 2, *, latents: int = 5, **options: Any) -> Call:
    tensors = {
        "q": normal(batch, 4, 70, 8),
        "k": normal(batch, 2, 70, 8, seed=1),
        "v": normal(batch, 2, 70, 6, seed=2),
    }
    if op == "macchiato_attention":
        tensors |= {
            "q_latent": normal(batch, 4, 70, 1 + latents, seed=3),
            "k_latent": normal(batch, 1, 70, latents, seed=4),
        }
    return Call(op, tensors, {"window": 9, **options})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("window", [1, 9, 50, 200])
def test_shards(pool: Pool, op: str, causal: bool, lengths: tuple[int, ...], window: int) -> None:
    call = make_call(op, causal=causal, window=window)
    assert_sharded_is_whole(pool, call, lengths)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sequences", PACKED)
def test_packed(
    pool: Pool, op: str, causal: bool, lengths: tuple[int, ...], sequences: list[int]
) -> None:
    call = make_call(op, 1, causal=causal, cu_seqlens=packed(sequences))
    call.tensors["key_mask"] = random_mask(1, 70)
    assert_sharded_is_whole(pool, call, lengths)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_masks_and_options(pool: Pool, op: str, causal: bool, lengths: tuple[int, ...]) -> None:
    call = make_call(op, causal=causal, scale=0.9, softcap=2.0)
    call.tensors["key_mask"] = random_mask(2, 70)
    call.tensors["key_mask"][1, 20:] = False
    if op == "macchiato_attention":
        call.options["latent_scale"] = 0.6
        call.tensors["v_latent"] = normal(2, 2, 70, 6, seed=5)
    assert_sharded_is_whole(pool, call, lengths)


@pytest.mark.parametrize(("window", "latents"), [(0, 5), (9, 0), (9, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_one_branch_alone(pool: Pool, window: int, latents: int, causal: bool) -> None:
    call = make_call("macchiato_attention", window=window, latents=latents, causal=causal)
    assert_sharded_is_whole(pool, call, (20, 7, 33, 10))


def test_certain_choices(pool: Pool) -> None:
    """Logits of -inf: the window alone, the latents alone, nothing at all."""
    call = make_call("macchiato_attention")
    logits = call.tensors["q_latent"]
    logits[:, :, ::3, 1:] = -torch.inf
    logits[:, :, 1::3, 0] = -torch.inf
    logits[:, 0, 2::3] = -torch.inf
    assert_sharded_is_whole(pool, call, (20, 7, 33, 10))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(pool: Pool, op: str, dtype: torch.dtype) -> None:
    # A key's gradient is rounded on every rank that sees it, to 2^-9 of it in bfloat16.
    factor = 1.0 if dtype == torch.float32 else 3000.0
    assert_sharded_is_whole(pool, make_call(op).to(dtype), (20, 7, 33, 10), factor=factor)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_over_ranks(pool: Pool, op: str) -> None:
    assert_sharded_is_whole(pool, make_call(op, backend="reference"), (20, 7, 43))
