# SPDX-License-Identifier: Apache-2.0
"""The operators inside torch: compiler, export, autocast, functorch, processes, threads."""

import concurrent.futures
import io
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from helpers import (
    Problem,
    assert_identical,
    assert_same_solution,
    library_attention,
    make_problem,
    needs_torch,
    random_mask,
    solve,
    solve_reference,
    threads,
)
from latte_ext import LatentState, latent_attention, latent_attention_step
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

OPS = torch.ops.latte_ext

CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "state": {"initial_state": True},
    "bidirectional": {"causal": False},
    "mask": {"key_mask": random_mask(2, 9)},
    "packed": {"lengths": (4, 0, 5), "initial_state": True},
    "grouped": {"heads": 4, "kv_heads": 2, "scale": 0.5},
    "bfloat16": {"dtype": torch.bfloat16, "initial_state": True},
    "float64": {"dtype": torch.float64},
    "tokens_0": {"tokens": 0},
}
CASE = pytest.mark.parametrize("case", CASES)


def case_problem(case: str) -> Problem:
    options = {"latents": 3, "dim": 4, "tokens": 9} | CASES[case]
    return make_problem(**options)  # type: ignore[arg-type]


def operator_arguments(problem: Problem, *, requires_grad: bool) -> tuple[object, ...]:
    q, k, v = (x.requires_grad_(requires_grad) for x in (problem.q, problem.k, problem.v))
    state: list[Tensor | None] = [None] * 3
    if problem.state is not None:
        maximum, *carried = problem.state
        state = [maximum, *(x.requires_grad_(requires_grad) for x in carried)]
    return (q, k, v, problem.key_mask, problem.cu_seqlens, *state)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


# opcheck -----------------------------------------------------------------------------------------


@pytest.mark.supports("opcheck", "latent_attention")
@pytest.mark.parametrize("requires_grad", [False, True])
@CASE
def test_opcheck_forward(case: str, requires_grad: bool) -> None:
    problem = case_problem(case)
    arguments = operator_arguments(problem, requires_grad=requires_grad)
    torch.library.opcheck(OPS.latent_attention.default, (*arguments, problem.causal, problem.scale))


@CASE
def test_opcheck_backward(case: str) -> None:
    problem = case_problem(case)
    arguments = operator_arguments(problem, requires_grad=False)
    cotangents = (problem.dy, problem.d_norm, problem.d_mean)
    torch.library.opcheck(
        OPS.latent_attention_backward.default,
        (*arguments, *cotangents, problem.causal, problem.scale),
    )


@pytest.mark.parametrize("case", ["state", "grouped", "bfloat16", "float64"])
def test_opcheck_step(case: str) -> None:
    problem = case_problem(case)
    state = make_state(problem)
    rows = (x[:, :, 0] for x in (problem.q, problem.k, problem.v))
    torch.library.opcheck(OPS.latent_attention_step.default, (*rows, *state, problem.scale))


def test_opcheck_merge() -> None:
    state = make_state(case_problem("state"))
    torch.library.opcheck(OPS.state_merge.default, (*state, *state))


def make_state(problem: Problem) -> LatentState:
    """A state that fits the problem, of a few tokens."""
    _, state = library_attention(problem.q, problem.k, problem.v)
    return state


def test_every_operator_is_checked() -> None:
    forward_and_backward = {
        "latent_attention",
        "sliding_window_attention",  # test_window.py
        "macchiato_attention",
        "linear_recurrence",  # test_mixers_torch.py
        "rg_lru",
        "short_conv",
    }
    names = forward_and_backward | {f"{name}_backward" for name in forward_and_backward}
    names |= {f"{name}_step" for name in forward_and_backward - {"linear_recurrence"}}
    names |= {"rotate", "state_merge"}  # rotate in test_rotary.py
    assert {name.removeprefix("latte_ext::") for name in registered_operators()} == names


def registered_operators() -> set[str]:
    schemas = torch._C._jit_get_all_schemas()
    return {schema.name for schema in schemas if schema.name.startswith("latte_ext::")}


# Fake tensors ------------------------------------------------------------------------------------


@pytest.mark.supports("meta tensors", "latent_attention")
@CASE
def test_meta_tensors(case: str) -> None:
    """Shapes and dtypes without memory, forward and backward."""
    problem = case_problem(case)
    real = solve(problem)
    meta = problem.map(lambda x: x.to("meta"))
    for name in ("key_mask", "cu_seqlens"):
        value = getattr(problem, name)
        setattr(meta, name, None if value is None else value.to("meta"))
    for (name, got), (_, want) in zip(solve(meta).named(), real.named(), strict=True):
        assert got.device.type == "meta", name
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        assert got.stride() == want.stride(), name


# torch.compile -----------------------------------------------------------------------------------


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)


@pytest.mark.supports("compile: forward and backward, fullgraph", "latent_attention")
@CASE
def test_compile(case: str) -> None:
    """The same results as eager, forward and backward."""
    problem = case_problem(case)
    assert_identical(solve(problem, compiled(library_attention)), solve(problem))  # type: ignore[arg-type]


def test_compile_dynamic_shapes() -> None:
    """One graph for all sizes; no two of a call are equal, as torch would make them one symbol."""
    function = compiled(library_attention)
    stance = "default"
    for batch, tokens, latents, dim in ((3, 11, 5, 6), (5, 17, 7, 8), (6, 64, 9, 7)):
        problem = make_problem(latents, dim, tokens, batch=batch, heads=4, kv_heads=2)
        with torch.compiler.set_stance(stance):
            assert_identical(solve(problem, function), solve(problem))  # type: ignore[arg-type]
        stance = "fail_on_recompile"


def test_compile_a_block() -> None:
    """Among other operations, with a state that comes from outside and goes back."""
    problem = make_problem(3, 4, 9, initial_state=True)

    def block(x: Tensor, state: LatentState) -> tuple[Tensor, LatentState]:
        y, state = latent_attention(x.sin(), x.cos(), 2 * x, state=state, return_state=True)
        return y.relu() + x, state

    x = torch.randn(2, 2, 9, 3)
    _, norm, mean = problem.state or ()
    carried = (norm.requires_grad_(), mean[..., :3].clone().requires_grad_())
    state = LatentState(problem.state[0], *carried)  # type: ignore[index]

    def run(function: Callable[..., tuple[Tensor, LatentState]]) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        y, final = function(leaf, state)
        loss = y.sum() + final.mean.sin().sum() + final.norm.sum()
        return y, *final, *torch.autograd.grad(loss, (leaf, *carried))

    for got, want in zip(run(compiled(block)), run(block), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(got, want)


def test_compile_step() -> None:
    """The state is updated in place inside a graph as well."""
    problem = make_problem(3, 4, 9, initial_state=True)
    state = LatentState(*(x.clone() for x in problem.state or ()))
    eager = state.clone()
    function = compiled(lambda *args: latent_attention_step(*args).sin())
    for t in range(4):
        rows = [x[:, :, t] for x in (problem.q, problem.k, problem.v)]
        assert torch.equal(function(*rows, state), latent_attention_step(*rows, eager).sin())
    assert all(map(torch.equal, state, eager))


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    problem = make_problem(5, 6, 40, initial_state=True)
    function = torch.compile(library_attention, fullgraph=True)
    assert_identical(solve(problem, function), solve(problem))


# torch.export ------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, state: LatentState
    ) -> tuple[Tensor, LatentState]:
        y, state = latent_attention(q, k, v, state=state, return_state=True)
        return 2 * y, state


@needs_torch("torch.export wants a state's class registered in a second place")
@pytest.mark.supports("export, save and load, dynamic sizes", "latent_attention")
def test_export() -> None:
    """With dynamic dimensions and a state as input and output; saved, loaded and run."""
    problem = make_problem(3, 4, 9, initial_state=True)
    arguments = (problem.q, problem.k, problem.v, LatentState(*problem.state or ()))
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    token_wise, fixed = {0: batch, 2: tokens}, {0: batch}
    program = torch.export.export(
        Model(), arguments, dynamic_shapes=(token_wise, token_wise, token_wise, [fixed] * 3)
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    other = make_problem(3, 4, 70, batch=5, initial_state=True)
    inputs = (other.q, other.k, other.v, LatentState(*other.state or ()))
    got, want = loaded(*inputs), Model()(*inputs)
    assert isinstance(got[1], LatentState)
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))


# checkpoint, autocast ----------------------------------------------------------------------------


@pytest.mark.supports("activation checkpointing", "latent_attention")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    problem = make_problem(5, 6, 70, initial_state=True)

    def attention(
        *args: Tensor, state: LatentState, **options: object
    ) -> tuple[Tensor, LatentState]:
        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            y, final = library_attention(*tensors[:3], state=LatentState(*tensors[3:]), **options)
            return y, *final

        y, *final = checkpoint(function, *args, *state, use_reentrant=use_reentrant)
        return y, LatentState(*final)

    if use_reentrant:  # knows backward() only
        leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
        y, _ = attention(
            *leaves,
            state=LatentState(*problem.state or ()),
            causal=True,
        )
        y.backward(problem.dy)
        again = [x.detach().clone().requires_grad_() for x in leaves]
        latent_attention(*again, state=LatentState(*problem.state or ())).backward(problem.dy)
        for got, want in zip(leaves, again, strict=True):
            assert got.grad is not None
            assert torch.equal(got.grad, want.grad)  # type: ignore[arg-type]
    else:
        assert_identical(solve(problem, attention), solve(problem))


def test_autocast() -> None:
    """Takes what autocast layers give, mixes dtypes, keeps the state in float32."""
    linear = torch.nn.Linear(6, 4)
    problem = make_problem(5, 6, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = linear(problem.v)
        assert v.dtype == torch.bfloat16
        y, state = latent_attention(problem.q, problem.k, v, return_state=True)
    assert y.dtype == torch.bfloat16
    assert state.mean.dtype == torch.float32
    expected = latent_attention(problem.q, problem.k, v)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype == torch.float32
    assert linear.weight.grad.abs().sum() > 0


@pytest.mark.supports("autocast (CPU)", "latent_attention")
def test_autocast_of_float32_inputs() -> None:
    """Nothing is rounded to half precision that did not come in half precision."""
    problem = make_problem(5, 6, 40)

    def attention(*args: Tensor, **options: object) -> tuple[Tensor, LatentState]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return library_attention(*args, **options)

    assert_identical(solve(problem, attention), solve(problem))


# Forward mode (test_derivatives.py has all other derivatives) -------------------------------------


def tensors(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.q, problem.k, problem.v


def test_forward_mode_through_a_step_raises() -> None:
    """A tangent is not dropped silently."""
    problem = make_problem(3, 4, 9)
    q, k, v = (x[:, :, 0] for x in tensors(problem))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError, match=r"\[latent_attention_step\] got q that carries"):
            latent_attention_step(dual, k, v, LatentState.empty(2, 2, 3, 4))


# Grad modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "norm", "mean"])
def test_step_with_requires_grad_raises(name: str) -> None:
    problem = make_problem(3, 4, 9, initial_state=True)
    maximum, norm, mean = problem.state or ()
    arguments = {"q": problem.q[:, :, 0], "k": problem.k[:, :, 0], "v": problem.v[:, :, 0]}
    arguments |= {"norm": norm, "mean": mean}
    arguments[name].requires_grad_()
    rows = (arguments["q"], arguments["k"], arguments["v"])
    state = LatentState(maximum, arguments["norm"], arguments["mean"])
    with pytest.raises(
        RuntimeError, match=rf"\[latent_attention_step\] got {name} that requires grad, expected"
    ):
        latent_attention_step(*rows, state)
    with torch.no_grad():
        assert not latent_attention_step(*rows, state).requires_grad


def test_inference_mode() -> None:
    problem = make_problem(3, 4, 9)
    leaves = [x.requires_grad_() for x in tensors(problem)]
    expected, state = latent_attention(*leaves, return_state=True)
    with torch.inference_mode():
        y, final = latent_attention(*leaves, return_state=True)
        assert y.is_inference()
        assert torch.equal(y, expected)
        row = latent_attention_step(*(x[:, :, 0] for x in leaves), final)
    expected_row = torch.no_grad()(latent_attention_step)(
        *(x[:, :, 0] for x in leaves), state.detach()
    )
    assert torch.equal(row, expected_row)


def test_no_graph_without_need() -> None:
    problem = make_problem(3, 4, 9)
    y, state = latent_attention(*tensors(problem), return_state=True)
    assert not any(x.requires_grad for x in (y, *state))
    problem.q.requires_grad_()
    with torch.no_grad():
        assert latent_attention(*tensors(problem)).grad_fn is None
    assert latent_attention(*tensors(problem)).grad_fn is not None


def test_views_with_pending_operations() -> None:
    """Lazy negation, as `.imag` of a conjugate gives it, is resolved first."""
    problem = make_problem(3, 4, 9)
    k = torch.complex(problem.k, -problem.k).conj().imag
    assert k.is_neg()
    assert torch.equal(
        latent_attention(problem.q, k, problem.v), latent_attention(problem.q, problem.k, problem.v)
    )


def test_parameter_and_subclass_inputs() -> None:
    problem = make_problem(3, 4, 9)
    q = torch.nn.Parameter(problem.q)
    latent_attention(q, problem.k, problem.v).sum().backward()
    assert q.grad is not None


def test_anomaly_mode() -> None:
    problem = make_problem(3, 4, 9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        with torch.autograd.detect_anomaly():
            solve(problem)


# Processes and threads ---------------------------------------------------------------------------


# In a build with CUDA autograd has threads for devices, without which no child can go backward.
FORWARD_ONLY = torch.backends.cuda.is_built()


def solve_in_child(problem: Problem, count: int, answer: Connection) -> None:
    torch.set_num_threads(count)
    if FORWARD_ONLY:
        results = {"y": latent_attention(problem.q, problem.k, problem.v)}
    else:
        results = dict(solve(problem).named())
    # As numbers: sharing a tensor's memory would need the child to stay alive.
    answer.send({name: x.tolist() for name, x in results.items()})


@pytest.mark.supports("forked processes", "latent_attention")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_process(count: int) -> None:
    """After the parent has used its thread pool: data loaders and servers fork."""
    problem = make_problem(16, 16, 200, batch=4)
    expected = solve(problem)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=solve_in_child, args=(problem, count, sender))
    child.start()
    sender.close()
    answered = receiver.poll(20)
    if not answered:
        child.kill()
        child.join()
        pytest.fail("the forked process hangs")
    values = receiver.recv()
    child.join(20)
    assert child.exitcode == 0
    assert set(values) == ({"y"} if FORWARD_ONLY else {name for name, _ in expected.named()})
    for name, want in expected.named():
        if name in values:
            assert torch.equal(torch.tensor(values[name], dtype=want.dtype), want), name


def test_eight_python_threads() -> None:
    """At once, each with problems of its own; every second one runs OpenMP threads too."""
    problems = [
        make_problem(9 + i, 7, 100 + 40 * i, causal=i % 3 > 0, heads=1 + i % 2, seed=i)
        for i in range(8)
    ]
    expected = [solve_reference(problem) for problem in problems]

    def work(i: int) -> None:
        with threads(1 + i % 2):
            first = solve(problems[i])
            for _ in range(5):
                assert_identical(solve(problems[i]), first)
        assert_same_solution(first, expected[i], problems[i])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_threads_share_read_only_inputs() -> None:
    problem = make_problem(16, 16, 300, batch=2)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        solutions = list(pool.map(solve, [problem] * 16))
    for solution in solutions[1:]:
        assert_identical(solution, solutions[0])


# Large offsets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_state_offsets_beyond_32_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """A step on rows and a state whose sequences lie 2**31 elements apart in a sparse file."""
    step = 2**31 + 3
    sizes = {torch.bfloat16: 2 * step, torch.float32: 2 * step}
    bases: dict[torch.dtype, Tensor] = {}
    used = dict.fromkeys(sizes, 0)

    def far(x: Tensor) -> Tensor:
        if x.dtype not in bases:
            path = f"{tmp_path}/{len(bases)}"
            bases[x.dtype] = torch.from_file(path, shared=True, size=sizes[x.dtype], dtype=x.dtype)
        inner = torch.empty_like(x[0]).stride()
        view = bases[x.dtype].as_strided(x.shape, (step, *inner), used[x.dtype])
        used[x.dtype] += x[0].numel()
        return view.copy_(x)

    problem = make_problem(3, 4, 1, dtype=dtype, initial_state=True)
    rows = [far(x[:, :, 0]) for x in tensors(problem)]
    state = LatentState(*map(far, problem.state or ()))
    expected_state = LatentState(*problem.state or ())
    expected = latent_attention_step(*(x[:, :, 0] for x in tensors(problem)), expected_state)
    assert torch.equal(latent_attention_step(*rows, state), expected)
    assert all(map(torch.equal, state, expected_state))
