# SPDX-License-Identifier: Apache-2.0
"""latent_attention_step against the float64 reference, and what it may change."""

import dataclasses

import pytest
import torch
from helpers import (
    DTYPES,
    assert_close,
    assert_same_solution,
    compute_dtype,
    make_problem,
    solve_reference,
    threads,
    time_major,
)
from latte_ext import LatentState, latent_attention, latent_attention_step


@pytest.mark.devices
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_state_argument_is_not_changed(tokens: int) -> None:
    """Neither by the call nor through the returned state."""
    problem = make_problem(10, 7, tokens, initial_state=True)
    assert problem.state is not None
    before = [x.clone() for x in problem.state]
    _, final = latent_attention(
        problem.q, problem.k, problem.v, state=LatentState(*problem.state), return_state=True
    )
    latent_attention_step(torch.zeros(2, 2, 10), torch.zeros(2, 2, 10), torch.ones(2, 2, 7), final)
    assert all(map(torch.equal, before, problem.state))


STEP_CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "from_state": {"initial_state": True},
    "grouped": {"heads": 6, "kv_heads": 2},
    "grouped_one": {"heads": 5, "kv_heads": 1},
    "scale": {"scale": 0.37},
    "one_sequence": {"batch": 1, "heads": 1},
    "batch_0": {"batch": 0},
    "spread": {"spread": 50.0},
}


@pytest.mark.devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("latents", "dim"), [(1, 1), (7, 17), (16, 64), (43, 43), (65, 33)])
@pytest.mark.parametrize("case", STEP_CASES)
def test_steps_equal_forward(case: str, latents: int, dim: int, dtype: torch.dtype) -> None:
    """Token by token with latent_attention_step, the state updated in place."""
    problem = make_problem(latents, dim, 9, dtype=dtype, **STEP_CASES[case])  # type: ignore[arg-type]
    problem.k[..., 3, :] = -torch.inf  # a token without weight
    problem.q[..., 5, 0] = -torch.inf
    if problem.state is None:
        batch, kv_heads = problem.v.shape[:2]
        state = LatentState.empty(
            batch, kv_heads, latents, dim, device=problem.v.device, dtype=compute_dtype(dtype)
        )
    else:
        state = LatentState(*(x.clone() for x in problem.state))
    parts = state.tensors()
    outputs = [
        latent_attention_step(
            problem.q[:, :, t], problem.k[:, :, t], problem.v[:, :, t], state, scale=problem.scale
        )
        for t in range(9)
    ]
    assert all(now is before for now, before in zip(state.tensors(), parts, strict=True))
    assert all(y.dtype == dtype for y in outputs)
    expected = solve_reference(problem)
    actual = dataclasses.replace(
        expected, y=torch.stack(outputs, 2), max=parts[0], norm=parts[1], mean=parts[2]
    )
    assert_same_solution(actual, expected, problem)


@pytest.mark.devices
def test_step_in_a_strided_state() -> None:
    """A slice of a larger state is updated where it lies and nothing else is touched."""
    problem = make_problem(10, 16, 4, heads=4, kv_heads=2, seed=3)
    large = make_problem(20, 32, 1, batch=6, heads=4, initial_state=True).state
    assert large is not None
    before = [x.clone() for x in large]
    maximum, norm, mean = large
    state = LatentState(maximum[::3, 1:3, ::2], norm[::3, 1:3, ::2], mean[::3, 1:3, ::2, ::2])
    problem = dataclasses.replace(problem, state=tuple(x.clone() for x in state.tensors()))
    outputs = [
        latent_attention_step(
            *(time_major(x)[:, :, t] for x in (problem.q, problem.k, problem.v)), state
        )
        for t in range(4)
    ]
    expected = solve_reference(problem)
    actual = dataclasses.replace(
        expected,
        y=torch.stack(outputs, 2),
        max=state.max,
        norm=state.norm,
        mean=state.mean,
    )
    assert_same_solution(actual, expected, problem)
    for new, old, view in zip(large, before, state.tensors(), strict=True):
        untouched = torch.ones_like(new, dtype=torch.bool)
        untouched.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        assert torch.equal(new[untouched], old[untouched])
        assert not torch.equal(new, old)


@pytest.mark.devices
@pytest.mark.parametrize("thread_count", [1, 2])
def test_step_threads(thread_count: int) -> None:
    problem = make_problem(64, 64, 3, batch=16, heads=8, initial_state=True)
    assert problem.state is not None
    state = LatentState(*(x.clone() for x in problem.state))
    with threads(thread_count):
        y = [
            latent_attention_step(problem.q[:, :, t], problem.k[:, :, t], problem.v[:, :, t], state)
            for t in range(3)
        ]
    expected = solve_reference(problem)
    assert_close(torch.stack(y, 2), expected.y, tolerance=2e-6, scale=1.0, name="y")
    assert_close(state.mean, expected.mean, tolerance=2e-6, scale=1.0, name="mean")
