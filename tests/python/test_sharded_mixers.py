# SPDX-License-Identifier: Apache-2.0
"""Recurrences and convolutions of a sequence over ranks are those of one process."""

from typing import Any

import pytest
import torch
from helpers import random_mask
from sharded_helpers import LENGTHS, PACKED, Call, Pool, assert_sharded_is_whole, normal, packed

CHANNELS = 6


def make_call(op: str, batch: int = 2, **options: Any) -> Call:
    rows = [normal(batch, 70, CHANNELS, seed=seed) for seed in range(3)]
    per_channel = normal(CHANNELS, seed=3)
    tensors = {
        "linear_recurrence": {"a": torch.sigmoid(rows[0] + 2), "b": rows[1]},
        "rg_lru": {
            "x": rows[0], "gate_a": rows[1] - 2, "gate_x": rows[2], "log_lambda": per_channel - 4
        },
        "short_conv": {"x": rows[0], "weight": normal(CHANNELS, 4), "bias": per_channel},
    }[op]  # fmt: skip
    return Call(op, tensors, options)


DIRECTIONS = [
    ("linear_recurrence", {}),
    ("linear_recurrence", {"reverse": True}),
    ("rg_lru", {}),
    ("rg_lru", {"reverse": True}),
    ("short_conv", {}),
    ("short_conv", {"causal": False}),
]


@pytest.mark.parametrize(("op", "options"), DIRECTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shards(
    pool: Pool, op: str, options: dict[str, Any], lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert_sharded_is_whole(pool, make_call(op, **options).to(dtype), lengths)


@pytest.mark.parametrize(("op", "options"), DIRECTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sequences", PACKED)
def test_packed(
    pool: Pool,
    op: str,
    options: dict[str, Any],
    lengths: tuple[int, ...],
    sequences: list[int],
) -> None:
    call = make_call(op, 1, cu_seqlens=packed(sequences), **options)
    assert_sharded_is_whole(pool, call, lengths)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("keep", [0.6, 0.03])
def test_masks(pool: Pool, reverse: bool, lengths: tuple[int, ...], keep: float) -> None:
    """A sequence starts at its first real token, whichever rank has it."""
    call = make_call("rg_lru", reverse=reverse)
    call.tensors["key_mask"] = random_mask(2, 70, keep=keep)
    assert_sharded_is_whole(pool, call, lengths)
    call = make_call("rg_lru", 1, reverse=reverse, cu_seqlens=packed([20, 0, 25, 25]))
    call.tensors["key_mask"] = random_mask(1, 70, keep=keep)
    assert_sharded_is_whole(pool, call, lengths)


def test_a_forgotten_past(pool: Pool) -> None:
    """Factors of exactly zero, and ones that grow: no division by what was multiplied."""
    call = make_call("linear_recurrence")
    call.tensors["a"][:, ::9] = 0
    call.tensors["a"][:, 1::9] = -2
    assert_sharded_is_whole(pool, call, (20, 7, 33, 10))


@pytest.mark.parametrize("width", [1, 2, 5, 8])
@pytest.mark.parametrize("causal", [True, False])
def test_kernels_wider_than_shards(pool: Pool, width: int, causal: bool) -> None:
    call = make_call("short_conv", causal=causal)
    call.tensors["weight"] = normal(CHANNELS, width)
    assert_sharded_is_whole(pool, call, (2, 1, 3, 64))
    del call.tensors["bias"]
    assert_sharded_is_whole(pool, call, (64, 1, 3, 2))


@pytest.mark.parametrize(("op", "options"), DIRECTIONS)
def test_half_precision(pool: Pool, op: str, options: dict[str, Any]) -> None:
    call = make_call(op, **options).to(torch.bfloat16)
    # What a halo's and a weight's gradients are sums of is rounded, to 2^-9, on every rank.
    factor = 1.0 if op == "linear_recurrence" else 3000.0
    assert_sharded_is_whole(pool, call, (20, 7, 43), factor=factor)


@pytest.mark.parametrize("op", ["linear_recurrence", "rg_lru", "short_conv"])
def test_the_reference_over_ranks(pool: Pool, op: str) -> None:
    assert_sharded_is_whole(pool, make_call(op, backend="reference"), (20, 7, 43))
