# SPDX-License-Identifier: Apache-2.0
"""The operators of recurrences and convolutions inside torch: opcheck, compiler, export, modes."""

import io
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import latte_ext
import pytest
import torch
from helpers import compute_dtype
from latte_ext import linear_recurrence, rg_lru, rg_lru_step, short_conv, short_conv_step
from mixer_helpers import OPS, Call, assert_identical, assert_same, library, make_call, solve
from torch import Tensor
from torch.utils.checkpoint import checkpoint

OPERATORS = torch.ops.latte_ext
OP = pytest.mark.parametrize("op", OPS)

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "state": {"state": True},
    "packed": {"lengths": (4, 0, 5), "state": True},
    "bfloat16": {"dtype": torch.bfloat16, "state": True},
    "float64": {"dtype": torch.float64},
    "tokens_0": {"tokens": 0},
    "one_way": {},
}
CASE = pytest.mark.parametrize("case", CASES)


def case_call(op: str, case: str) -> Call:
    options = {"tokens": 9, "channels": 5} | CASES[case]
    if case == "one_way":
        options |= {"causal": False} if op == "short_conv" else {"reverse": True}
    return make_call(op, masked=case == "state", **options)


def arguments(call: Call) -> list[Any]:
    """Of the operator, in its order."""
    get = call.inputs.get
    borders = call.options.get("cu_seqlens")
    if call.op == "short_conv":
        causal = call.options.get("causal", True)
        return [get("x"), get("weight"), get("bias"), borders, get("state"), causal]
    reverse = call.options.get("reverse", False)
    if call.op == "linear_recurrence":
        return [get("a"), get("b"), borders, get("h0"), reverse]
    gates = [get(name) for name in ("x", "gate_a", "gate_x", "log_lambda")]
    h0 = get("h0")
    fresh = None if h0 is None else torch.arange(h0.shape[0]) % 2 == 0
    return [*gates, call.options.get("key_mask"), borders, h0, fresh, reverse]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.supports("opcheck")
@OP
@CASE
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_forward(op: str, case: str, requires_grad: bool) -> None:
    call = case_call(op, case)
    for x in call.inputs.values():
        x.requires_grad_(requires_grad)
    torch.library.opcheck(getattr(OPERATORS, op).default, tuple(arguments(call)))


@OP
@CASE
def test_opcheck_backward(op: str, case: str) -> None:
    call = case_call(op, case)
    *tensors, flag = arguments(call)
    wide = call.dy.dtype == compute_dtype(call.dy.dtype)
    if op == "linear_recurrence":
        a, b, *rest = tensors
        tensors = [a, None, b, *rest] if wide else [a, b, None, *rest]
    elif op == "rg_lru":
        tensors.append(call.inputs["x"] if wide else None)
    operator = getattr(OPERATORS, f"{op}_backward").default
    torch.library.opcheck(operator, (*tensors, call.dy, call.d_final, flag))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_steps(dtype: torch.dtype) -> None:
    call = make_call("rg_lru", 1, 5, dtype=dtype, state=True)
    x, gate_a, gate_x, log_lambda, h0 = call.inputs.values()
    rows = (x[:, 0], gate_a[:, 0], gate_x[:, 0], log_lambda, h0)
    for fresh in (None, torch.tensor([True, False])):
        torch.library.opcheck(OPERATORS.rg_lru_step.default, (*rows, fresh))
    call = make_call("short_conv", 1, 5, dtype=dtype, state=True)
    x, weight, bias, state = call.inputs.values()
    for b in (None, bias):
        torch.library.opcheck(OPERATORS.short_conv_step.default, (x[:, 0], weight, b, state))


@pytest.mark.supports("meta tensors")
@OP
@CASE
def test_meta_tensors(op: str, case: str) -> None:
    """Shapes and dtypes without memory, forward and backward."""
    call = case_call(op, case)
    real = solve(call)
    meta = call.map(lambda x: x.to("meta"))
    for name in ("key_mask", "cu_seqlens"):
        if name in meta.options:
            meta.options = meta.options | {name: meta.options[name].to("meta")}
    for name, got in solve(meta).items():
        assert got.device.type == "meta", name
        assert (got.shape, got.dtype) == (real[name].shape, real[name].dtype), name
        assert got.stride() == real[name].stride(), name


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)


@pytest.mark.supports("compile: forward and backward, fullgraph")
@OP
@CASE
def test_compile(op: str, case: str) -> None:
    """The same results as eager, forward and backward."""
    call = case_call(op, case)
    assert_identical(solve(call, compiled(library)), solve(call))


@pytest.mark.slow
@OP
def test_compile_with_inductor(op: str) -> None:
    call = make_call(op, 40, 18, state=True)
    assert_identical(solve(call, torch.compile(library, fullgraph=True)), solve(call))


def test_compile_steps() -> None:
    """The states are updated in place inside a graph as well."""

    def both(x: Tensor, h: Tensor, tail: Tensor, weight: Tensor, log_lambda: Tensor) -> Tensor:
        x = short_conv_step(x, weight, None, tail)
        return rg_lru_step(x, x.sin(), x.cos(), log_lambda, h).relu()

    function = compiled(both)
    states = [torch.zeros(2, 5), torch.zeros(2, 3, 5)]
    eager = [x.clone() for x in states]
    weight, log_lambda = torch.randn(5, 4), torch.randn(5)
    for _ in range(4):
        x = torch.randn(2, 5)
        got, want = function(x, *states, weight, log_lambda), both(x, *eager, weight, log_lambda)
        torch.testing.assert_close(got, want)
    for got, want in zip(states, eager, strict=True):
        torch.testing.assert_close(got, want)


class Model(torch.nn.Module):
    def forward(self, x: Tensor, weight: Tensor, h0: Tensor, tail: Tensor) -> tuple[Tensor, ...]:
        y, tail = short_conv(x, weight, state=tail, return_state=True)
        z, last = rg_lru(y, y, x, weight[:, 0], h0=h0, return_state=True)
        return linear_recurrence(z.sigmoid(), y), last, tail


@pytest.mark.supports(
    "export, save and load, dynamic sizes", "linear_recurrence", "rg_lru", "short_conv"
)
def test_export() -> None:
    """With dynamic dimensions and states as inputs and outputs; saved, loaded and run."""

    def inputs(batch: int, tokens: int) -> tuple[Tensor, ...]:
        x, h0, tail = torch.randn(batch, tokens, 5), torch.randn(batch, 5), torch.randn(batch, 3, 5)
        return x, torch.randn(5, 4), h0, tail

    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    shapes = ({0: batch, 1: tokens}, None, {0: batch}, {0: batch})
    program = torch.export.export(Model(), inputs(2, 9), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    other = inputs(3, 70)
    for got, want in zip(loaded(*other), Model()(*other), strict=True):
        assert torch.equal(got, want)


@pytest.mark.supports("activation checkpointing")
@OP
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(op: str, use_reentrant: bool) -> None:
    call = make_call(op, 20, 5, state=True)
    names = list(call.inputs)

    def run(again: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in call.inputs.values()]

        def function(*values: Tensor) -> Tensor:
            return library(call, dict(zip(names, values, strict=True)))[0]  # type: ignore[no-any-return]

        y = checkpoint(function, *leaves, use_reentrant=use_reentrant) if again else None
        y = function(*leaves) if y is None else y
        y.backward(call.dy)
        return [x.grad for x in leaves]  # type: ignore[misc]

    for got, want in zip(run(True), run(False), strict=True):
        assert torch.equal(got, want)


@pytest.mark.supports("autocast (CPU)")
@OP
def test_autocast(op: str) -> None:
    """dtypes are kept: nothing is rounded that did not come in half precision."""
    call = make_call(op, 20, 5, state=True)

    def inside(*args: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return library(*args)

    assert_identical(solve(call, inside), solve(call))


def test_steps_refuse_gradients() -> None:
    x = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"\[rg_lru_step\] got x that requires grad.*expected"):
        rg_lru_step(x, x, x, torch.zeros(5), torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match=r"\[short_conv_step\] got x that requires grad"):
        short_conv_step(x, torch.zeros(5, 4), None, torch.zeros(2, 3, 5))


def test_step_marks_its_state() -> None:
    """Autograd refuses a backward pass that saved the state before the update."""
    state = torch.randn(2, 5)
    x = torch.randn(2, 5, requires_grad=True)
    y = (x * state).sum()
    with torch.no_grad():
        rg_lru_step(x, x, x, torch.zeros(5), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def answer(call: Call, sender: Connection) -> None:
    sender.send(library(call, call.inputs)[0].flatten().tolist())
    sender.close()


@pytest.mark.supports("forked processes")
@OP
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_process(op: str) -> None:
    """A child computes, on one thread, what its parent computes on several."""
    # Two threads of ours, and too small for torch's own, which a child cannot start.
    call = make_call(op, 120, 64, batch=4)
    expected = library(call, call.inputs)[0]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=answer, args=(call, sender))
    child.start()
    sender.close()
    if not receiver.poll(20):
        child.kill()
        child.join()
        pytest.fail("the forked process hangs")
    assert torch.equal(torch.tensor(receiver.recv()), expected.flatten())
    child.join(20)
    assert child.exitcode == 0


# Calls that must fail ----------------------------------------------------------------------------

B, T, C, K = 2, 5, 3, 4


def good(op: str) -> dict[str, Any]:
    return dict(make_call(op, T, C, batch=B, width=K, state=True).inputs)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD: dict[str, tuple[str, Callable[[], dict[str, Any]], type[Exception], str]] = {
    "a_rank": (
        "linear_recurrence", lambda: {"a": zeros(T, C)}, ValueError, r"a has.*\(5, 3\).*3 dim"
    ),
    "b_shape": (
        "linear_recurrence", lambda: {"b": zeros(B, 6, C)}, ValueError,
        r"b has shape \(2, 6, 3\), expected \(2, 5, 3\)",
    ),
    "a_list": ("linear_recurrence", lambda: {"a": [1.0]}, TypeError, "a is a list, expected a"),
    "a_integers": (
        "linear_recurrence", lambda: {"a": zeros(B, T, C).long()}, TypeError,
        "a has dtype torch.int64",
    ),
    "one_float64": (
        "linear_recurrence", lambda: {"b": zeros(B, T, C).double(), "h0": None}, TypeError,
        "a, b have dtypes float32, float64, expected float64 for all",
    ),
    "h0_shape": (
        "linear_recurrence", lambda: {"h0": zeros(1, C)}, ValueError,
        r"h0 has shape \(1, 3\), expected \(2, 3\)",
    ),
    "h0_dtype": (
        "linear_recurrence", lambda: {"h0": zeros(B, C).double()}, TypeError,
        "h0 has dtype float64, expected float32",
    ),
    "reverse": ("linear_recurrence", lambda: {"reverse": 1}, TypeError, "reverse is a int"),
    "borders_batch": (
        "linear_recurrence", lambda: {"cu_seqlens": torch.tensor([0, 5])}, ValueError,
        "a has batch 2, expected 1 with cu_seqlens",
    ),
    "borders_fall": (
        "linear_recurrence",
        lambda: {
            "a": zeros(1, T, C), "b": zeros(1, T, C), "h0": None,
            "cu_seqlens": torch.tensor([0, 4, 3, 5]),
        },
        ValueError, r"cu_seqlens\[2\] is 3, expected at least 4",
    ),
    "borders_rank": (
        "linear_recurrence", lambda: {"cu_seqlens": zeros(1, 2).long()}, ValueError,
        r"cu_seqlens has shape \(1, 2\), expected .*\(sequences",
    ),
    "no_channels": (
        "linear_recurrence", lambda: {"a": zeros(B, T, 0), "b": zeros(B, T, 0), "h0": None},
        ValueError, "a has 0 channels, expected at least 1",
    ),
    "sparse": (
        "linear_recurrence", lambda: {"a": zeros(B, T, C).to_sparse()}, TypeError,
        "a has layout torch.sparse_coo, expected torch.strided",
    ),
    "backend": ("linear_recurrence", lambda: {"backend": "abacus"}, ValueError, "'abacus'"),
    "gate_shape": (
        "rg_lru", lambda: {"gate_x": zeros(B, T, 4)}, ValueError,
        r"gate_x has shape \(2, 5, 4\), expected \(2, 5, 3\)",
    ),
    "lambda_shape": (
        "rg_lru", lambda: {"log_lambda": zeros(4)}, ValueError,
        r"log_lambda has shape \(4,\), expected \(3,\)",
    ),
    "lambda_none": ("rg_lru", lambda: {"log_lambda": None}, TypeError, "log_lambda is a NoneType"),
    "fresh_alone": (
        "rg_lru", lambda: {"h0": None, "fresh": torch.ones(B).bool()}, ValueError,
        "fresh without h0, expected",
    ),
    "fresh_shape": (
        "rg_lru", lambda: {"fresh": torch.ones(3).bool()}, ValueError,
        r"fresh has shape \(3,\), expected \(2,\)",
    ),
    "mask_dtype": (
        "rg_lru", lambda: {"key_mask": torch.ones(B, T)}, TypeError, "key_mask has dtype.*bool"
    ),
    "mask_shape": (
        "rg_lru", lambda: {"key_mask": torch.ones(T, B).bool()}, ValueError,
        r"key_mask has shape \(5, 2\), expected \(2, 5\)",
    ),
    "x_rank": ("short_conv", lambda: {"x": zeros(T, C)}, ValueError, r"x has shape \(5, 3\).*3 d"),
    "weight_rank": (
        "short_conv", lambda: {"weight": zeros(C, 1, K)}, ValueError, r"weight has.*2 dimensions"
    ),
    "weight_channels": (
        "short_conv", lambda: {"weight": zeros(7, K)}, ValueError,
        r"weight has shape \(7, 4\), expected \(3, 4\)",
    ),
    "width_9": (
        "short_conv", lambda: {"weight": zeros(C, 9), "state": None}, ValueError,
        "weight has width 9, expected 1 to 8",
    ),
    "width_0": (
        "short_conv", lambda: {"weight": zeros(C, 0), "state": None}, ValueError,
        "weight has width 0, expected 1 to 8",
    ),
    "bias_shape": (
        "short_conv", lambda: {"bias": zeros(4)}, ValueError,
        r"bias has shape \(4,\), expected \(3,\)",
    ),
    "state_shape": (
        "short_conv", lambda: {"state": zeros(B, K, C)}, ValueError,
        r"state has shape \(2, 4, 3\), expected \(2, 3, 3\)",
    ),
    "state_dtype": (
        "short_conv", lambda: {"state": zeros(B, K - 1, C).bfloat16()}, TypeError,
        "state has dtype bfloat16, expected float32",
    ),
    "state_centred": (
        "short_conv", lambda: {"causal": False}, ValueError, "state with causal=False, expected"
    ),
    "return_state_centred": (
        "short_conv", lambda: {"causal": False, "state": None, "return_state": True}, ValueError,
        "return_state with causal=False, expected",
    ),
    "weight_float64": (
        "short_conv", lambda: {"weight": zeros(C, K).double()}, TypeError,
        "x, weight, bias have dtypes float32, float64, float32, expected float64 for all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str, backend: str | None) -> None:
    op, change, error, text = BAD[bad]
    with pytest.raises(error, match=rf"(?s)^\[{op}\] .*{text}") as caught:
        getattr(latte_ext, op)(**good(op) | {"backend": backend} | change())
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


STEPS: dict[str, tuple[Callable[[], Any], str]] = {
    "gate": (
        lambda: rg_lru_step(zeros(B, C), zeros(B, 4), zeros(B, C), zeros(C), zeros(B, C)),
        r"\[rg_lru_step\] gate_a has shape \(2, 4\), expected \(2, 3\)",
    ),
    "state": (
        lambda: rg_lru_step(zeros(B, C), zeros(B, C), zeros(B, C), zeros(C), zeros(1, C)),
        r"\[rg_lru_step\] state has shape \(1, 3\), expected \(2, 3\)",
    ),
    "state_dtype": (
        lambda: rg_lru_step(zeros(B, C), zeros(B, C), zeros(B, C), zeros(C), zeros(B, C).double()),
        r"\[rg_lru_step\] .*dtype float64, expected float32",
    ),
    "lambda": (
        lambda: rg_lru_step(zeros(B, C), zeros(B, C), zeros(B, C), zeros(4), zeros(B, C)),
        r"\[rg_lru_step\] log_lambda has shape \(4,\), expected \(3,\)",
    ),
    "expanded_state": (
        lambda: rg_lru_step(
            zeros(B, C), zeros(B, C), zeros(B, C), zeros(C), zeros(1, C).expand(B, C)
        ),
        r"\[rg_lru_step\] .*stride 0.*expected an output that addresses each element once",
    ),
    "tail": (
        lambda: short_conv_step(zeros(B, C), zeros(C, K), None, zeros(B, K, C)),
        r"\[short_conv_step\] state has shape \(2, 4, 3\), expected \(2, 3, 3\)",
    ),
    "tail_dtype": (
        lambda: short_conv_step(zeros(B, C), zeros(C, K), None, zeros(B, K - 1, C).half()),
        r"\[short_conv_step\] state has dtype float16, expected float32",
    ),
    "x_rank": (
        lambda: short_conv_step(zeros(B, 1, C), zeros(C, K), None, zeros(B, K - 1, C)),
        r"\[short_conv_step\] x has shape \(2, 1, 3\), expected 2 dimensions",
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_bad_steps(name: str) -> None:
    function, text = STEPS[name]
    with pytest.raises((TypeError, ValueError), match=text):
        function()


def test_cuda_is_not_built() -> None:
    x = torch.zeros(1, 2, 3, device="meta")
    with pytest.raises(ValueError, match=r"\[short_conv\] backend is 'cuda', expected"):
        short_conv(x, torch.zeros(3, 4, device="meta"), backend="cuda")


@OP
def test_backends_share_no_rounding(op: str) -> None:
    call = make_call(op, 20, 5)
    assert_same(solve(call, lambda *a: library(*a, "reference")), solve(call), call, factor=2)
