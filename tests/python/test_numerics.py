# SPDX-License-Identifier: Apache-2.0
"""Large, jumping, drifting and infinite logits: float32 against float64 on the natural scale.

A gradient of zero is computed as a difference of inner products of v and dy, so that what is left
of it is compared with the size of those products (`assert_same_solution`), not with zero.
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from helpers import (
    Problem,
    assert_same_solution,
    check,
    make_problem,
    random_mask,
    rms,
    solve,
    solve_reference,
)
from latte_ext import latent_attention
from torch import Tensor

TOKENS = 700
LATENTS = DIM = 64


def random_problem(seed: int = 0, **options: object) -> Problem:
    return make_problem(LATENTS, DIM, TOKENS, batch=1, heads=1, seed=seed, **options)


def scaled(factor: float) -> Problem:
    return random_problem(spread=factor)


def with_keys(change: Callable[[Tensor], Tensor]) -> Problem:
    problem = random_problem()
    return dataclasses.replace(problem, k=change(problem.k))


def drift(slope: float) -> Problem:
    return with_keys(lambda k: k + slope * torch.arange(TOKENS)[:, None])


def jumps(*steps: tuple[int, float]) -> Problem:
    def change(k: Tensor) -> Tensor:
        k = k.clone()
        for start, height in steps:
            k[:, :, start:] += height
        return k

    return with_keys(change)


def jumps_per_latent() -> Problem:
    """Each latent jumps at a token of its own, by 10 to 5000."""
    start = torch.randint(0, TOKENS, (LATENTS,))
    height = torch.logspace(1, 3.7, LATENTS)
    return with_keys(lambda k: k + height * (torch.arange(TOKENS)[:, None] >= start))


def climbs_per_latent() -> Problem:
    """Each latent climbs by up to 90 at some tokens: runs of any length (prepare.h)."""
    steps = 90 * torch.rand(TOKENS, LATENTS) * (torch.rand(TOKENS, LATENTS) < 0.003)
    return with_keys(lambda k: k + steps.cumsum(0))


def hidden(keep: Tensor) -> Problem:
    return with_keys(lambda k: k.masked_fill(~keep[..., None], -torch.inf))


def huge() -> Problem:
    """Keys up to 3e38, whose differences are not finite in float32."""
    return with_keys(lambda k: k.clamp(-3, 3) * 1e38)


def far_below() -> Problem:
    """Logits from -1e3 to -3e38 among others, where an exponential without bounds is not 0."""
    levels = -(10.0 ** torch.tensor([3.0, 20, 24, 25.5, 26, 26.3, 26.6, 27, 30, 38.4]))

    def change(x: Tensor) -> Tensor:
        lowered = levels.to(x)[torch.randint(len(levels), x.shape)]
        return torch.where(torch.rand(x.shape) < 0.2, lowered, x)

    problem = random_problem()
    return dataclasses.replace(problem, q=change(problem.q), k=change(problem.k))


def offset_values() -> Problem:
    # Half the tokens: the error of a mean is a random walk, and reached 4e-6 at 2,000.
    problem = make_problem(LATENTS, DIM, TOKENS // 2, batch=1, heads=1)
    return dataclasses.replace(problem, v=problem.v + 100)


def offset_queries() -> Problem:
    problem = random_problem()
    return dataclasses.replace(problem, q=problem.q + 1e4)


def ties() -> Problem:
    return with_keys(torch.zeros_like)


def alternating() -> Problem:
    """The largest key is never in the chunk's first rows, and far above the others."""
    return with_keys(lambda k: k + 3e3 * (torch.arange(TOKENS)[:, None] % 37 == 36))


TABLE: dict[str, Callable[[], Problem]] = {
    "random": lambda: scaled(1),
    "x100": lambda: scaled(100),
    "x1e4": lambda: scaled(1e4),
    "x1e-4": lambda: scaled(1e-4),
    "jump_up": lambda: jumps((300, 1e4)),
    "jump_up_twice": lambda: jumps((300, 1e4), (550, 3e4)),
    "jump_down": lambda: jumps((300, -1e4)),
    "jump_at_every_chunk": lambda: jumps(*((t, 200.0) for t in range(64, TOKENS, 64))),
    "raised_in_every_chunk": lambda: jumps(*((t, 30.0) for t in range(40, TOKENS, 64))),
    "raised_as_far_as_it_goes": lambda: jumps(*((t, 57.0) for t in range(63, TOKENS, 64))),
    "raised_a_little_further": lambda: jumps(*((t, 63.0) for t in range(63, TOKENS, 64))),
    "jumps_per_latent": jumps_per_latent,
    "left_padding": lambda: hidden(torch.arange(TOKENS) >= 200),
    "right_padding": lambda: hidden(torch.arange(TOKENS) < 500),
    "random_mask": lambda: hidden(random_mask(1, TOKENS, keep=0.5)[0]),
    "one_token_left": lambda: hidden(torch.arange(TOKENS) == 431),
    "rising_1": lambda: drift(1),
    "rising_20": lambda: drift(20),
    "rising_50": lambda: drift(50),
    "rising_1000": lambda: drift(1000),
    "climbs_per_latent": climbs_per_latent,
    "falling_1": lambda: drift(-1),
    "falling_50": lambda: drift(-50),
    "ramp": lambda: drift(0.05),
    "keys_3e38": huge,
    "far_below": far_below,
    "values_around_100": offset_values,
    "queries_around_1e4": offset_queries,
    "ties": ties,
    "alternating": alternating,
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", TABLE)
def test_table(case: str, causal: bool) -> None:
    problem = dataclasses.replace(TABLE[case](), causal=causal)
    solution = check(problem)
    for name, value in solution.named():
        assert not value.isnan().any(), name


@pytest.mark.parametrize("first", [0, 40, 63])
def test_raised_above_an_initial_state(first: int) -> None:
    problem = make_problem(16, 8, 150, batch=1, heads=2, initial_state=True)
    problem.k[:, :, first:] += 30
    check(problem)


@pytest.mark.parametrize("spread", [1.0, 100.0])
@pytest.mark.parametrize("initial", [-1e4, 0.0, 1e4])
def test_initial_state_far_from_the_keys(initial: float, spread: float) -> None:
    problem = make_problem(16, 8, 150, batch=1, heads=1, initial_state=True, spread=spread)
    assert problem.state is not None
    maximum, norm, mean = problem.state
    check(dataclasses.replace(problem, state=(maximum + initial, norm, mean)))


def test_queries_and_keys_of_minus_infinity() -> None:
    """All -inf gives exact zeros, in values and gradients."""
    problem = make_problem(9, 7, 150, batch=1)
    problem.q[:, :, 70] = -torch.inf
    solution = check(problem)
    assert (solution.y[:, :, 70] == 0).all()
    assert (solution.dq[:, :, 70] == 0).all()
    problem.k.fill_(-torch.inf)
    for causal in (True, False):
        solution = solve(dataclasses.replace(problem, causal=causal))
        for name, value in solution.named():
            assert (value == (-torch.inf if name == "max" else 0)).all(), name


def test_constant_values_stay_constant() -> None:
    """A mean of equal values is that value: rounding adds up like a random walk, no faster."""
    q, k = torch.randn(2, 1, 1, 20_000, 8).unbind()
    y = latent_attention(q, 3 * k, torch.full((1, 1, 20_000, 3), 100.0))
    assert (y - 100).abs().max() < 100 * math.sqrt(20_000) * torch.finfo(y.dtype).eps


def test_equal_keys_average() -> None:
    """With equal keys the state is the running mean, with norm the number of tokens."""
    v = torch.randn(1, 1, 20_000, 3)
    zero = torch.zeros(1, 1, 20_000, 4)
    y, state = latent_attention(zero, zero, v, return_state=True)
    expected = v.double().cumsum(2) / torch.arange(1, 20_001)[:, None]
    assert (y - expected).abs().max() < 2e-6
    assert (state.norm == 20_000).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("period", [1, 5, 8])
def test_tied_keys_do_not_drift(causal: bool, period: int) -> None:
    """Equal additions round the same way: carried from token to token, these drift by 4e-4."""
    tokens = 65_536
    q = torch.randn(1, 1, tokens, 4)
    k = torch.tensor([0.1, 0.7, 0.3, 1.1, 0.2, 0.9, 0.15, 0.35]).log()[:period]
    k = k.repeat(tokens // period + 1)[:tokens, None] * torch.arange(1, 5)
    k[0] = 0
    v, dy = torch.randn(2, 1, 1, tokens, 5).unbind()
    v += 1
    got = [x.clone().requires_grad_() for x in (q, k[None, None], v)]
    want = [x.detach().double().requires_grad_() for x in got]
    y, y64 = (latent_attention(*x, causal=causal) for x in (got, want))
    assert (y - y64).abs().max() < 3e-5
    assert (y - y64)[:, :, -1].abs().max() < 1e-5
    y.backward(dy)
    y64.backward(dy.double())
    # dq is a difference of nearly equal means here: its natural scale is that of dy . v.
    scales = (dy.norm(), want[1].grad.norm(), want[2].grad.norm())
    for x, x64, natural in zip(got, want, scales, strict=True):
        assert (x.grad - x64.grad).norm() < 5e-5 * natural


def test_no_growth_of_error_with_length() -> None:
    """y shrinks as 1 / sqrt(t) here, yet stays close to float64 for every token."""
    q, k = torch.randn(2, 1, 1, 30_000, 4).unbind()
    v = torch.randn(1, 1, 30_000, 8)
    y = latent_attention(q, k, v)
    expected = latent_attention(q.double(), k.double(), v.double())
    error = (y - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 1e-4
    assert error.median() < 5e-6


def test_overflowing_weights_are_not_formed() -> None:
    """Half precision at the edge of its range."""
    for dtype in (torch.float16, torch.bfloat16):
        problem = make_problem(8, 8, 100, dtype=dtype, spread=60.0)
        largest = torch.finfo(dtype).max
        problem.k[:, :, 50] = largest
        problem.v.mul_(100)
        solution = solve(problem)
        assert_same_solution(solution, solve_reference(problem), problem)
        assert rms(solution.y) > 1


@pytest.mark.parametrize("latents", [8, 43])
def test_rows_before_a_nan_key_are_right(latents: int) -> None:
    """A NaN late in a chunk must not hide that an earlier key raised the reference."""
    tokens, poisoned = 140, 63
    t, latent = torch.arange(tokens)[:, None], torch.arange(latents)
    k = torch.randn(1, 1, tokens, latents) + 1e4 * ((t + 3 * latent) // 37)
    q, v = torch.randn(1, 1, tokens, latents), torch.randn(1, 1, tokens, 16)
    whole = latent_attention(q, k, v)
    for x in (q, k, v):
        x[:, :, poisoned:] = torch.nan
    y = latent_attention(q, k, v)
    torch.testing.assert_close(y[:, :, :poisoned], whole[:, :, :poisoned], rtol=0, atol=2e-6)
    assert y[:, :, poisoned:].isnan().all()


def test_rows_of_a_chunk_far_apart() -> None:
    """Rows share a maximum in softmax; one far above or below the first needs its own."""
    v = torch.randn(1, 1, 200, 5)
    k = torch.randn(1, 1, 200, 6)
    q = torch.randn(1, 1, 200, 6)
    for row, shift in ((1, 80.0), (2, 200.0), (3, 300.0), (5, -90.0), (66, 1e4), (67, -1e4)):
        q[:, :, row] += shift
        q[:, :, row + 70, 2] += shift
    q[:, :, 128] += 3e38
    y = latent_attention(q, k, v)
    want = latent_attention(q.double(), k.double(), v.double())
    assert (y - want).abs().max() < 2e-6
