# SPDX-License-Identifier: Apache-2.0
"""reference.py against its own O(T^2) oracle, finite differences and the cases known by hand."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers import (
    DTYPES,
    Problem,
    assert_same_solution,
    compute_dtype,
    make_problem,
    quadratic_attention,
    random_mask,
    reference_attention,
    solve,
)
from latte_ext import LatentState, reference
from torch import Tensor

F64 = torch.float64
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def check_against_quadratic(problem: Problem) -> None:
    assert_same_solution(
        solve(problem, reference_attention), solve(problem, quadratic_attention), problem
    )


FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "scale": {"scale": 0.37},
    "scale_negative": {"scale": -2.0},
    "mask": {"key_mask": random_mask(2, 17)},
    "mask_left": {"key_mask": torch.arange(17) >= torch.tensor([[9], [1]])},
    "mask_right": {"key_mask": torch.arange(17) < torch.tensor([[9], [16]])},
    "mask_nothing_left": {"key_mask": torch.zeros(2, 17, dtype=torch.bool)},
    "packed": {"lengths": (5, 1, 11)},
    "packed_empties": {"lengths": (0, 5, 0, 0, 12, 0)},
    "packed_none": {"lengths": ()},
    "packed_mask": {"lengths": (3, 0, 14), "key_mask": random_mask(1, 17)},
    "grouped": {"heads": 6, "kv_heads": 2},
    "grouped_one": {"heads": 5, "kv_heads": 1},
    "grouped_packed_mask": {
        "heads": 4,
        "kv_heads": 2,
        "lengths": (9, 8),
        "key_mask": random_mask(1, 17),
    },
    "batch_0": {"batch": 0},
    "tokens_0": {"tokens": 0},
    "tokens_1": {"tokens": 1},
    "one_latent": {"latents": 1},
    "spread": {"spread": 100.0},
}


@pytest.mark.parametrize("mode", ["causal", "causal_from_state", "bidirectional"])
@pytest.mark.parametrize("feature", FEATURES)
def test_against_quadratic(feature: str, mode: str) -> None:
    """Outputs, final state and every gradient."""
    options = {"latents": 5, "dim": 3, "tokens": 17} | FEATURES[feature]
    initial = mode == "causal_from_state"
    check_against_quadratic(
        make_problem(dtype=F64, causal=mode != "bidirectional", initial_state=initial, **options)
    )


@CAUSAL
def test_infinite_keys_against_quadratic(causal: bool) -> None:
    """Tokens, latents and single logits at -inf, with and without others to average."""
    problem = make_problem(4, 3, 12, dtype=F64, causal=causal, initial_state=causal)
    problem.k[:, :, :3] = -torch.inf
    problem.k[0, :, :, 1] = -torch.inf
    problem.k[1, 0, 7, 2] = -torch.inf
    problem.q[0, 1, 5] = -torch.inf
    problem.q[1, 0, 6, 0] = -torch.inf
    if problem.state is not None:
        problem.state[0][0, :, :2] = -torch.inf
        problem.state[1][0, :, :2] = 0
        problem.state[2][0, :, :2] = 0
    solution = solve(problem, reference_attention)
    for name, value in solution.named():
        assert not value.isnan().any(), name
    assert (solution.y[0, 1, 5] == 0).all()
    assert_same_solution(solution, solve(problem, quadratic_attention), problem)


@CAUSAL
def test_no_usable_key_gives_zero(causal: bool) -> None:
    problem = make_problem(4, 3, 6, dtype=F64, causal=causal)
    problem.k.fill_(-torch.inf)
    for attention in (reference_attention, quadratic_attention):
        solution = solve(problem, attention)
        for name, value in solution.named():
            expected = -torch.inf if name == "max" else 0
            assert (value == expected).all(), name


def test_unseen_latents_are_not_renormalised() -> None:
    """p(l|t) keeps its mass on a latent that no token has used."""
    q = torch.zeros(1, 1, 1, 4, dtype=F64)
    k = torch.tensor([0.0, -torch.inf, 2.0, -torch.inf], dtype=F64).view(1, 1, 1, 4)
    v = torch.full((1, 1, 1, 1), 8.0, dtype=F64)
    y, _ = reference.latent_attention(q, k, v)
    assert y.item() == pytest.approx(4.0, abs=1e-15)


def test_known_values() -> None:
    """One latent: y is the softmax-weighted running mean; ones average to one."""
    k = torch.log(torch.tensor([1.0, 3.0, 4.0], dtype=F64)).view(1, 1, 3, 1)
    v = torch.tensor([2.0, 6.0, 1.0], dtype=F64).view(1, 1, 3, 1)
    y, (max_, norm, mean) = reference.latent_attention(torch.zeros_like(k), k, v)
    torch.testing.assert_close(y.flatten(), torch.tensor([2.0, 5.0, 3.0], dtype=F64))
    assert max_.item() == k.max().item()
    assert norm.item() == pytest.approx(2.0)
    assert mean.item() == pytest.approx(3.0)


@CAUSAL
def test_constant_values_are_returned(causal: bool) -> None:
    problem = make_problem(7, 3, 20, dtype=F64, causal=causal, spread=5.0)
    y, _ = reference.latent_attention(
        problem.q, problem.k, torch.ones_like(problem.v), causal=causal
    )
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-14)


def test_step_by_step() -> None:
    problem = make_problem(5, 3, 9, dtype=F64, heads=4, kv_heads=2, initial_state=True, scale=0.7)
    y, final = reference.latent_attention(
        problem.q, problem.k, problem.v, scale=0.7, state=problem.state
    )
    state = problem.state
    assert state is not None
    before = [x.clone() for x in state]
    for t in range(9):
        row, state = reference.latent_attention_step(
            problem.q[:, :, t], problem.k[:, :, t], problem.v[:, :, t], state, scale=0.7
        )
        torch.testing.assert_close(row, y[:, :, t])
    for got, want in zip(state, final, strict=True):
        torch.testing.assert_close(got, want)
    assert problem.state is not None
    assert all(map(torch.equal, before, problem.state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CAUSAL
def test_dtypes(causal: bool, dtype: torch.dtype) -> None:
    """Computed in float32 (float64 for float64), also under autocast, rounded once at the end."""
    problem = make_problem(5, 3, 9, dtype=dtype, causal=causal)

    def under_autocast(*args: Tensor, **options: object) -> tuple[Tensor, LatentState]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return reference_attention(*args, **options)  # type: ignore[arg-type]

    solution = solve(problem, under_autocast)
    assert_same_solution(solution, solve(problem.map(Tensor.double), reference_attention), problem)
    assert solution.y.dtype == dtype
    assert solution.mean.dtype == compute_dtype(dtype)


@CAUSAL
def test_masked_nan_does_not_spread(causal: bool) -> None:
    problem = make_problem(5, 3, 17, dtype=F64, causal=causal, key_mask=random_mask(2, 17))
    assert problem.key_mask is not None
    hidden = ~problem.key_mask[:, None, :, None]
    dirty = dataclasses.replace(
        problem,
        k=problem.k.masked_fill(hidden, torch.nan),
        v=problem.v.masked_fill(hidden, torch.nan),
    )
    clean = solve(problem, reference_attention)
    solution = solve(dirty, reference_attention)
    for (name, got), (_, want) in zip(solution.named(), clean.named(), strict=True):
        assert torch.equal(got, want), name


@CAUSAL
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30, 3e38])
def test_extreme_logits(causal: bool, size: float) -> None:
    """float32 neither overflows nor loses accuracy at any finite logits."""
    problem = make_problem(5, 3, 9, causal=causal)
    problem.q.tanh_().mul_(size)
    problem.k.tanh_().mul_(size)
    solution = solve(problem, reference_attention)
    for name, value in solution.named():
        assert value.isfinite().all(), name
    expected = solve(problem.map(Tensor.double), quadratic_attention)
    assert_same_solution(solution, expected, problem)


@CAUSAL
@pytest.mark.parametrize("key", [torch.nan, torch.inf])
@pytest.mark.parametrize("attention", [reference_attention, quadratic_attention])
def test_nan_and_infinite_keys_are_seen(
    attention: Callable[..., tuple[Tensor, LatentState]], key: float, causal: bool
) -> None:
    """From the token on, in its head; the state keeps the other latents."""
    problem = make_problem(4, 3, 9, dtype=F64, causal=causal)
    problem.k[0, 1, 5, 2] = key
    solution = solve(problem, attention)
    expected = torch.zeros(2, 2, 9, dtype=torch.bool)
    expected[0, 1, 5 if causal else 0 :] = True
    assert torch.equal(solution.y.isnan(), expected[..., None].expand_as(solution.y))
    latent = torch.zeros(2, 2, 4, dtype=torch.bool)
    latent[0, 1, 2] = True
    assert torch.equal(solution.norm.isnan(), latent)
    assert torch.equal(solution.mean.isnan(), latent[..., None].expand_as(solution.mean))


def test_state_without_causality() -> None:
    problem = make_problem(4, 3, 5, dtype=F64, initial_state=True)
    with pytest.raises(ValueError, match=r"\[latent_attention\] got state .* expected causal=True"):
        reference.latent_attention(
            problem.q, problem.k, problem.v, causal=False, state=problem.state
        )


GRADCHECK: dict[str, dict[str, object]] = {
    "plain": {},
    "scale": {"scale": 0.6},
    "mask": {"key_mask": torch.tensor([[True, False, True], [False, False, True]])},
    "packed": {"lengths": (2, 0, 1)},
    "grouped": {"heads": 2, "kv_heads": 1},
    "infinite_keys": {},
}


@pytest.mark.parametrize("mode", ["causal", "causal_from_state", "bidirectional"])
@pytest.mark.parametrize("feature", GRADCHECK)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_finite_differences(check: Callable[..., bool], feature: str, mode: str) -> None:
    """First and second derivatives, the second along one random direction; the state through lse.

    The returned max is a constant for autograd but moves under a finite difference.
    """
    options = {"latents": 2, "dim": 2, "tokens": 3, "heads": 1} | GRADCHECK[feature]
    if feature == "packed" and mode != "causal_from_state":
        options["lengths"] = (2, 1)  # the lse of an empty sequence is -inf
    initial = mode == "causal_from_state"
    problem = make_problem(
        dtype=F64, causal=mode != "bidirectional", initial_state=initial, **options
    )
    if feature == "infinite_keys":  # one latent is empty, at the first token too
        problem.k[0, 0, 0, 0] = -torch.inf
        for part, value in zip(problem.state or (), (-torch.inf, 0, 0), strict=False):
            part[0, 0, 0] = value
    maximum, *carried = problem.state or (None,)

    def function(q: Tensor, k: Tensor, v: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        state = (maximum, *carried) if carried else None
        y, (max_, norm, mean) = reference.latent_attention(
            q,
            k,
            v,
            causal=problem.causal,
            scale=problem.scale,
            key_mask=problem.key_mask,
            cu_seqlens=problem.cu_seqlens,
            state=state,
        )
        return y, max_ + norm.log(), mean

    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v, *carried)]
    fast = check is torch.autograd.gradgradcheck
    assert check(function, leaves, atol=1e-6, rtol=1e-5, fast_mode=fast)


def test_forward_mode() -> None:
    """The directional derivative of forward mode is that of reverse mode."""
    problem = make_problem(4, 3, 6, dtype=F64, batch=1)
    inputs = (problem.q, problem.k, problem.v)
    tangents = tuple(torch.randn_like(x) for x in inputs)

    def function(*args: Tensor) -> Tensor:
        return reference.latent_attention(*args)[0]

    _, tangent = torch.func.jvp(function, inputs, tangents)
    _, pullback = torch.func.vjp(function, *inputs)
    gradients = pullback(problem.dy)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    torch.testing.assert_close((problem.dy * tangent).sum(), expected)


def test_merge_gradients() -> None:
    a = make_problem(3, 2, 1, dtype=F64, batch=1, heads=1, initial_state=True, seed=1).state
    b = make_problem(3, 2, 1, dtype=F64, batch=1, heads=1, initial_state=True, seed=2).state
    assert a is not None
    assert b is not None

    def function(*parts: Tensor) -> tuple[Tensor, ...]:
        _, norm, mean = reference.merge((a[0], *parts[:2]), (b[0], *parts[2:]))
        return norm, mean

    leaves = [x.requires_grad_() for x in (*a[1:], *b[1:])]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
