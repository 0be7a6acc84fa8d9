# SPDX-License-Identifier: Apache-2.0
"""The algebra of the state as properties of outputs, states and gradients.

T1  a whole sequence = the sequence split anywhere = token by token
T2  packed sequences = each sequence alone, bitwise on one thread
T3  a masked token = an absent token
T7  the same result in every run, at every batch size and, with a head for each thread, for every
    number of threads: bitwise

Each theorem is a second way to compute the same function, given to `solve` in place of
`latent_attention`, so that one comparison covers y, the final state and all gradients.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
from helpers import (
    Attention,
    Problem,
    assert_identical,
    assert_same_solution,
    library_attention,
    make_problem,
    on_cuda,
    random_mask,
    solve,
    threads,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from latte_ext import LatentState, latent_attention_step
from torch import Tensor

SETTINGS = settings(deadline=None, max_examples=15, derandomize=True, database=None)
DTYPES = st.sampled_from([torch.float32, torch.float64])
SEEDS = st.integers(0, 2**20)


@st.composite
def problems(
    draw: st.DrawFn, *, max_tokens: int = 150, lengths: bool = False, causal: bool | None = None
) -> Problem:
    if causal is None:
        causal = draw(st.booleans())
    kv_heads = draw(st.integers(1, 3))
    options: dict[str, object] = {}
    if lengths:
        options["lengths"] = draw(st.lists(st.integers(0, 70), max_size=5))
    return make_problem(
        draw(st.integers(1, 20)),
        draw(st.integers(1, 20)),
        draw(st.integers(0, max_tokens)),
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        dtype=torch.float32 if on_cuda() else draw(DTYPES),
        causal=causal,
        initial_state=causal and draw(st.booleans()),
        spread=draw(st.sampled_from([0.1, 1.0, 20.0])),
        scale=draw(st.sampled_from([1.0, 0.5])),
        seed=draw(SEEDS),
        **options,
    )


def cat_states(states: Sequence[LatentState]) -> LatentState:
    return LatentState(*map(torch.cat, zip(*states, strict=True)))


# T1 ----------------------------------------------------------------------------------------------


def split_at(cuts: Sequence[int]) -> Attention:
    """Piece by piece, each from the state that the one before it left."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, state: LatentState | None, **options: object
    ) -> tuple[Tensor, LatentState]:
        rows = []
        mask = options.pop("key_mask")
        for start, stop in itertools.pairwise([0, *cuts, q.shape[2]]):
            y, state = library_attention(
                *(x[:, :, start:stop] for x in (q, k, v)),
                state=state,
                key_mask=None if mask is None else mask[:, start:stop],  # type: ignore[index]
                **options,
            )
            rows.append(y)
        assert state is not None
        return torch.cat(rows, 2), state

    return attention


def merged_at(cut: int) -> Attention:
    """Both parts from nothing, their states merged."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, state: LatentState | None, **options: object
    ) -> tuple[Tensor, LatentState]:
        y, _ = library_attention(q, k, v, state=state, **options)
        parts = [(x[:, :, :cut], x[:, :, cut:]) for x in (q, k, v)]
        _, first = library_attention(*(x[0] for x in parts), state=state, **options)
        _, second = library_attention(*(x[1] for x in parts), state=None, **options)
        return y, first.merge(second)

    return attention


@pytest.mark.devices
@SETTINGS
@given(problem=problems(causal=True), data=st.data())
def test_t1_split_anywhere(problem: Problem, data: st.DataObject) -> None:
    tokens = problem.q.shape[2]
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), min_size=1, max_size=4)))
    problem = dataclasses.replace(
        problem, key_mask=random_mask(problem.q.shape[0], tokens) if tokens % 2 else None
    )
    assert_same_solution(solve(problem, split_at(cuts)), solve(problem), problem)


@pytest.mark.devices
@SETTINGS
@given(problem=problems(causal=True), data=st.data())
def test_t1_merge(problem: Problem, data: st.DataObject) -> None:
    """In the final state: y of a second part needs the first."""
    cut = data.draw(st.integers(0, problem.q.shape[2]))
    assert_same_solution(solve(problem, merged_at(cut)), solve(problem), problem)


@pytest.mark.devices
@SETTINGS
@given(problem=problems(causal=True, max_tokens=20))
def test_t1_token_by_token(problem: Problem) -> None:
    """As calls of one token, with gradients, and by steps in place."""
    tokens = problem.q.shape[2]
    whole = solve(problem)
    assert_same_solution(solve(problem, split_at(range(1, tokens))), whole, problem)

    batch, kv_heads, _, dim = problem.v.shape
    latents = problem.k.shape[3]
    state = LatentState.empty(batch, kv_heads, latents, dim, dtype=problem.v.dtype)
    if problem.state is not None:
        state = LatentState(*problem.state).clone()
    rows = [
        latent_attention_step(
            problem.q[:, :, t], problem.k[:, :, t], problem.v[:, :, t], state, scale=problem.scale
        )
        for t in range(tokens)
    ]
    y = torch.stack(rows, 2) if rows else whole.y
    stepped = dataclasses.replace(whole, y=y, max=state.max, norm=state.norm, mean=state.mean)
    assert_same_solution(stepped, whole, problem)


# T2 ----------------------------------------------------------------------------------------------


def each_sequence_alone(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    state: LatentState | None,
    key_mask: Tensor | None,
    **options: object,
) -> tuple[Tensor, LatentState]:
    assert cu_seqlens is not None
    latents, dim = k.shape[3], v.shape[3]
    rows = [v.new_empty(1, q.shape[1], 0, dim)]
    states = [LatentState.empty(0, k.shape[1], latents, dim, dtype=v.dtype)]
    for n, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        y, final = library_attention(
            *(x[:, :, start:stop] for x in (q, k, v)),
            key_mask=None if key_mask is None else key_mask[:, start:stop],
            state=None if state is None else LatentState(*(x[n : n + 1] for x in state)),
            **options,
        )
        rows.append(y)
        states.append(final)
    return torch.cat(rows, 2), cat_states(states)


@SETTINGS
@given(problem=problems(lengths=True), masked=st.booleans())
def test_t2_packed(problem: Problem, masked: bool) -> None:
    if masked:
        problem = dataclasses.replace(problem, key_mask=random_mask(1, problem.q.shape[2]))
    with threads(1):
        packed = solve(problem)
        alone = solve(problem, each_sequence_alone)
    assert_identical(packed, alone)
    with threads(2):
        assert_same_solution(solve(problem), alone, problem)


# T3 ----------------------------------------------------------------------------------------------


def absent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor,
    state: LatentState | None,
    **options: object,
) -> tuple[Tensor, LatentState]:
    """Row by row without the masked tokens; zeros stand for their outputs."""
    rows, states = [], []
    for b, keep in enumerate(key_mask):
        index = keep.nonzero().squeeze(1)
        y, final = library_attention(
            *(x[b : b + 1].index_select(2, index) for x in (q, k, v)),
            state=None if state is None else LatentState(*(x[b : b + 1] for x in state)),
            **options,
        )
        rows.append(y.new_zeros(1, *q.shape[1:3], v.shape[3]).index_copy(2, index, y))
        states.append(final)
    return torch.cat(rows), cat_states(states)


def masked(
    q: Tensor, k: Tensor, v: Tensor, *, key_mask: Tensor, **options: object
) -> tuple[Tensor, LatentState]:
    y, final = library_attention(q, k, v, key_mask=key_mask, **options)
    return torch.where(key_mask[:, None, :, None], y, 0), final


@pytest.mark.devices
@SETTINGS
@given(problem=problems(), side=st.sampled_from(["left", "right", "scattered", "all"]), seed=SEEDS)
def test_t3_masked_is_absent(problem: Problem, side: str, seed: int) -> None:
    batch, _, tokens, _ = problem.q.shape
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, tokens + 1, (batch, 1), generator=generator, device="cpu")
    lengths = lengths.to(torch.get_default_device())
    positions = torch.arange(tokens)
    key_mask = {
        "left": positions >= tokens - lengths,
        "right": positions < lengths,
        "scattered": random_mask(batch, tokens, seed=seed),
        "all": torch.zeros(batch, tokens, dtype=torch.bool),
    }[side]
    problem = dataclasses.replace(problem, key_mask=key_mask)
    assert_same_solution(solve(problem, masked), solve(problem, absent), problem)


# T7 ----------------------------------------------------------------------------------------------


def each_row_alone(
    q: Tensor, k: Tensor, v: Tensor, *, state: LatentState | None, **options: object
) -> tuple[Tensor, LatentState]:
    rows, states = [], []
    for b in range(q.shape[0]):
        y, final = library_attention(
            *(x[b : b + 1] for x in (q, k, v)),
            state=None if state is None else LatentState(*(x[b : b + 1] for x in state)),
            **options,
        )
        rows.append(y)
        states.append(final)
    return torch.cat(rows), cat_states(states)


@SETTINGS
@given(problem=problems())
@example(problem=make_problem(64, 64, 300, batch=3, heads=4, kv_heads=2, initial_state=True))
def test_t7_any_run_any_batch_any_threads(problem: Problem) -> None:
    """With a key/value head for each thread, alone or in a batch."""
    if problem.k.shape[1] == 1:
        with threads(1):
            first = solve(problem)
            assert_identical(solve(problem), first)
            assert_identical(solve(problem, each_row_alone), first)
    else:
        first = solve(problem)
        for count in (1, 2):
            with threads(count):
                assert_identical(solve(problem), first)
                assert_identical(solve(problem, each_row_alone), first)


def test_t7_repeated_with_fewer_heads_than_threads() -> None:
    """A sequence may be divided among threads, always in the same way."""
    problem = make_problem(33, 40, 1000, batch=1, heads=1)
    first = solve(problem)
    for _ in range(5):
        assert_identical(solve(problem), first)


def test_t7_memory_layout_of_the_batch() -> None:
    """A row does not depend on what lies beside it."""
    problem = make_problem(17, 19, 90, batch=2)
    first = solve(problem)
    other = dataclasses.replace(
        problem, k=torch.stack([problem.k[0], problem.k[1] * 1e3]), v=problem.v.clone()
    )
    changed = solve(other)
    for name, value in changed.named():
        assert torch.equal(value[0], getattr(first, name)[0]), name
