# SPDX-License-Identifier: Apache-2.0
"""LatentState: construction, the algebra of merge, selection, copies, pytree."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import make_problem, on_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from latte_ext import LatentState, latent_attention, reference
from torch import Tensor

F64 = torch.float64
SETTINGS = settings(deadline=None, max_examples=25, derandomize=True, database=None)
FIELDS = ("max", "norm", "mean")


def make_state(
    *shape: int, dtype: torch.dtype = F64, seed: int = 0, spread: float = 1.0, holes: float = 0.0
) -> LatentState:
    """A state of tokens; a share `holes` of its latents is empty."""
    n, heads, latents, dim = shape or (3, 2, 5, 4)
    generator = torch.Generator().manual_seed(seed)
    k = spread * torch.randn(n, heads, 4, latents, generator=generator, dtype=F64, device="cpu")
    v = torch.randn(n, heads, 4, dim, generator=generator, dtype=F64, device="cpu")
    unused = torch.rand(n, heads, 1, latents, generator=generator, device="cpu") < holes
    k = k.masked_fill(unused, -torch.inf)
    return state_of(k.to(dtype), v.to(dtype)).to(torch.get_default_device())


def state_of(k: Tensor, v: Tensor) -> LatentState:
    # The latents of float64 are of the CPU only.
    backend = "reference" if on_cuda() else None
    q = torch.zeros_like(k)
    return latent_attention(q, k, v, causal=False, return_state=True, backend=backend)[1]


def assert_states_close(a: LatentState, b: LatentState, tolerance: float = 1e-13) -> None:
    assert torch.equal(a.max, b.max)
    torch.testing.assert_close(a.norm, b.norm, rtol=tolerance, atol=0)
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=tolerance)


def assert_states_equal(a: LatentState, b: LatentState) -> None:
    for name, x, y in zip(FIELDS, a, b, strict=True):
        assert torch.equal(x, y), name


# Construction and properties ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_empty(dtype: torch.dtype) -> None:
    state = LatentState.empty(3, 2, 5, 4, device="cpu", dtype=dtype)
    assert (state.max == -torch.inf).all()
    assert (state.norm == 0).all()
    assert (state.mean == 0).all()
    assert (state.lse == -torch.inf).all()
    assert state.dtype == dtype
    assert (state.batch, state.heads, state.latents, state.dim) == (3, 2, 5, 4)
    assert state.device == torch.device("cpu")
    assert state.nbytes == (2 + 4) * 3 * 2 * 5 * dtype.itemsize


def test_empty_defaults() -> None:
    state = LatentState.empty(1, 1, 1, 1)
    assert state.dtype == torch.float32
    assert state.device == torch.get_default_device()
    assert LatentState.empty(0, 2, 5, 4).nbytes == 0


def test_empty_on_meta() -> None:
    state = LatentState.empty(1, 2, 5, 4, device="meta")
    assert state.device.type == "meta"
    assert state.nbytes == 6 * 10 * 4


def test_constructor_shares_memory() -> None:
    parts = make_state().tensors()
    state = LatentState(*parts)
    assert all(x is y for x, y in zip(state, parts, strict=True))
    assert state.tensors() == tuple(state)


def test_nbytes_counts_elements_not_storage() -> None:
    state = make_state(8, 2, 5, 4)
    part = LatentState(state.max[::2], state.norm[::2], state.mean[::2])
    assert 2 * part.nbytes == state.nbytes


def test_repr() -> None:
    text = repr(make_state(3, 2, 5, 4))
    for part in ("LatentState", "batch=3", "heads=2", "latents=5", "dim=4", "float64", "cpu"):
        assert part in text


def test_lse_is_the_log_normaliser() -> None:
    k = 5 * torch.randn(2, 3, 11, 4, dtype=F64)
    v = torch.randn(2, 3, 11, 6, dtype=F64)
    torch.testing.assert_close(state_of(k, v).lse, k.logsumexp(2))


def test_lse_gradient_is_a_softmax() -> None:
    k = torch.randn(2, 3, 11, 4, dtype=F64, requires_grad=True)
    v = torch.randn(2, 3, 11, 6, dtype=F64)
    (gradient,) = torch.autograd.grad(state_of(k, v).lse.sum(), k)
    torch.testing.assert_close(gradient, k.detach().softmax(2))


def test_lse_of_empty_latents_has_no_gradient() -> None:
    state = make_state(holes=0.5)
    norm = state.norm.clone().requires_grad_()
    lse = LatentState(state.max, norm, state.mean).lse
    used = norm > 0
    assert not used.all()
    (gradient,) = torch.autograd.grad(lse[used].sum() + lse.exp().sum(), norm)
    assert not gradient.isnan().any()
    assert (gradient[~used] == 0).all()


def test_from_lse_round_trip() -> None:
    state = make_state(holes=0.3)
    again = LatentState.from_lse(state.lse, state.mean)
    torch.testing.assert_close(again.lse, state.lse, rtol=0, atol=0)
    assert torch.equal(again.mean, state.mean)
    assert set(again.norm.unique().tolist()) <= {0.0, 1.0}


def test_from_lse_is_one_token_with_a_value_per_latent() -> None:
    state = make_state(2, 2, 5, 4)
    problem = make_problem(5, 4, 9, dtype=F64)
    y, final = latent_attention(problem.q, problem.k, problem.v, state=state, return_state=True)
    y2, final2 = latent_attention(
        problem.q,
        problem.k,
        problem.v,
        state=LatentState.from_lse(state.lse, state.mean),
        return_state=True,
    )
    torch.testing.assert_close(y, y2)
    torch.testing.assert_close(final.lse, final2.lse)


def test_from_lse_gradients() -> None:
    """lse and mean as learned initial state, against finite differences."""
    problem = make_problem(3, 2, 4, dtype=F64, batch=1, heads=1)
    lse = torch.randn(1, 1, 3, dtype=F64, requires_grad=True)
    mean = torch.randn(1, 1, 3, 2, dtype=F64, requires_grad=True)

    def function(lse: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, final = latent_attention(
            problem.q,
            problem.k,
            problem.v,
            state=LatentState.from_lse(lse, mean),
            return_state=True,
        )
        return y, final.lse, final.mean

    assert torch.autograd.gradcheck(function, (lse, mean))


# Merge -------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)
SPREADS = st.sampled_from([0.1, 1.0, 30.0, 1e4])
HOLES = st.sampled_from([0.0, 0.3, 1.0])


@pytest.mark.devices
@SETTINGS
@given(seeds=st.tuples(SEEDS, SEEDS, SEEDS), spread=SPREADS, holes=HOLES)
def test_merge_is_associative(seeds: tuple[int, int, int], spread: float, holes: float) -> None:
    a, b, c = (make_state(2, 1, 4, 3, seed=seed, spread=spread, holes=holes) for seed in seeds)
    assert_states_close(a.merge(b).merge(c), a.merge(b.merge(c)), 1e-12)


@pytest.mark.devices
@SETTINGS
@given(seeds=st.tuples(SEEDS, SEEDS), spread=SPREADS, holes=HOLES)
def test_merge_is_commutative(seeds: tuple[int, int], spread: float, holes: float) -> None:
    a, b = (make_state(2, 1, 4, 3, seed=seed, spread=spread, holes=holes) for seed in seeds)
    assert_states_close(a.merge(b), b.merge(a))


@pytest.mark.devices
@SETTINGS
@given(seed=SEEDS, spread=SPREADS, holes=HOLES)
def test_empty_is_the_identity(seed: int, spread: float, holes: float) -> None:
    """Exactly, from either side, the empty state with itself included."""
    state = make_state(2, 1, 4, 3, seed=seed, spread=spread, holes=holes)
    empty = LatentState.empty(2, 1, 4, 3, dtype=F64)
    assert_states_equal(empty.merge(state), state)
    assert_states_equal(state.merge(empty), state)
    assert_states_equal(empty.merge(empty), empty)


@pytest.mark.devices
@SETTINGS
@given(cut=st.integers(0, 12), seed=SEEDS, spread=SPREADS)
def test_merge_is_the_state_of_both(cut: int, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = spread * torch.randn(1, 2, 12, 3, generator=generator, dtype=F64, device="cpu")
    v = torch.randn(1, 2, 12, 5, generator=generator, dtype=F64, device="cpu")
    k, v = (x.to(torch.get_default_device()) for x in (k, v))
    merged = state_of(k[:, :, :cut], v[:, :, :cut]).merge(state_of(k[:, :, cut:], v[:, :, cut:]))
    assert_states_close(merged, state_of(k, v))


@pytest.mark.devices
def test_merge_leaves_its_arguments() -> None:
    a, b = make_state(seed=1), make_state(seed=2)
    copies = a.clone(), b.clone()
    merged = a.merge(b)
    for x in merged:
        x.zero_()
    assert_states_equal(a, copies[0])
    assert_states_equal(b, copies[1])


@pytest.mark.devices
def test_merge_gradients_avoid_empty_latents() -> None:
    a, b = make_state(seed=1, holes=0.5), make_state(seed=2, holes=0.5)
    leaves = [x.clone().requires_grad_() for s in (a, b) for x in (s.norm, s.mean)]
    merged = LatentState(a.max, *leaves[:2]).merge(LatentState(b.max, *leaves[2:]))
    gradients = torch.autograd.grad(merged.norm.sum() + merged.mean.sin().sum(), leaves)
    assert not any(g.isnan().any() for g in gradients)
    assert (gradients[1][a.norm == 0] == 0).all()
    assert (gradients[3][b.norm == 0] == 0).all()


@pytest.mark.devices
@pytest.mark.parametrize("holes", [0.0, 0.5])
def test_merge_operator(holes: float) -> None:
    """What LatentState.merge calls on a device: values and gradients of the reference."""
    states = [make_state(seed=seed, spread=3.0, holes=holes) for seed in (1, 2)]
    cotangents = [torch.randn_like(x) for x in states[0].tensors()[1:]]

    def solve(merge: Callable[..., Sequence[Tensor]]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for state in states for x in (state.norm, state.mean)]
        _, *carried = merge(states[0].max, *leaves[:2], states[1].max, *leaves[2:])
        return [*carried, *torch.autograd.grad(carried, leaves, cotangents)]

    got = solve(torch.ops.latte_ext.state_merge)
    want = solve(lambda *x: reference.merge(x[:3], x[3:]))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)
    arguments = [
        x.clone().requires_grad_(i % 3 > 0) for i, x in enumerate((*states[0], *states[1]))
    ]
    torch.library.opcheck(torch.ops.latte_ext.state_merge.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [*x[:5], x[5][0]], "b.mean has shape"),
        (lambda x: [x[0].float(), *x[1:]], "a.max has dtype float32"),
        (lambda x: [*x[:3], x[3][:, :1], *x[4:]], "b.max has shape"),
    ],
)
def test_bad_merge_operator(change: Callable[[list[Tensor]], list[Tensor]], message: str) -> None:
    arguments = change([*make_state(seed=1), *make_state(seed=2)])
    with pytest.raises((ValueError, TypeError), match=rf"^\[state_merge\] {message}.*expected"):
        torch.ops.latte_ext.state_merge(*arguments)


# Select, copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        [2, 0, 0],
        [-1],
        (1, 2),
        [],
        [True, False, True],
        torch.tensor([2, 1]),
        torch.tensor([2, 1], dtype=torch.int32),
        torch.tensor([False, False, True]),
        torch.tensor([], dtype=torch.long),
        range(2),
    ],
    ids=str,
)
def test_select(index: list[int] | Tensor) -> None:
    state = make_state(3, 2, 5, 4)
    chosen = state.select(index)
    if isinstance(index, Tensor):
        expected = torch.arange(3)[index.bool() if index.dtype == torch.bool else index.long()]
    elif len(index) and isinstance(index[0], bool):
        expected = torch.arange(3)[torch.tensor(index)]
    else:
        expected = torch.arange(3)[list(index)] if len(index) else torch.arange(0)
    for got, x in zip(chosen, state, strict=True):
        assert torch.equal(got, x[expected])
    for x in chosen:
        x.fill_(7)
    assert not any((x == 7).any() for x in state)


def test_select_gradients_accumulate() -> None:
    state = make_state(3, 2, 5, 4)
    norm, mean = (x.clone().requires_grad_() for x in (state.norm, state.mean))
    chosen = LatentState(state.max, norm, mean).select([1, 1])
    gradients = torch.autograd.grad(chosen.norm.sum() + chosen.mean.sum(), (norm, mean))
    for gradient in gradients:
        assert (gradient[1] == 2).all()
        assert (gradient[[0, 2]] == 0).all()


def test_clone_and_detach() -> None:
    state = make_state()
    norm, mean = (x.clone().requires_grad_() for x in (state.norm, state.mean))
    tracked = LatentState(state.max, norm, mean)
    clone = tracked.clone()
    assert clone.norm.requires_grad
    assert clone.mean.requires_grad
    assert_states_equal(clone, tracked)
    assert all(x.data_ptr() != y.data_ptr() for x, y in zip(clone, tracked, strict=True))
    cut = tracked.detach()
    assert not any(x.requires_grad for x in cut)
    assert all(x.data_ptr() == y.data_ptr() for x, y in zip(cut, tracked, strict=True))


def test_to() -> None:
    state = make_state()
    assert all(x is y for x, y in zip(state.to("cpu"), state, strict=True))
    moved = state.to(torch.device("meta"))
    assert moved.device.type == "meta"
    assert moved.mean.shape == state.mean.shape


def test_unpacks() -> None:
    state = make_state()
    maximum, norm, mean = state
    assert maximum is state.max
    assert norm is state.norm
    assert mean is state.mean


def test_copies_and_serialisation() -> None:
    state = make_state(holes=0.3)
    assert_states_equal(copy.deepcopy(state), state)
    assert_states_equal(pickle.loads(pickle.dumps(state)), state)
    buffer = io.BytesIO()
    torch.save(state.tensors(), buffer)
    buffer.seek(0)
    assert_states_equal(LatentState(*torch.load(buffer)), state)


# Errors ------------------------------------------------------------------------------------------

MAX, NORM, MEAN = (3, 2, 5), (3, 2, 5), (3, 2, 5, 4)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((MAX, NORM, (3, 2, 5)), r"mean has shape \(3, 2, 5\), expected \(N, Hk, L, D\)"),
        (((3, 2, 4), NORM, MEAN), r"max has shape \(3, 2, 4\), expected \(3, 2, 5\)"),
        ((MAX, (3, 5, 2), MEAN), r"norm has shape \(3, 5, 2\), expected \(3, 2, 5\)"),
        ((MAX, (1, 2, 5), MEAN), r"norm has shape \(1, 2, 5\), expected \(3, 2, 5\)"),
        (((3, 0, 5), (3, 0, 5), (3, 0, 5, 4)), r"mean has shape \(3, 0, 5, 4\), expected .*>= 1"),
        ((MAX, NORM, (3, 2, 5, 0)), r"mean has shape \(3, 2, 5, 0\), expected .*>= 1"),
    ],
)
def test_bad_shapes(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ValueError, match=r"^\[LatentState\] " + message):
        LatentState(*map(torch.zeros, shapes))


def test_bad_types() -> None:
    good = make_state(3, 2, 5, 4, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"^\[LatentState\] norm is a list, expected a Tensor"):
        LatentState(good.max, [0.0], good.mean)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"\[LatentState\] mean has dtype torch.int64, expected float32"
    ):
        LatentState(good.max.long(), good.norm.long(), good.mean.long())
    with pytest.raises(TypeError, match=r"\[LatentState\] mean has dtype torch.bfloat16, expected"):
        LatentState(*(x.bfloat16() for x in good))
    with pytest.raises(TypeError, match=r"max has dtype torch.float64, expected torch.float32"):
        LatentState(good.max.double(), good.norm, good.mean)
    with pytest.raises(RuntimeError, match=r"\[LatentState\] norm is on meta, expected cpu"):
        LatentState(good.max, good.norm.to("meta"), good.mean)


def test_bad_empty() -> None:
    with pytest.raises(ValueError, match=r"\[LatentState.*expected"):
        LatentState.empty(1, 1, 0, 1)
    with pytest.raises(TypeError, match=r"\[LatentState.*float16, expected"):
        LatentState.empty(1, 1, 1, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"\[LatentState.*-1.*expected"):
        LatentState.empty(-1, 1, 1, 1)


def test_bad_from_lse() -> None:
    with pytest.raises(
        TypeError, match=r"\[LatentState.from_lse\] lse is a float, expected a Tensor"
    ):
        LatentState.from_lse(math.pi, torch.zeros(1, 1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"\[LatentState.from_lse\] lse has shape \(1, 2\), expected"
    ):
        LatentState.from_lse(torch.zeros(1, 2), torch.zeros(1, 1, 2, 3))
    with pytest.raises(TypeError, match=r"\[LatentState.from_lse\] lse has dtype torch.float64, "):
        LatentState.from_lse(torch.zeros(1, 1, 2, dtype=F64), torch.zeros(1, 1, 2, 3))


def test_bad_merge() -> None:
    state = make_state(3, 2, 5, 4)
    with pytest.raises(
        TypeError, match=r"\[LatentState.merge\] other is a Tensor, expected a Latent"
    ):
        state.merge(state.mean)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"merge\] other.mean has shape \(1, 2, 5, 4\), expected \(3,"
    ):
        state.merge(make_state(1, 2, 5, 4))
    with pytest.raises(
        TypeError, match=r"merge\] other has dtype torch.float32, expected torch.fl"
    ):
        state.merge(make_state(3, 2, 5, 4, dtype=torch.float32))
    with pytest.raises(RuntimeError, match=r"merge\] other is on meta, expected cpu"):
        state.merge(state.to("meta"))


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([3], ValueError, r"index does not fit: expected positions in \[-3, 3\)"),
        ([-4], ValueError, r"index does not fit: expected positions in \[-3, 3\)"),
        ([True, False], ValueError, r"index does not fit: expected .* a mask of length 3"),
        ([[0]], ValueError, r"index has shape \(1, 1\), expected one dimension"),
        (1, ValueError, r"index has shape \(\), expected one dimension"),
        ([0.5], TypeError, r"index has dtype torch.float32, expected signed integers or bool"),
        (torch.tensor([0], dtype=torch.uint8), TypeError, r"index has dtype torch.uint8, expected"),
        ("ab", TypeError, r"index .*str"),
    ],
    ids=str,
)
def test_bad_select(index: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^\[LatentState.select\] " + message):
        make_state(3, 2, 5, 4).select(index)  # type: ignore[arg-type]
