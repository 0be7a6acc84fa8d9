# SPDX-License-Identifier: Apache-2.0
"""What only a CUDA device has: streams, graphs, and memory beside the CPU's.

Collected where there is one, see conftest.py.
"""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import assert_same_solution, make_problem, solve, solve_reference
from latte_ext import (
    LatentState,
    latent_attention,
    latent_attention_step,
    linear_recurrence,
    rg_lru,
    short_conv,
)
from latte_ext.rotary import rotate
from mixer_helpers import OPS, library, make_call
from torch import Tensor

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("default")]

# Cycles of a device that outlast the launches behind them: some 50 ms.
BUSY = 100_000_000


@pytest.fixture(autouse=True)
def on_the_device(fixed_surroundings: None) -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def inputs(tokens: int = 300, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    problem = make_problem(32, 64, tokens, heads=4, kv_heads=2, dtype=dtype, seed=seed)
    return [problem.q, problem.k, problem.v]


def recurrence_inputs(tokens: int = 300) -> list[Tensor]:
    return [torch.rand(2, tokens, 48), torch.randn(2, tokens, 48)]


# Each with inputs of its own.
CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[], list[Tensor]]]] = {
    "causal": (latent_attention, inputs),
    "bidirectional": (lambda *x: latent_attention(*x, causal=False), inputs),
    "long": (latent_attention, lambda: [x[:1, :2] for x in inputs(9000)]),
    "bfloat16": (latent_attention, lambda: inputs(dtype=torch.bfloat16)),
    "linear_recurrence": (linear_recurrence, recurrence_inputs),
    "rg_lru": (
        lambda x, gate: rg_lru(x, gate, gate, x[0, 0]),
        recurrence_inputs,
    ),
    "short_conv": (lambda x, w: short_conv(x, w[0, :4].t().contiguous()), recurrence_inputs),
    "rotate": (lambda q, k, v: rotate(v, torch.arange(v.shape[2])), inputs),
}
CALL = pytest.mark.parametrize("name", CALLS)


@CALL
def test_work_is_enqueued_on_the_current_stream(name: str) -> None:
    """Behind work that is still running there, which the default stream would overtake."""
    function, make = CALLS[name]
    values = make()
    expected = function(*values)
    late = [torch.zeros_like(x) for x in values]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY)
        for x, value in zip(late, values, strict=True):
            x.copy_(value)
        got = function(*late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("op", OPS)
def test_gradients_on_another_stream(op: str) -> None:
    call = make_call(op, 70, 33, state=True)
    leaves = {name: x.detach().requires_grad_() for name, x in call.inputs.items()}
    (expected,) = torch.autograd.grad(
        library(call, leaves)[0], next(iter(leaves.values())), call.dy
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY)
        output = library(call, leaves)[0]
        (got,) = torch.autograd.grad(output, next(iter(leaves.values())), call.dy)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


@CALL
def test_streams_have_workspaces_of_their_own(name: str) -> None:
    function, make = CALLS[name]
    values = [make() for _ in range(3)]
    for i, batch in enumerate(values):
        for x in batch:
            x.mul_(1 + i)
    expected = [function(*batch) for batch in values]
    streams = [torch.cuda.Stream() for _ in values]
    torch.cuda.synchronize()
    got: list[list[Tensor]] = [[] for _ in values]
    for _ in range(10):
        for stream, batch, results in zip(streams, values, got, strict=True):
            with torch.cuda.stream(stream):
                results.append(function(*batch))
    torch.cuda.synchronize()
    for results, want in zip(got, expected, strict=True):
        assert all(torch.equal(y, want) for y in results)


def test_threads_of_python() -> None:
    """Each with a stream, as in a server."""
    values = [inputs(seed=i) for i in range(4)]
    expected = [latent_attention(*batch) for batch in values]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def serve(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()) as stream, torch.no_grad():
            for _ in range(20):
                y = latent_attention(*values[i])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(y, expected[i]):
                    wrong.append(i)
            del stream

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Graphs ------------------------------------------------------------------------------------------


def capture(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one call, after the warming up that torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@CALL
def test_forward_in_a_graph(name: str) -> None:
    function, make = CALLS[name]
    static = make()
    graph, result = capture(lambda: function(*static))
    for factor in (1.0, 0.5):
        values = [factor * x for x in make()]
        for x, value in zip(static, values, strict=True):
            x.copy_(value)
        graph.replay()
        assert torch.equal(result, function(*values))


def test_decoding_in_a_graph() -> None:
    """The state is updated in place, replay by replay."""
    q, k, v = inputs(20)
    state = LatentState.empty(2, 2, 32, 64, device="cuda")
    static = [x[:, :, 0].clone() for x in (q, k, v)]
    graph, y = capture(lambda: latent_attention_step(*static, state))
    for x, empty in zip(state, LatentState.empty(2, 2, 32, 64, device="cuda"), strict=True):
        x.copy_(empty)
    eager = LatentState.empty(2, 2, 32, 64, device="cuda")
    for t in range(20):
        rows = [x[:, :, t] for x in (q, k, v)]
        for x, row in zip(static, rows, strict=True):
            x.copy_(row)
        graph.replay()
        assert torch.equal(y, latent_attention_step(*rows, eager))
    assert all(map(torch.equal, state, eager))


def test_nothing_waits_for_the_device() -> None:
    """Neither a forward pass nor a step reads a value back."""
    q, k, v = inputs()
    state = LatentState.empty(2, 2, 32, 64, device="cuda")
    mask = torch.ones(2, 300, dtype=torch.bool)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        latent_attention(q, k, v, key_mask=mask, return_state=True)
        latent_attention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow() -> None:
    values = [x[:1] for x in inputs(9000)]
    latent_attention(*values)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        latent_attention(*values)
    assert torch.cuda.memory_allocated() == before


# Two places --------------------------------------------------------------------------------------


def test_devices_are_not_mixed() -> None:
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match=r"^\[latent_attention\] k is on cpu, expected cuda:0"):
        latent_attention(q, k.cpu(), v)
    with pytest.raises(RuntimeError, match=r"^\[latent_attention\] state is on cpu, expected cuda"):
        latent_attention(q, k, v, state=LatentState.empty(2, 2, 32, 64, device="cpu"))
    # The operator itself, which the public function has not checked for.
    operator = torch.ops.latte_ext.latent_attention
    with pytest.raises(RuntimeError, match=r"^\[latent_attention\] k is on cuda:0, expected cpu"):
        operator(q.cpu(), k, v, None, None, None, None, None, True, 1.0)


def test_backends() -> None:
    problem = make_problem(16, 24, 70, initial_state=False)
    q, k, v = problem.q, problem.k, problem.v
    assert torch.equal(latent_attention(q, k, v, backend="cuda"), latent_attention(q, k, v))
    with pytest.raises(ValueError, match=r"^\[latent_attention\] backend is 'cpu', expected one"):
        latent_attention(q, k, v, backend="cpu")
    torch.testing.assert_close(
        latent_attention(q, k, v, backend="reference"), latent_attention(q, k, v)
    )


def test_what_has_no_kernel_says_so() -> None:
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"^\[latent_attention\] q has dtype float64, expected"):
        latent_attention(q.double(), k.double(), v.double())
    wide = torch.zeros(1, 1, 3, 300)
    with pytest.raises(ValueError, match=r"^\[latent_attention\] q, v have 300 latents and 300 ch"):
        latent_attention(wide, wide, wide)


def test_states_travel() -> None:
    """A sequence begun on the CPU goes on on the device, and back."""
    problem = make_problem(16, 24, 90, heads=4, kv_heads=2)
    parts = [(x[:, :, :40], x[:, :, 40:]) for x in (problem.q, problem.k, problem.v)]
    first, state = latent_attention(*(x[0].cpu() for x in parts), return_state=True)
    again = LatentState.from_bytes(state.to("cuda").to_bytes()).to("cuda")
    assert again.device.type == "cuda"
    second, final = latent_attention(*(x[1] for x in parts), state=again, return_state=True)
    whole = solve_reference(problem)
    torch.testing.assert_close(
        torch.cat((first, second.cpu()), 2).double(), whole.y, atol=1e-5, rtol=1e-5
    )
    assert all(map(torch.equal, final.select([1, 0]).select([1, 0]), final))
    merged = final.merge(LatentState.empty(2, 2, 16, 24, device="cuda"))
    torch.testing.assert_close(merged.mean, final.mean)
    torch.testing.assert_close(final.to("cpu").mean.double(), whole.mean, atol=1e-5, rtol=1e-5)


def test_compiles_as_one_graph() -> None:
    """Without Triton: what is asked is whether the operator traces on device tensors."""
    problem = make_problem(16, 24, 70)
    compiled = torch.compile(latent_attention, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        y = compiled(problem.q, problem.k, problem.v)
    assert torch.equal(y, latent_attention(problem.q, problem.k, problem.v))
    torch.compiler.reset()


def test_large_problem() -> None:
    """Many more blocks than multiprocessors, and sequences cut into parts."""
    for options in ({"batch": 8, "heads": 16}, {"batch": 1, "heads": 1}):
        problem = make_problem(64, 64, 3000, dtype=torch.bfloat16, **options)
        few = problem.map(lambda x: x[:1, :1])
        solution = solve(problem)
        part = type(solution)(**{name: x[:1, :1] for name, x in solution.named()})
        assert_same_solution(part, solve_reference(few), few)


if torch.cuda.device_count() > 1:

    def test_the_device_need_not_be_the_current_one() -> None:
        values = [x.to("cuda:1") for x in inputs()]
        y = latent_attention(*values)
        assert y.device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
        torch.testing.assert_close(
            y.cpu(), latent_attention(*(x.to("cuda:0") for x in values)).cpu()
        )
