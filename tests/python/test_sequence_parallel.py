# SPDX-License-Identifier: Apache-2.0
"""A sequence cut among threads is the sequence whole, in values, states and gradients."""

import dataclasses

import pytest
import torch
from helpers import (
    Problem,
    assert_identical,
    assert_same_solution,
    make_problem,
    random_mask,
    solve,
    threads,
)

TOKENS = 5000  # cut for up to four threads


def assert_cut_is_whole(problem: Problem, counts: tuple[int, ...] = (2, 5)) -> None:
    with threads(1):
        whole = solve(problem.map(torch.Tensor.double))
    for count in counts:
        with threads(count):
            solution = solve(problem)
        # Random walks of float32 sums over 5,000 tokens, where the table is for hundreds.
        factor = 1.0 if problem.q.dtype == torch.float64 else 4.0
        assert_same_solution(solution, whole, problem, factor=factor)


def shift_keys(problem: Problem, kind: str) -> Problem:
    slopes = {"rising": 0.7, "steep": 1.5, "falling": -0.7, "slow": 0.02}
    if kind == "normal":
        return problem
    if kind == "tied":
        return dataclasses.replace(problem, k=torch.full_like(problem.k, -2.3))
    time = torch.arange(problem.k.shape[2], dtype=torch.float64)[:, None]
    return dataclasses.replace(problem, k=problem.k + (slopes[kind] * time).to(problem.k.dtype))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["normal", "rising", "steep", "falling", "slow", "tied"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_keys(causal: bool, kind: str, dtype: torch.dtype) -> None:
    problem = make_problem(
        10, 20, TOKENS, batch=1, heads=1, causal=causal, dtype=dtype, initial_state=causal
    )
    assert_cut_is_whole(shift_keys(problem, kind))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_and_mask(causal: bool, kv_heads: int) -> None:
    problem = make_problem(
        16, 8, TOKENS, batch=1, heads=2, kv_heads=kv_heads, causal=causal, dtype=torch.float64
    )
    mask = random_mask(1, TOKENS)
    mask[:, :1500] = False  # whole segments without a key
    assert_cut_is_whole(dataclasses.replace(problem, key_mask=mask), (5, 8))


def test_initial_state_with_an_empty_latent() -> None:
    problem = make_problem(6, 8, TOKENS, batch=1, heads=1, dtype=torch.float64, initial_state=True)
    assert problem.state is not None
    maximum, norm, mean = problem.state
    maximum[..., 0], norm[..., 0], mean[..., 0, :] = -torch.inf, 0, 0
    problem.k[..., :3000, 1] = -torch.inf
    assert_cut_is_whole(problem)


@pytest.mark.parametrize("causal", [True, False])
def test_packed(causal: bool) -> None:
    problem = make_problem(
        12, 16, heads=1, lengths=[0, 3, 4200, 1, 700], causal=causal, dtype=torch.float64
    )
    assert_cut_is_whole(problem, (2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    assert_cut_is_whole(make_problem(16, 16, TOKENS, batch=1, heads=1, dtype=dtype))


def test_same_bits_in_every_run() -> None:
    problem = make_problem(16, 16, TOKENS, batch=1, heads=1)
    with threads(4):
        first = solve(problem)
        for _ in range(3):
            assert_identical(solve(problem), first)


def test_enough_heads_are_not_cut() -> None:
    problem = make_problem(16, 16, TOKENS, batch=1, heads=2)
    with threads(1):
        whole = solve(problem)
    with threads(2):
        assert_identical(solve(problem), whole)
