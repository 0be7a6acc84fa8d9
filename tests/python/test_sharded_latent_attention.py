# SPDX-License-Identifier: Apache-2.0
"""T5: latent attention of a sequence over ranks is that of one process, gradients included."""

import math
import re
from typing import Any

import latte_ext
import pytest
import torch
import torch.distributed as dist
from helpers import make_problem, random_mask, solve
from latte_ext import LatentState, reference
from latte_ext.distributed import context_parallel
from latte_ext.distributed._summary import summarise
from sharded_helpers import LENGTHS, PACKED, Call, Pool, assert_sharded_is_whole, cuts, normal
from torch import Tensor


def make_call(causal: bool = True, **options: Any) -> Call:
    problem = make_problem(heads=4, kv_heads=2, causal=causal, **options)
    tensors = {"q": problem.q, "k": problem.k, "v": problem.v}
    if problem.key_mask is not None:
        tensors["key_mask"] = problem.key_mask
    fixed: dict[str, Any] = {"causal": causal, "scale": problem.scale}
    if problem.cu_seqlens is not None:
        fixed["cu_seqlens"] = problem.cu_seqlens
    return Call("latent_attention", tensors, fixed)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shards(pool: Pool, causal: bool, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_sharded_is_whole(pool, make_call(causal, dtype=dtype, scale=0.7), lengths)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_masks(pool: Pool, causal: bool, lengths: tuple[int, ...]) -> None:
    mask = random_mask(2, 70)
    mask[1, 20:] = False  # all of it on some ranks
    assert_sharded_is_whole(pool, make_call(causal, key_mask=mask), lengths)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sequences", PACKED)
def test_packed(pool: Pool, causal: bool, lengths: tuple[int, ...], sequences: list[int]) -> None:
    mask = random_mask(1, 70, keep=0.8)
    call = make_call(causal, lengths=sequences, key_mask=mask, seed=len(sequences))
    assert_sharded_is_whole(pool, call, lengths)


@pytest.mark.parametrize("kind", ["rising", "falling", "unused", "huge"])
@pytest.mark.parametrize("causal", [True, False])
def test_keys_far_apart(pool: Pool, kind: str, causal: bool) -> None:
    call = make_call(causal, dtype=torch.float64)
    k = call.tensors["k"]
    time = torch.arange(70.0, dtype=torch.float64)[:, None]
    if kind == "unused":
        k[:, :, :40, ::2] = -math.inf
    else:
        k += {"rising": 3 * time, "falling": -3 * time, "huge": 1e4 * torch.sin(time)}[kind]
    assert_sharded_is_whole(pool, call, (20, 7, 33, 10))


def test_the_reference_over_ranks(pool: Pool) -> None:
    call = make_call(tokens=30, dtype=torch.float64)
    call.options["backend"] = "reference"
    assert_sharded_is_whole(pool, call, (12, 5, 13))


def _continue(
    group: dist.ProcessGroup, rank: int, parts: list[tuple[Tensor, ...]], state: LatentState
) -> tuple[Tensor, ...]:
    """Outputs and gradients where rank 1 alone has a loss on the final state."""
    q, k, v, dy, d_norm, d_mean = parts[rank]
    inputs = [x.requires_grad_() for x in (q, k, v, state.norm, state.mean)]
    op = context_parallel(latte_ext.latent_attention, group)
    y, final = op(q, k, v, state=LatentState(state.max, *inputs[3:]), return_state=True)
    loss = (y * dy).sum() + (rank == 1) * (final.norm * d_norm).sum()
    loss = loss + (rank == 1) * (final.mean * d_mean).sum()
    return (y.detach(), *(x.detach() for x in final), *torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_states(pool: Pool, lengths: tuple[int, ...]) -> None:
    problem = make_problem(heads=4, kv_heads=2, dtype=torch.float64, initial_state=True)
    assert problem.state is not None
    cotangents = problem.d_norm, problem.d_mean
    parts = [
        tuple(x[:, :, piece].clone() for x in (problem.q, problem.k, problem.v, problem.dy))
        + cotangents
        for piece in cuts(lengths)
    ]
    results = pool.run(len(lengths), _continue, parts, LatentState(*problem.state))
    expected = solve(problem)
    for field, *values in zip(("y", "max", "norm", "mean"), *results, strict=False):
        want = getattr(expected, field)
        got = [torch.cat(values, 2)] if field == "y" else values  # every rank has the final state
        for each in got:
            torch.testing.assert_close(each, want, rtol=1e-12, atol=1e-13)
    gradients = [torch.cat(xs, 2) for xs in zip(*(r[4:7] for r in results), strict=True)]
    gradients += [torch.stack(xs).sum(0) for xs in zip(*(r[7:] for r in results), strict=True)]
    wanted = (expected.dq, expected.dk, expected.dv, expected.d_norm0, expected.d_mean0)
    for got, want in zip(gradients, wanted, strict=True):
        assert want is not None
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": "1"}, r"\[latent_attention\] scale is a str"),
        ({"k": torch.zeros(2, 2, 3, 4)}, r"\[latent_attention\] k has shape"),
        ({"lengths": (1, 2, 3)}, r"\[latent_attention\] lengths are \(1, 2, 3\)"),
        ({"lengths": (3, 3)}, r"\[latent_attention\] lengths are \(3, 3\) with 5 tokens"),
        ({"cu_seqlens": torch.tensor([0, 7])}, r"\[latent_attention\] cu_seqlens is \(0, 7\)"),
        ({"cu_seqlens": torch.zeros(2)}, r"\[latent_attention\] cu_seqlens has .* torch.float32"),
        ({"cu_seqlens": torch.zeros(2, 2).int()}, r"\[latent_attention\] cu_seqlens has shape"),
        ({"cu_seqlens": [0, 10]}, r"\[latent_attention\] cu_seqlens is a list"),
        (
            {"batch": 2, "cu_seqlens": torch.tensor([0, 10])},
            r"\[latent_attention\] got cu_seqlens with a batch of 2",
        ),
        ({"state": 3}, r"\[latent_attention\] state is a int"),
        (
            {"state": LatentState.empty(2, 2, 4, 3), "causal": False},
            r"\[latent_attention\] got state with causal=False",
        ),
        (
            {"state": LatentState.empty(1, 2, 4, 3)},
            r"\[latent_attention\] state.mean has shape \(1, 2, 4, 3\)",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 10]), "return_state": True},
            r"\[latent_attention\] got return_state with cu_seqlens",
        ),
        ({"batches": (1, 2)}, r"\[latent_attention\] ranks have batches of \[1, 2\]"),
        ({"op": len}, r"\[context_parallel\] target is <built-in function len>, expected a module"),
        ({"group": 3}, r"\[context_parallel\] group is a int, expected a ProcessGroup"),
    ],
)
def test_bad_input(pool: Pool, change: dict[str, Any], message: str) -> None:
    for text in pool.run(2, _error_of, change):
        assert re.match(message, text), text


def _error_of(group: dist.ProcessGroup, rank: int, change: dict[str, Any]) -> str:
    change = dict(change)
    batch = change.pop("batch", 2 if "cu_seqlens" not in change else 1)
    if "batches" in change:
        batch = change.pop("batches")[rank]
        change["cu_seqlens"] = torch.tensor([0, 10])
    shapes = {"q": (batch, 2, 5, 4), "k": (batch, 2, 5, 4), "v": (batch, 2, 5, 3)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    try:
        op = change.pop("op", latte_ext.latent_attention)
        context_parallel(op, change.pop("group", group))(**{**tensors, **change})
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return "no error"


def test_without_torch_distributed_it_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"\[context_parallel\] torch.distributed is not init"):
        context_parallel(latte_ext.latent_attention)


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("masked", [False, True])
def test_what_a_rank_tells_of_its_tokens(tokens: int, scale: float, masked: bool) -> None:
    """The state is that of the reference, with its gradients."""
    k, v = normal(2, 3, tokens, 4), normal(2, 3, tokens, 5, seed=1)
    k[:, :, :, 0] = -math.inf
    mask = random_mask(2, tokens) if masked else None
    if masked:
        v = torch.where(random_mask(2, tokens)[:, None, :, None], v, math.nan)
    d_norm, d_mean = normal(2, 3, 4, seed=2), normal(2, 3, 4, 5, seed=3)
    found = []
    for function in (summarise, reference.summary):
        inputs = k.clone().requires_grad_(), v.clone().requires_grad_()
        state = function(*inputs, scale=scale, key_mask=mask)
        loss = (state[1] * d_norm).sum() + (state[2] * d_mean).sum()
        found.append((*(x.detach() for x in state), *torch.autograd.grad(loss, inputs)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
