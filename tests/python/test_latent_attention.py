# SPDX-License-Identifier: Apache-2.0
"""latent_attention against the float64 reference."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    DTYPES,
    Problem,
    Solution,
    assert_identical,
    assert_same_solution,
    check,
    make_problem,
    random_mask,
    solve,
    solve_reference,
    threads,
    time_major,
)
from latte_ext import LatentState, latent_attention
from torch import Tensor

# Around every vector width (2 to 16), register tile (6, 8, 12) and chunk length (64, 128), and
# the head sizes of the authors' models (43, 10).
WIDTHS = (1, 2, 3, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 43, 64, 65, 128)
LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300)
# Two passes over the widths, every width as L and as D twice, every length at least twice.
SIZES = [
    (WIDTHS[i % 17], WIDTHS[(7 * i + 3 + 5 * (i // 17)) % 17], LENGTHS[5 * i % 13])
    for i in range(34)
]
SIZES += [(43, 43, 300), (64, 64, 300), (10, 32, 257), (128, 128, 128), (1, 1, 129)]

# float64 is of the CPU only.
DEVICES = pytest.mark.devices(double=False)
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def test_memory_is_poisoned() -> None:
    like = torch.ones(3)
    fresh = (
        torch.empty(3),
        torch.empty_like(like),
        like.new_empty(3),
        torch.empty_strided([3], [2]),
    )
    assert all(x.isnan().all() for x in fresh)
    assert (torch.empty(8, dtype=torch.uint8) == 255).all()


@DEVICES
@CAUSAL
@pytest.mark.parametrize(("latents", "dim", "tokens"), SIZES)
def test_sizes(latents: int, dim: int, tokens: int, causal: bool) -> None:
    check(make_problem(latents, dim, tokens, causal=causal, initial_state=causal, seed=tokens))


@DEVICES
@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("latents", "dim", "tokens"), SIZES[::4] + SIZES[-4:-2])
def test_dtypes(latents: int, dim: int, tokens: int, dtype: torch.dtype, causal: bool) -> None:
    check(make_problem(latents, dim, tokens, causal=causal, initial_state=causal, dtype=dtype))


@DEVICES
@CAUSAL
@pytest.mark.parametrize(
    ("q_dtype", "k_dtype", "v_dtype"),
    [
        dtypes
        for dtypes in itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=3)
        if len(set(dtypes)) > 1
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_mixed_dtypes(
    q_dtype: torch.dtype, k_dtype: torch.dtype, v_dtype: torch.dtype, causal: bool
) -> None:
    """y follows v, each gradient its input, the state stays float32."""
    problem = make_problem(17, 10, 70, heads=4, kv_heads=2, causal=causal, initial_state=causal)
    check(
        dataclasses.replace(
            problem,
            q=problem.q.to(q_dtype),
            k=problem.k.to(k_dtype),
            v=problem.v.to(v_dtype),
            dy=problem.dy.to(v_dtype),
        )
    )


FEATURES: dict[str, dict[str, object]] = {
    "mask": {"key_mask": random_mask(2, 131)},
    "mask_left": {"key_mask": torch.arange(131) >= torch.tensor([[70], [3]])},
    "mask_right": {"key_mask": torch.arange(131) < torch.tensor([[70], [128]])},
    "mask_one_row_empty": {"key_mask": torch.arange(131) < torch.tensor([[0], [131]])},
    "mask_expanded": {"key_mask": random_mask(1, 131).expand(2, -1)},
    "mask_strided": {"key_mask": random_mask(131, 2).t()},
    "packed": {"lengths": (5, 64, 1, 61)},
    "packed_with_empties": {"lengths": (0, 0, 1, 0, 65, 15, 0, 50, 0)},
    "packed_one": {"lengths": (131,), "seed": 1},
    "packed_all_empty": {"lengths": (0, 0)},
    "packed_none": {"lengths": ()},
    "packed_mask": {"lengths": (0, 3, 64, 64), "key_mask": random_mask(1, 131)},
    "grouped_one": {"heads": 6, "kv_heads": 1},
    "grouped": {"heads": 6, "kv_heads": 2, "seed": 1},
    "grouped_packed_mask": {
        "heads": 6,
        "kv_heads": 3,
        "lengths": (100, 0, 31),
        "key_mask": random_mask(1, 131),
        "seed": 1,
    },
    "scale": {"scale": 0.37},
    "scale_negative": {"scale": -1.5},
    "one_head": {"batch": 1, "heads": 1},
    "batch_0": {"batch": 0},
    "batch_0_masked": {"batch": 0, "key_mask": random_mask(0, 131)},
    "tokens_0": {"tokens": 0},
    "tokens_0_masked": {"tokens": 0, "key_mask": random_mask(2, 0)},
}


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["causal", "causal_from_state", "bidirectional"])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, mode: str, dtype: torch.dtype) -> None:
    options = {"tokens": 131, "dtype": dtype, **FEATURES[feature]}
    initial = mode == "causal_from_state"
    problem = make_problem(11, 18, causal=mode != "bidirectional", initial_state=initial, **options)
    check(problem)


@pytest.mark.parametrize("thread_count", [1, 2, 5])
@CAUSAL
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1)], ids=str)
def test_thread_counts(shape: tuple[int, int], causal: bool, thread_count: int) -> None:
    """Also fewer heads than threads, where a sequence may be divided among threads."""
    batch, heads = shape
    problem = make_problem(
        12,
        20,
        700,
        batch=batch,
        heads=2 * heads,
        kv_heads=heads,
        causal=causal,
        initial_state=causal,
    )
    with threads(thread_count):
        check(problem)


@DEVICES
def test_initial_state_with_empty_latents() -> None:
    """An empty latent of the state contributes nothing and has no gradient."""
    problem = make_problem(9, 5, 20, initial_state=True)
    empty = LatentState.empty(2, 2, 9, 5, device=problem.q.device, dtype=torch.float32)
    some = torch.arange(9) % 2 == 0
    assert problem.state is not None
    state = (
        torch.where(some, empty.max, problem.state[0]),
        torch.where(some, empty.norm, problem.state[1]),
        torch.where(some[:, None], empty.mean, problem.state[2]),
    )
    # The first token leaves the even latents unseen, so that y_0 misses them.
    k = problem.k.clone()
    k[:, :, 0, ::2] = -torch.inf
    solution = check(dataclasses.replace(problem, k=k, state=state))
    assert solution.d_norm0 is not None
    assert solution.d_mean0 is not None
    assert (solution.d_norm0[..., some] == 0).all()
    assert (solution.d_mean0[..., some, :] == 0).all()
    assert (solution.dk[:, :, 0, ::2] == 0).all()

    fresh = check(dataclasses.replace(problem, state=(empty.max, empty.norm, empty.mean)))
    assert (fresh.d_norm0 == 0).all()
    assert (fresh.d_mean0 == 0).all()
    without = solve(dataclasses.replace(problem, state=None))
    assert_identical(dataclasses.replace(fresh, d_norm0=None, d_mean0=None), without)


# Strides ----------------------------------------------------------------------------------------


def channel_strided(x: Tensor) -> Tensor:
    storage = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan)
    storage[..., ::3] = x
    return storage[..., ::3]


def channel_major(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def misaligned(x: Tensor) -> Tensor:
    """Starts one element after an aligned address."""
    storage = x.new_full((x.numel() + 2,), torch.nan)
    storage[1:-1] = x.reshape(-1)
    return storage[1:-1].view(x.shape)


def padded_rows(x: Tensor) -> Tensor:
    """Part of a wider tensor: rows of odd length between values that must not be read."""
    storage = x.new_full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3), torch.nan)
    storage[..., 1:, 2:-1] = x
    return storage[..., 1:, 2:-1]


def batch_last(x: Tensor) -> Tensor:
    return x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function
    for function in (
        time_major,
        channel_strided,
        channel_major,
        misaligned,
        padded_rows,
        batch_last,
    )
} | {
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_heads": lambda x: x[:, :1].expand_as(x),
    "expanded_tokens": lambda x: x[..., :1, :].expand_as(x) if x.dim() == 4 else x,
    "expanded_channels": lambda x: x[..., :1].expand_as(x),
    "one_number": lambda x: x.reshape(-1)[0].expand_as(x),
}


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@CAUSAL
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, causal: bool, dtype: torch.dtype) -> None:
    """Inputs, cotangents and the state with any strides."""
    lay_out = LAYOUTS[layout]
    problem = make_problem(13, 18, 75, heads=4, kv_heads=2, causal=causal, dtype=dtype)
    check(problem.map(lambda x: lay_out(x) if x.dim() == 4 else x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("thread_count", [1, 2])
@pytest.mark.parametrize("feature", ["plain", "initial_state", "packed", "grouped"])
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_heads_side_by_side(
    heads: int, feature: str, thread_count: int, dtype: torch.dtype
) -> None:
    """Heads that lie side by side are walked together, to the same bits."""
    grouped = 2 if feature == "grouped" else 1
    problem = make_problem(
        16,
        32,
        200,
        heads=grouped * heads,
        kv_heads=heads,
        lengths=(70, 0, 1, 129) if feature == "packed" else None,
        initial_state=feature == "initial_state",
        dtype=dtype,
    )
    with threads(thread_count):
        together = solve(problem.map(lambda x: time_major(x) if x.dim() == 4 else x))
        assert_identical(together, solve(problem))


@DEVICES
@pytest.mark.parametrize(
    "layout", ["channel_strided", "misaligned", "expanded_batch", "one_number"]
)
def test_state_layouts(layout: str) -> None:
    problem = make_problem(13, 18, 10, initial_state=True)
    assert problem.state is not None
    maximum, norm, mean = problem.state
    lay_out = LAYOUTS[layout]
    check(
        dataclasses.replace(
            problem,
            state=(lay_out(maximum), lay_out(norm), lay_out(mean)),
            d_norm=lay_out(problem.d_norm),
            d_mean=lay_out(problem.d_mean),
        )
    )


def test_slices_of_one_projection() -> None:
    """q, k and v cut out of one tensor, as a fused projection gives them."""
    heads, latents, dim = 2, 7, 9
    joint = torch.randn(2, 66, heads * (2 * latents + dim), dtype=torch.float64)
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in joint.split([heads * latents, heads * latents, heads * dim], dim=-1)
    )
    check(dataclasses.replace(make_problem(latents, dim, 66, dtype=torch.float64), q=q, k=k, v=v))


@CAUSAL
def test_one_tensor_for_everything(causal: bool) -> None:
    x = torch.randn(2, 3, 40, 8, dtype=torch.float64)

    def gradient(attention: Callable[..., Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (result,) = torch.autograd.grad(attention(leaf, leaf, leaf).sin().sum(), leaf)
        return result

    def call(backend: str | None) -> Callable[..., Tensor]:
        return lambda q, k, v: latent_attention(q, k, v, causal=causal, backend=backend)

    torch.testing.assert_close(gradient(call(None)), gradient(call("reference")))


@pytest.mark.parametrize(
    "strides",
    [(0, 6, 2**30 + 5, 1), (0, 24, 7, 2**30 + 5), (0, 2**32 + 5, 9, 1)],
    ids=["tokens", "channels", "heads"],
)
def test_offsets_beyond_32_bits(strides: tuple[int, ...], tmp_path: Path) -> None:
    """Elements more than 2**31 apart, in a sparse file of which only few pages ever exist."""
    base = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=2**32 + 2**10, dtype=torch.bfloat16
    )
    problem = make_problem(3, 4, 5, batch=1, heads=2, dtype=torch.bfloat16)
    expected = solve_reference(problem)
    for name in ("q", "k", "v", "dy"):  # one at a time, since they share the file
        tensor = getattr(problem, name)
        far = base.as_strided(tensor.shape, strides)
        far.copy_(tensor)
        moved = dataclasses.replace(problem, **{name: far})
        assert_same_solution(solve(moved), expected, problem)


# Which gradients, from what ---------------------------------------------------------------------


@DEVICES
@pytest.mark.parametrize("inputs", [1 << i for i in range(5)] + [0b01011, 0b10110])
def test_gradients_of_some_inputs(inputs: int) -> None:
    """A gradient does not depend on which others are asked for."""
    problem = make_problem(10, 7, 30, initial_state=True)
    everything = solve(problem)
    assert problem.state is not None
    names = ("dq", "dk", "dv", "d_norm0", "d_mean0")
    leaves = [
        x.clone().requires_grad_(bool(inputs >> i & 1))
        for i, x in enumerate((problem.q, problem.k, problem.v, *problem.state[1:]))
    ]
    y, final = latent_attention(
        *leaves[:3], state=LatentState(problem.state[0], *leaves[3:]), return_state=True
    )
    assert not final.max.requires_grad
    torch.autograd.backward(
        [y, final.norm, final.mean] if inputs & 0b11110 else [y],
        [problem.dy, problem.d_norm, problem.d_mean] if inputs & 0b11110 else [problem.dy],
    )
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        if inputs >> i & 1:
            assert torch.equal(leaf.grad, getattr(everything, name)), name  # type: ignore[arg-type]
        else:
            assert leaf.grad is None


@DEVICES
@pytest.mark.parametrize("source", ["y", "norm", "mean"])
@CAUSAL
def test_gradient_from_one_output(causal: bool, source: str) -> None:
    """The cotangents that are missing count as zero."""
    problem = make_problem(10, 7, 30, causal=causal, initial_state=causal)
    for name in {"dy", "d_norm", "d_mean"} - {"dy" if source == "y" else f"d_{source}"}:
        problem = dataclasses.replace(problem, **{name: torch.zeros_like(getattr(problem, name))})
    expected = solve_reference(problem)
    leaves = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    state = None
    if problem.state is not None:
        carried = [x.clone().requires_grad_() for x in problem.state[1:]]
        state = LatentState(problem.state[0], *carried)
        leaves += carried
    y, final = latent_attention(*leaves[:3], causal=causal, state=state, return_state=True)
    outputs = {"y": (y, problem.dy), "norm": (final.norm, problem.d_norm)}
    outputs["mean"] = (final.mean, problem.d_mean)
    output, cotangent = outputs[source]
    gradients = torch.autograd.grad(
        output, leaves, cotangent, allow_unused=True, materialize_grads=True
    )
    values = (y, final.max, final.norm, final.mean)
    actual = Solution(*(value.detach() for value in values), *gradients)
    assert_same_solution(actual, expected, problem)


def test_nothing_kept_for_backward_but_inputs() -> None:
    """Besides the inputs at most a state per chunk of 64 tokens."""
    problem = make_problem(16, 32, 1024, batch=1)
    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    inputs = {x.untyped_storage().data_ptr() for x in leaves}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        latent_attention(*leaves).sum().backward()
    extra = sum(size for address, size in kept.items() if address not in inputs)
    state = 4 * 2 * (2 * 16 + 16 * 32)
    assert extra <= state * (1024 // 64)


@DEVICES
def test_changed_inputs_are_noticed() -> None:
    problem = make_problem()
    k = problem.k.clone()
    y = latent_attention(problem.q.clone().requires_grad_(), k, problem.v)
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


GRADCHECK: dict[str, dict[str, object]] = {
    "plain": {},
    "mask": {
        "key_mask": torch.tensor([[True, False, True, True, False], [False] * 2 + [True] * 3])
    },
    "packed": {"lengths": (2, 0, 3)},
    "grouped": {"heads": 2, "kv_heads": 1},
    "scale": {"scale": 0.6},
    "long": {"latents": 2, "dim": 1, "tokens": 67, "batch": 1, "heads": 1},
}


@pytest.mark.parametrize("mode", ["causal", "causal_from_state", "bidirectional"])
@pytest.mark.parametrize("feature", GRADCHECK)
def test_gradcheck(feature: str, mode: str) -> None:
    """Against finite differences in float64, through the initial and the final state.

    The returned max is a constant for autograd but moves under a finite difference, hence the
    comparison through lse = max + log(norm), which does not depend on the choice of max.
    """
    options = {"latents": 3, "dim": 2, "tokens": 5, "heads": 1} | GRADCHECK[feature]
    if feature == "packed" and mode != "causal_from_state":
        options["lengths"] = (2, 3)  # the lse of an empty sequence is -inf
    causal = mode != "bidirectional"
    problem = make_problem(
        dtype=torch.float64, causal=causal, initial_state=mode == "causal_from_state", **options
    )
    maximum, *carried = problem.state or (None,)

    def function(q: Tensor, k: Tensor, v: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
        y, final = latent_attention(
            q,
            k,
            v,
            causal=causal,
            scale=problem.scale,
            key_mask=problem.key_mask,
            cu_seqlens=problem.cu_seqlens,
            state=LatentState(maximum, *carried) if carried else None,
            return_state=True,
        )
        return y, final.max + final.norm.log(), final.mean

    leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v, *carried)]
    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-6)


# Values that must not spread --------------------------------------------------------------------


@DEVICES
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@CAUSAL
def test_masked_values_do_not_spread(causal: bool, value: float) -> None:
    problem = make_problem(10, 7, 70, causal=causal, key_mask=random_mask(2, 70))
    assert problem.key_mask is not None
    hidden = ~problem.key_mask[:, None, :, None]
    dirty = dataclasses.replace(
        problem, k=problem.k.masked_fill(hidden, value), v=problem.v.masked_fill(hidden, value)
    )
    solution = solve(dirty)
    assert_identical(solution, solve(problem))
    assert (solution.dk.masked_select(hidden) == 0).all()
    assert (solution.dv.masked_select(hidden) == 0).all()


@DEVICES
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_with_its_reader(name: str) -> None:
    """A NaN reaches the rows that read it, and only those: other heads, batch rows, the past."""
    problem = make_problem(10, 7, 150, heads=3)
    getattr(problem, name)[1, 2, 80, 4] = torch.nan
    y = latent_attention(problem.q, problem.k, problem.v)
    expected = torch.zeros_like(y, dtype=torch.bool)
    if name == "q":
        expected[1, 2, 80] = True
    elif name == "k":
        expected[1, 2, 80:] = True
    else:
        expected[1, 2, 80:, 4] = True
    assert torch.equal(y.isnan(), expected)


@DEVICES
@pytest.mark.parametrize("name", ["q", "k", "v", "dy"])
@CAUSAL
def test_nan_stays_in_its_packed_sequence(causal: bool, name: str) -> None:
    problem = make_problem(10, 7, lengths=(20, 30, 40), causal=causal)
    clean = solve(problem)
    getattr(problem, name)[:, :, 20:50] = torch.nan
    dirty = solve(problem)
    outside = torch.ones(90, dtype=torch.bool)
    outside[20:50] = False
    for field in ("y", "dq", "dk", "dv"):
        assert torch.equal(
            getattr(dirty, field)[:, :, outside], getattr(clean, field)[:, :, outside]
        ), field


# Backends ---------------------------------------------------------------------------------------


def test_backends() -> None:
    problem = make_problem(10, 7, 70, initial_state=True, heads=4, kv_heads=2)

    def solve_with(backend: str | None) -> Solution:
        return solve(
            problem,
            lambda *args, **options: latent_attention(
                *args, **options, backend=backend, return_state=True
            ),
        )

    assert_identical(solve_with("cpu"), solve_with(None))
    assert_same_solution(solve_with("reference"), solve_reference(problem), problem)
    assert not torch.equal(solve_with("reference").dk, solve_with("cpu").dk)


@DEVICES
def test_backend_reference_dtypes() -> None:
    problem = make_problem(10, 7, 12, dtype=torch.bfloat16, causal=False)
    y, state = latent_attention(
        problem.q, problem.k, problem.v, causal=False, backend="reference", return_state=True
    )
    assert y.dtype == torch.bfloat16
    assert state.mean.dtype == torch.float32


@DEVICES
def test_defaults() -> None:
    """Causal, no scaling, no state returned."""
    problem: Problem = make_problem()
    y = latent_attention(problem.q, problem.k, problem.v)
    assert isinstance(y, Tensor)
    explicit, state = latent_attention(
        problem.q,
        problem.k,
        problem.v,
        causal=True,
        scale=1.0,
        key_mask=None,
        cu_seqlens=None,
        state=None,
        backend=None,
        return_state=True,
    )
    assert torch.equal(y, explicit)
    assert isinstance(state, LatentState)
