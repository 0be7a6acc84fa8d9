# SPDX-License-Identifier: Apache-2.0
"""Windows and Macchiato over ranks are those of one process, whatever the window reaches across."""

from typing import Any

import latte_ext
import pytest
import torch
import torch.distributed as dist
from helpers import random_mask
from latte_ext.distributed import context_parallel
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


REFUSED = [
    ("sliding_window_attention", {"return_cache": True}),
    ("sliding_window_attention", {"sinks": 1}),
    ("macchiato_attention", {"return_state": True}),
    ("macchiato_attention", {"state": 1}),
    ("short_conv", {"return_state": True}),
    ("linear_recurrence", {"h0": torch.zeros(2, 4)}),
    ("rg_lru", {"return_state": True}),
]


def _refusals(group: dist.ProcessGroup, rank: int) -> list[str]:
    heads, rows = torch.zeros(2, 2, 5, 4), torch.zeros(2, 5, 4)
    arguments = {
        "sliding_window_attention": (heads, heads, heads),
        "macchiato_attention": (heads, heads[..., 1:], heads, heads, heads),
        "short_conv": (rows, torch.zeros(4, 3)),
        "linear_recurrence": (rows, rows),
        "rg_lru": (rows, rows, rows, torch.zeros(4)),
    }
    messages = []
    for op, options in REFUSED:
        window = {"window": 3} if "attention" in op else {}
        try:
            context_parallel(getattr(latte_ext, op), group)(*arguments[op], **window, **options)
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_states_are_refused_by_name(pool: Pool) -> None:
    for messages in pool.run(2, _refusals):
        for message, (op, options) in zip(messages, REFUSED, strict=True):
            assert message.startswith(f"[{op}] got {next(iter(options))} on sharded sequences")
