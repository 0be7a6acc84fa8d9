# SPDX-License-Identifier: Apache-2.0
"""linear_recurrence, rg_lru and short_conv against the float64 reference."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import latte_ext
import pytest
import torch
from helpers import DTYPES, threads
from latte_ext import linear_recurrence, rg_lru, rg_lru_step, short_conv, short_conv_step
from mixer_helpers import (
    OPS,
    Call,
    assert_identical,
    assert_same,
    check,
    library,
    make_call,
    oracle,
    solve,
    solve_reference,
)
from torch import Tensor
from torch.nn import functional as F

OP = pytest.mark.parametrize("op", OPS)
RECURRENCE = pytest.mark.parametrize("op", OPS[:2])
# Around every vector width and tile (4 rows), and a row of more than one block (512).
CHANNELS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 32, 33, 64, 100, 513, 1040)
LENGTHS = (0, 1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 130)
SIZES = [(LENGTHS[5 * i % 12], CHANNELS[i]) for i in range(15)]
SIZES += [(LENGTHS[i], CHANNELS[(4 * i + 1) % 13]) for i in range(12)]


@pytest.mark.devices
@OP
@pytest.mark.parametrize(("tokens", "channels"), SIZES)
def test_sizes(op: str, tokens: int, channels: int) -> None:
    check(make_call(op, tokens, channels, state=True, seed=tokens))
    check(make_call(op, tokens, channels))


@pytest.mark.devices
@OP
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("state", [False, True])
def test_dtypes(op: str, dtype: torch.dtype, state: bool) -> None:
    check(make_call(op, 70, 33, dtype=dtype, state=state))
    check(make_call(op, 70, 64, dtype=dtype, state=state))


@pytest.mark.devices
@OP
def test_mixed_dtypes(op: str) -> None:
    """Each input has its own half precision or float32, as autocast leaves them."""
    for i, _ in enumerate(make_call(op).inputs):
        call = make_call(op, 30, 17)
        name = list(call.inputs)[i]
        call.inputs[name] = call.inputs[name].bfloat16()
        if name in ("b", "x"):
            call.dy = call.dy.bfloat16()
            call.d_final = call.d_final.bfloat16() if op == "short_conv" else call.d_final
        check(call)


@pytest.mark.devices
@OP
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(
    "lengths", [(5, 0, 1, 9), (0,), (0, 0, 3), (17, 2, 2, 40), (1,) * 20], ids=str
)
def test_packed(op: str, lengths: tuple[int, ...], state: bool) -> None:
    """Packed sequences are each alone, bit for bit."""
    call = make_call(op, channels=18, lengths=lengths, state=state, seed=len(lengths))
    packed = check(call)
    first = 0
    for n, length in enumerate(lengths):
        rows = slice(first, first + length)
        first += length
        alone = {
            name: x[n : n + 1] if name == call.state else x[:, rows] if x.dim() == 3 else x
            for name, x in call.inputs.items()
        }
        single = Call(op, alone, {}, call.dy[:, rows], call.d_final[n : n + 1])
        solution = solve(single)
        for name, want in solution.items():
            if name == "final" or name == f"d_{call.state}":
                assert torch.equal(packed[name][n : n + 1], want), name
            elif want.dim() == 3:
                assert torch.equal(packed[name][:, rows], want), name


@pytest.mark.devices
@OP
def test_many_sequences(op: str) -> None:
    """More than there are groups of them."""
    check(make_call(op, 3, 5, batch=300, state=True))
    check(make_call(op, channels=5, lengths=(1, 2, 0) * 100, state=True))


@pytest.mark.devices
@RECURRENCE
def test_reverse(op: str) -> None:
    for options in ({}, {"state": True}, {"lengths": (5, 0, 1, 9), "state": True}):
        call = make_call(op, 40, 18, reverse=True, **options)
        check(call)
    call = make_call(op, 40, 18)
    flipped = call.map(lambda x: x.flip(1) if x.dim() == 3 else x)
    flipped.options = {"reverse": True}
    forward, backward = solve(call), solve(flipped)
    for name, want in forward.items():
        got = backward[name].flip(1) if want.dim() == 3 else backward[name]
        assert torch.equal(got, want), name


@pytest.mark.devices
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", range(1, 9))
def test_widths(width: int, causal: bool) -> None:
    for tokens, bias in ((1, True), (2, False), (5, True), (33, False)):
        check(make_call("short_conv", tokens, 18, width=width, causal=causal, bias=bias))
    if causal:
        for tokens in (0, 1, 2, 6, 7, 8, 33):
            check(make_call("short_conv", tokens, 18, width=width, state=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [3, 4, 5])
def test_conv_is_torchs(width: int, causal: bool) -> None:
    x, weight, bias = torch.randn(2, 9, 6), torch.randn(6, width), torch.randn(6)
    left = width - 1 if causal else (width - 1) // 2
    padded = F.pad(x.transpose(1, 2), (left, width - 1 - left))
    expected = F.conv1d(padded, weight[:, None], bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(short_conv(x, weight, bias, causal=causal), expected)


# States ------------------------------------------------------------------------------------------


@pytest.mark.devices
@pytest.mark.parametrize("cut", [0, 1, 2, 5, 30])
@pytest.mark.parametrize(
    ("op", "reverse"), [*((op, False) for op in OPS), *((op, True) for op in OPS[:2])]
)
def test_whole_is_any_split(op: str, cut: int, reverse: bool) -> None:
    """A sequence in two calls has the same bits as in one."""
    call = make_call(op, 30, 18, **({"reverse": True} if reverse else {}))
    pieces = [slice(None, cut), slice(cut, None)]
    if reverse:
        pieces.reverse()

    def part(piece: slice) -> dict[str, Tensor]:
        return {n: x[:, piece] if x.dim() == 3 else x for n, x in call.inputs.items()}

    y, final = library(call, call.inputs)
    y0, state = library(call, part(pieces[0]))
    more = {call.state: state}
    if op == "rg_lru":
        more["fresh"] = torch.full((2,), y0.shape[1] == 0)
    y1, last = library(call, part(pieces[1]) | more)
    joined = torch.cat([y1, y0] if reverse else [y0, y1], 1)
    assert torch.equal(joined, y)
    assert torch.equal(last, final)


@pytest.mark.devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rg_lru_steps(dtype: torch.dtype) -> None:
    call = make_call("rg_lru", 12, 18, dtype=dtype)
    x, gate_a, gate_x, log_lambda = call.inputs.values()
    y, final = rg_lru(x, gate_a, gate_x, log_lambda, return_state=True)
    state = torch.zeros_like(final)
    fresh = torch.ones(2, dtype=torch.bool)
    for t in range(12):
        rows = (x[:, t], gate_a[:, t], gate_x[:, t])
        assert torch.equal(rg_lru_step(*rows, log_lambda, state, fresh=fresh), y[:, t])
        fresh.zero_()
    assert torch.equal(state, final)
    again = rg_lru_step(x[:, 0], gate_a[:, 0], gate_x[:, 0], log_lambda, state)
    more = (x[:, :1], gate_a[:, :1], gate_x[:, :1])
    assert torch.equal(again, rg_lru(*more, log_lambda, h0=final)[:, 0])


@pytest.mark.devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_conv_steps(width: int, dtype: torch.dtype) -> None:
    call = make_call("short_conv", 12, 18, width=width, dtype=dtype)
    x, weight, bias = call.inputs.values()
    y, final = short_conv(x, weight, bias, return_state=True)
    state = torch.zeros_like(final)
    for t in range(12):
        assert torch.equal(short_conv_step(x[:, t], weight, bias, state), y[:, t])
    assert torch.equal(state, final)
    step = short_conv_step(x[:, 0], weight, None, state)
    assert torch.equal(step, short_conv(x[:, :1], weight, state=final)[:, 0])


@pytest.mark.devices
@pytest.mark.parametrize("row", [0, 1, 2])
def test_conv_step_of_a_row_of_its_state(row: int) -> None:
    weight, state = torch.randn(18, 4), torch.randn(2, 3, 18)
    apart, x = state.clone(), state[:, row].clone()
    assert torch.equal(
        short_conv_step(state[:, row], weight, None, state), short_conv_step(x, weight, None, apart)
    )
    assert torch.equal(state, apart)


@pytest.mark.devices
def test_fresh() -> None:
    """A fresh sequence starts here, the others go on."""
    call = make_call("rg_lru", 9, 18, state=True)
    call.inputs["h0"][0] = 0
    call.options["fresh"] = torch.tensor([True, False])
    solution = check(call)
    start = make_call("rg_lru", 9, 18)
    going_on = make_call("rg_lru", 9, 18, state=True)
    assert torch.equal(solution["y"][0], solve(start)["y"][0])
    assert torch.equal(solution["y"][1], solve(going_on)["y"][1])


# rg_lru ------------------------------------------------------------------------------------------


@pytest.mark.devices
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("lengths", [None, (7, 0, 30)])
def test_masked_tokens_are_absent(
    lengths: tuple[int, ...] | None, state: bool, reverse: bool
) -> None:
    options = {"lengths": lengths, "batch": 1, "state": state, "reverse": reverse}
    call = make_call("rg_lru", 37, 18, masked=True, **options)
    mask = call.options["key_mask"]
    dirty = call.map(lambda x: x)
    for name in ("x", "gate_a", "gate_x"):
        dirty.inputs[name] = call.inputs[name].masked_fill(~mask[..., None], torch.nan)
    solution = solve(dirty)
    assert_identical(solution, check(call))
    assert (solution["d_x"][~mask] == 0).all()
    if lengths is None:
        kept = {n: x[mask][None] if x.dim() == 3 else x for n, x in call.inputs.items()}
        short = Call("rg_lru", kept, {"reverse": reverse}, call.dy[mask][None], call.d_final)
        assert torch.equal(solution["y"][mask][None], solve(short)["y"])
        assert torch.equal(solution["final"], solve(short)["final"])


@pytest.mark.devices
@pytest.mark.parametrize("decay", [-20.0, -12.0, -6.0, 0.0, 3.0, 30.0])
@pytest.mark.parametrize("gate", [-90.0, -30.0, -3.0, 3.0, 30.0, 200.0])
def test_extreme_gates(decay: float, gate: float) -> None:
    """From no decay at all, where the square root is steep, to none of the past left."""
    call = make_call("rg_lru", 20, 17, state=True)
    call.inputs["log_lambda"] = call.inputs["log_lambda"] + decay
    call.inputs["gate_a"] = call.inputs["gate_a"] + gate
    check(call)


@pytest.mark.devices
def test_square_root_is_bounded() -> None:
    """Without decay the derivative of the square root is 1000, not infinite."""
    x, gate_x, log_lambda = torch.ones(1, 2, 1), torch.zeros(1, 2, 1), torch.full((1,), -60.0)
    gate_a = torch.zeros(1, 2, 1, requires_grad=True)
    y = rg_lru(x, gate_a, gate_x, log_lambda.requires_grad_())
    (d_lambda,) = torch.autograd.grad(y[0, 1, 0], log_lambda)
    # d y / d(1 - a^2) = 1000 i x, d(1 - a^2) / d lambda = 2 * 8 r e^-60, with r = i = 1/2; and
    # through a itself -8 r e^-60 y[0].
    assert d_lambda.item() == pytest.approx(
        (500 * 8 - 4 * 0.5) * torch.exp(torch.tensor(-60.0)).item(), rel=1e-5
    )


@pytest.mark.devices
def test_slow_decay_keeps_its_digits() -> None:
    """1 - a^2 of a = 1 - 1e-7, which float32 would round to zero or twice its value."""
    x = torch.ones(1, 2, 1)
    log_lambda = torch.tensor([-17.5])
    gates = torch.zeros(1, 2, 1)
    y = rg_lru(x, gates, gates, log_lambda, h0=torch.zeros(1, 1))[0, 0, 0]
    decay = -8 * 0.5 * F.softplus(log_lambda.double())
    expected = torch.sqrt(-torch.expm1(2 * decay)) * 0.5
    assert y.item() == pytest.approx(expected.item(), rel=1e-6)


# Strides -----------------------------------------------------------------------------------------


def padded_rows(x: Tensor) -> Tensor:
    storage = x.new_full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 3), torch.nan)
    storage[..., 1:, 2:-1] = x
    return storage[..., 1:, 2:-1]


def channel_strided(x: Tensor) -> Tensor:
    storage = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan)
    storage[..., ::3] = x
    return storage[..., ::3]


def misaligned(x: Tensor) -> Tensor:
    storage = x.new_full((x.numel() + 2,), torch.nan)
    storage[1:-1] = x.reshape(-1)
    return storage[1:-1].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channel_major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "time_major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "padded_rows": padded_rows,
    "channel_strided": channel_strided,
    "misaligned": misaligned,
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_tokens": lambda x: x[:, :1].expand_as(x),
    "expanded_channels": lambda x: x[..., :1].expand_as(x),
    "one_number": lambda x: x.reshape(-1)[0].expand_as(x),
}


@pytest.mark.devices
@OP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(op: str, layout: str, dtype: torch.dtype) -> None:
    for channels in (16, 19):
        call = make_call(op, 21, channels, dtype=dtype, state=True)
        check(call.map(lambda x: LAYOUTS[layout](x) if x.dim() == 3 else x))


@pytest.mark.devices
@OP
def test_strided_parameters_and_states(op: str) -> None:
    call = make_call(op, 21, 19, state=True)
    check(call.map(lambda x: channel_strided(x) if x.dim() < 3 else x))


@OP
@pytest.mark.parametrize("strides", [(0, 2**30 + 5, 1), (0, 7, 2**30 + 5)], ids=["tokens", "c"])
def test_offsets_beyond_32_bits(op: str, strides: tuple[int, ...], tmp_path: Path) -> None:
    """Elements more than 2**31 apart, in a sparse file of which only few pages ever exist."""
    base = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=2**32 + 2**10, dtype=torch.bfloat16
    )
    call = make_call(op, 4, 4, batch=1, dtype=torch.bfloat16)
    expected = solve_reference(call)
    names = [name for name, x in call.inputs.items() if x.dim() == 3]
    for name in names:
        far = base.as_strided(call.inputs[name].shape, strides)
        far.copy_(call.inputs[name])
        moved = call.map(lambda x: x)
        moved.inputs[name] = far
        assert_same(solve(moved), expected, moved)


# Threads -----------------------------------------------------------------------------------------


@OP
def test_thread_count_changes_nothing(op: str) -> None:
    """As many sequences and blocks of channels as threads: the same bits for any number."""
    for options in ({"batch": 4}, {"batch": 1, "channels": 700}, {"lengths": (900, 3, 800, 0)}):
        call = make_call(op, 600, **({"channels": 64} | options), state=True)
        solutions = []
        for count in (1, 2, 3):
            with threads(count):
                solutions.append(solve(call))
        if op != "short_conv" and options == {"batch": 1, "channels": 700}:
            assert_same(solutions[2], solutions[0], call)
        else:
            assert_identical(solutions[2], solutions[0])
        assert_identical(solutions[1], solutions[0])


@RECURRENCE
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(9000,), (5000, 17, 0, 4000)], ids=str)
def test_cut_sequences(op: str, lengths: tuple[int, ...], reverse: bool) -> None:
    """A narrow long sequence is cut among many threads, and equal to rounding."""
    call = make_call(op, channels=9, lengths=lengths, state=True, reverse=reverse)
    # Slow decays, so that the far past matters.
    if op == "linear_recurrence":
        call.inputs["a"] = 1 - 0.01 * (1 - call.inputs["a"])
    else:
        call.inputs["log_lambda"] -= 5
    with threads(1):
        whole = solve(call)
    for count in (2, 4, 7):
        with threads(count):
            cut = solve(call)
            assert_identical(solve(call), cut)
        assert_same(cut, whole, call, factor=4)
    assert not torch.equal(cut["y"], whole["y"])
    values = "d_b" if op == "linear_recurrence" else "d_x"
    assert not torch.equal(cut[values], whole[values])


@pytest.mark.devices
def test_cut_masked_sequence() -> None:
    call = make_call("rg_lru", 9000, 9, batch=1, masked=True)
    call.options["key_mask"][:, :5000] = False
    with threads(1):
        whole = solve(call)
    with threads(6):
        assert_same(solve(call), whole, call, factor=4)


@OP
def test_large_outputs_go_past_the_caches(op: str) -> None:
    """Enough bytes for the stores that bypass them: the same bits as without."""
    call = make_call(op, 64, 512, batch=1)
    small = solve(call)
    large = call.map(lambda x: x.repeat(300, 1, 1) if x.dim() == 3 else x)
    large.d_final = call.d_final.repeat(300, *[1] * (call.d_final.dim() - 1))
    solution = solve(large)
    for name in ("y", *(f"d_{n}" for n, x in call.inputs.items() if x.dim() == 3)):
        assert torch.equal(solution[name][-1:], small[name]), name


# Gradients ---------------------------------------------------------------------------------------

# Options, and the operators that have them.
GRADCHECK: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, OPS),
    "state": ({"state": True}, OPS),
    "packed": ({"lengths": (2, 0, 3), "state": True}, OPS),
    "reverse": ({"reverse": True, "state": True}, OPS[:2]),
    "masked": ({"masked": True}, ("rg_lru",)),
    "centred": ({"causal": False}, ("short_conv",)),
    "no_bias": ({"bias": False}, ("short_conv",)),
}


@pytest.mark.devices
@pytest.mark.parametrize(
    ("feature", "op"), [(feature, op) for feature, (_, ops) in GRADCHECK.items() for op in ops]
)
def test_gradcheck(feature: str, op: str) -> None:
    options = {"tokens": 5, "channels": 3} | GRADCHECK[feature][0]
    call = make_call(op, dtype=torch.float64, **options)
    names = list(call.inputs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return library(call, dict(zip(names, values, strict=True)))  # type: ignore[no-any-return]

    leaves = [x.requires_grad_() for x in call.inputs.values()]
    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, rtol=1e-6)


@OP
def test_reference_gradients_twice(op: str) -> None:
    call = make_call(op, 3, 2, batch=1, dtype=torch.float64, state=True)
    names = list(call.inputs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(names, values, strict=True))
        return library(call, inputs, "reference")  # type: ignore[no-any-return]

    leaves = [x.requires_grad_() for x in call.inputs.values()]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.devices
@OP
def test_gradient_from_one_output(op: str) -> None:
    """The cotangents that are missing count as zero."""
    for used in (0, 1):
        call = make_call(op, 12, 5, state=True)
        zero = "d_final" if used == 0 else "dy"
        setattr(call, zero, torch.zeros_like(getattr(call, zero)))
        leaves = {name: x.detach().requires_grad_() for name, x in call.inputs.items()}
        output = library(call, leaves)[used]
        cotangent = (call.dy, call.d_final)[used]
        gradients = torch.autograd.grad(
            output, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True
        )
        expected = solve_reference(call)
        got = {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}
        want = {name: expected[name] for name in got}
        assert_same(got, want, call)


@pytest.mark.devices
@OP
def test_changed_inputs_are_noticed(op: str) -> None:
    call = make_call(op)
    name = next(iter(call.inputs))
    leaves = {n: x.clone().requires_grad_(n != name) for n, x in call.inputs.items()}
    y = library(call, leaves)[0]
    leaves[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# NaN and infinity --------------------------------------------------------------------------------


@pytest.mark.devices
@OP
def test_nan_stays_in_its_channel_and_future(op: str) -> None:
    for name in [n for n, x in make_call(op).inputs.items() if x.dim() == 3]:
        call = make_call(op, 20, 18)
        call.inputs[name][1, 8, 5] = torch.nan
        y = library(call, call.inputs)[0]
        expected = torch.zeros_like(y, dtype=torch.bool)
        expected[1, 8 : 12 if op == "short_conv" else 20, 5] = True
        assert torch.equal(y.isnan(), expected), name


@pytest.mark.devices
@OP
def test_nan_in_one_packed_sequence(op: str) -> None:
    call = make_call(op, channels=18, lengths=(5, 9, 6))
    clean = solve(call)
    for x in call.inputs.values():
        if x.dim() == 3:
            x[:, 5:14] = torch.nan
    dirty = solve(call)
    for name, want in clean.items():
        if want.dim() == 3 and want.shape[1] == 20:
            assert torch.equal(dirty[name][:, :5], want[:, :5]), name
            assert torch.equal(dirty[name][:, 14:], want[:, 14:]), name


@pytest.mark.devices
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["x", "gate_a", "gate_x", "log_lambda"])
def test_non_finite_values_as_in_the_reference(name: str, value: float) -> None:
    call = make_call("rg_lru", 6, 18)
    call.inputs[name][(3,) if name == "log_lambda" else (..., slice(4), 3)] = value
    got, want = (f(call, call.inputs)[0].double() for f in (library, oracle))
    torch.testing.assert_close(got, want, equal_nan=True, atol=1e-5, rtol=1e-5)


# Backends ----------------------------------------------------------------------------------------


@OP
def test_backends(op: str) -> None:
    call = make_call(op, 20, 9, state=True)
    assert_identical(solve(call, lambda *a: library(*a, "cpu")), solve(call))
    assert_same(solve(call, lambda *a: library(*a, "reference")), solve_reference(call), call)


@OP
def test_no_state_unless_asked(op: str) -> None:
    call = make_call(op)
    assert isinstance(getattr(latte_ext, op)(**call.inputs), Tensor)


@pytest.mark.devices
@OP
@pytest.mark.parametrize("batch", [0, 1])
def test_nothing(op: str, batch: int) -> None:
    check(make_call(op, 0, 5, batch=batch, state=True))
    check(make_call(op, 4, 5, batch=0, state=True))


@pytest.mark.devices
def test_recurrence_of_any_factor() -> None:
    """Growing, alternating and vanishing factors, compared step by step."""
    a = torch.tensor([2.0, -1.5, 0.0, 1.0, -0.5]).repeat(1, 40, 1)
    b = torch.randn(1, 40, 5)
    h, rows = torch.zeros(1, 5, dtype=torch.float64), []
    for t in range(40):
        h = a[:, t].double() * h + b[:, t].double()
        rows.append(h)
    torch.testing.assert_close(
        linear_recurrence(a, b).double(), torch.stack(rows, 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.devices
def test_options_are_independent() -> None:
    """Every combination of state, packing, mask and direction."""
    flags = itertools.product([False, True], repeat=4)
    for state, packed, masked, reverse in flags:
        lengths = (4, 0, 7) if packed else None
        check(
            make_call("rg_lru", 11, 5, lengths=lengths, state=state, masked=masked, reverse=reverse)
        )
