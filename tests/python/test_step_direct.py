# SPDX-License-Identifier: Apache-2.0
"""When a call may skip the dispatcher, and that nobody can tell."""

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import latte_ext
import pytest
import torch
from helpers import DTYPES, make_problem, time_major
from latte_ext import (
    LatentState,
    _macchiato_ops,
    _mixer_ops,
    _ops,
    _rotary_ops,
    _window_ops,
    latent_attention_step,
    rotary,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

NAMES = ("q", "k", "v", "max", "norm", "mean")


def make_arguments(**options: object) -> dict[str, Tensor]:
    problem = make_problem(3, 4, 1, initial_state=True, **options)  # type: ignore[arg-type]
    rows = (x[:, :, 0] for x in (problem.q, problem.k, problem.v))
    return dict(zip(NAMES, (*rows, *(problem.state or ())), strict=True))


def step(q: Tensor, k: Tensor, v: Tensor, *state: Tensor, scale: float = 1.0) -> Tensor:
    return latent_attention_step(q, k, v, LatentState(*state), scale=scale)


def copies(arguments: dict[str, Tensor]) -> list[Tensor]:
    """With the same strides."""
    return [torch.empty_like(x).copy_(x) for x in arguments.values()]


@pytest.fixture
def operator_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    calls = []
    operator = _ops.latent_attention_step

    def record(*args: object) -> object:
        calls.append(args)
        return operator(*args)

    monkeypatch.setattr(_ops, "latent_attention_step", record)
    return calls


# Taken -------------------------------------------------------------------------------------------


GRAD_MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": time_major,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", GRAD_MODES)
def test_same_as_the_operator(
    mode: str, dtype: torch.dtype, layout: str, operator_calls: list[tuple[object, ...]]
) -> None:
    """To the bit, and in everything that a tensor shows."""
    arguments = make_arguments(dtype=dtype, heads=4, kv_heads=2)
    arguments = {name: LAYOUTS[layout](x) for name, x in arguments.items()}
    direct, dispatched = copies(arguments), copies(arguments)
    with GRAD_MODES[mode]():
        y = step(*direct, scale=0.5)
        assert not operator_calls
        want = _ops.latent_attention_step(*dispatched, 0.5)
    assert torch.equal(y, want)
    assert y.stride() == want.stride()
    assert (y.dtype, y.requires_grad) == (want.dtype, want.requires_grad)
    assert y.is_inference() == want.is_inference()
    assert all(map(torch.equal, direct, dispatched))
    assert [x._version for x in direct] == [x._version for x in dispatched]


def test_inputs_that_require_grad_without_grad_mode(
    operator_calls: list[tuple[object, ...]],
) -> None:
    arguments = [x.requires_grad_() for x in make_arguments().values()]
    with torch.no_grad():
        y = step(*arguments)
    assert not operator_calls
    assert not y.requires_grad


@pytest.mark.parametrize("name", ["max", "norm", "mean"])
def test_backward_through_the_state_before_raises(
    name: str, operator_calls: list[tuple[object, ...]]
) -> None:
    arguments = make_arguments()
    weight = torch.ones_like(arguments[name]).requires_grad_()
    loss = (weight * arguments[name]).sum()
    step(*arguments.values())
    assert not operator_calls
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_of_inference_and_other_tensors(operator_calls: list[tuple[object, ...]]) -> None:
    arguments = make_arguments()
    with torch.inference_mode():
        arguments["norm"] = arguments["norm"].clone()
        step(*arguments.values())
    assert not operator_calls
    assert (arguments["max"]._version, arguments["mean"]._version) == (1, 1)


# Not taken ---------------------------------------------------------------------------------------


class LoggingMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class LoggingFunctionMode(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("probe", ["_len_torch_dispatch_stack", "_get_tracing_state"])
def test_torch_without_a_probe(probe: str) -> None:
    """What is private to torch may go: then the operator answers."""
    script = (
        "import torch\n"
        "from latte_ext import _core, LatentState, latent_attention_step\n"
        f"del torch._C.{probe}\n"
        "x, state = torch.zeros(1, 1, 1), LatentState.empty(1, 1, 1, 1)\n"
        "assert _core.latent_attention_step_direct(x, x, x, *state, 1.0, True) is None\n"
        "assert latent_attention_step(x, x, x, state).shape == (1, 1, 1)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("mode", [LoggingMode, LoggingFunctionMode])
def test_modes_see_the_operator(mode: type[LoggingMode | LoggingFunctionMode]) -> None:
    arguments = make_arguments()
    with torch.inference_mode(), mode() as active:
        step(*arguments.values())
    assert "latte_ext.latent_attention_step.default" in active.seen


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "flop_counter": lambda: FlopCounterMode(display=False),
    "default_device": lambda: torch.device("cpu"),
    "dual_level": forward_ad.dual_level,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_see_the_operator(context: str, operator_calls: list[tuple[object, ...]]) -> None:
    arguments = make_arguments()
    with torch.no_grad(), CONTEXTS[context]():
        step(*arguments.values())
    assert len(operator_calls) == 1


@pytest.mark.parametrize("profile", [torch.profiler.profile, torch.autograd.profiler.profile])
def test_profilers_see_the_operator(profile: Callable[[], torch.autograd.profiler.profile]) -> None:
    arguments = make_arguments()
    with torch.inference_mode(), profile() as profiler:
        step(*arguments.values())
    assert "latte_ext::latent_attention_step" in {x.key for x in profiler.key_averages()}


class Logged(Tensor):
    seen: list[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is _ops.latent_attention_step:
            cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_see_the_operator(name: str) -> None:
    Logged.seen = []
    arguments = make_arguments()
    arguments[name] = arguments[name].as_subclass(Logged)
    with torch.no_grad():
        step(*arguments.values())
    assert Logged.seen == ["latte_ext.latent_attention_step.default"]


def test_fake_tensors() -> None:
    with FakeTensorMode():
        arguments = [torch.empty(x.shape) for x in make_arguments().values()]
        y = step(*arguments)
    assert (y.shape, y.device.type) == ((2, 2, 4), "cpu")
    assert isinstance(y, torch._subclasses.FakeTensor)
    step(*arguments)  # outside of the mode


def test_meta_tensors() -> None:
    y = step(*(x.to("meta") for x in make_arguments().values()))
    assert (y.shape, y.device.type) == ((2, 2, 4), "meta")


def test_traces_contain_the_operator() -> None:
    arguments = list(make_arguments().values())
    graph = make_fx(step)(*arguments).graph
    assert torch.ops.latte_ext.latent_attention_step.default in {x.target for x in graph.nodes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(step, tuple(arguments), check_trace=False)
    assert "latte_ext::latent_attention_step" in str(traced.graph)


def test_compiled_graphs_contain_the_operator() -> None:
    targets = []

    def backend(module: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        targets.extend(node.target for node in module.graph.nodes)
        return module.forward

    compiled, eager = copies(make_arguments()), copies(make_arguments())
    state = LatentState(*compiled[3:])
    function = torch.compile(latent_attention_step, fullgraph=True, backend=backend)
    with torch.inference_mode():
        y = function(*compiled[:3], state)
    torch.compiler.reset()
    assert torch.ops.latte_ext.latent_attention_step.default in targets
    assert torch.equal(y, step(*eager))
    assert all(map(torch.equal, compiled, eager))


@pytest.mark.parametrize("transform", ["vmap", "functionalize"])
def test_transforms_reach_the_operator(
    transform: str, operator_calls: list[tuple[object, ...]]
) -> None:
    arguments = list(make_arguments().values())
    if transform == "vmap":
        arguments = [x.unsqueeze(0) for x in arguments]
    with contextlib.suppress(RuntimeError):
        getattr(torch.func, transform)(step)(*arguments)
    assert len(operator_calls) == 1


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_lazy_negation_is_resolved(name: str, operator_calls: list[tuple[object, ...]]) -> None:
    plain, negated = make_arguments(), make_arguments()
    negated[name] = torch._neg_view(-negated[name])
    with torch.inference_mode():
        y = step(*negated.values())
    assert len(operator_calls) == 1
    assert torch.equal(y, step(*plain.values()))


@pytest.mark.parametrize("name", ["max", "norm", "mean"])
def test_lazily_negated_state_reaches_the_operator(
    name: str, operator_calls: list[tuple[object, ...]]
) -> None:
    arguments = make_arguments()
    arguments[name] = torch._neg_view(arguments[name])
    with torch.inference_mode(), contextlib.suppress(RuntimeError):  # torch refuses to write there
        step(*arguments.values())
    assert len(operator_calls) == 1


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tensors_without_memory_reach_the_operator(
    name: str, operator_calls: list[tuple[object, ...]]
) -> None:
    plain, zero = make_arguments(), make_arguments()
    plain[name].zero_()
    zero[name] = torch._efficientzerotensor(zero[name].shape)
    assert torch.equal(step(*zero.values()), step(*plain.values()))
    assert len(operator_calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_operator(name: str, operator_calls: list[tuple[object, ...]]) -> None:
    arguments = make_arguments()
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=rf"\[latent_attention_step\] got {name} that requires"):
        step(*arguments.values())
    assert len(operator_calls) == 1


# Every function -----------------------------------------------------------------------------------


def of_every_function() -> dict[str, Callable[[], object]]:
    """A call of each public function, and with its options where they change the way."""
    x, row, weight = torch.randn(2, 2, 9, 4), torch.randn(2, 4), torch.randn(4, 4)
    tokens, head, decay = torch.randn(2, 9, 4), torch.randn(2, 2, 4), torch.zeros(4)
    state, cache = LatentState.empty(2, 2, 4, 4), latte_ext.WindowCache.empty(2, 2, 3, 4, 4)
    logits, one = torch.randn(2, 2, 9, 5), torch.randn(2, 2, 5)
    both = latte_ext.MacchiatoState(state.clone(), cache.clone())
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    hidden, tail = torch.zeros(2, 4), torch.zeros(2, 3, 4)
    return {
        "latent_attention": lambda: latte_ext.latent_attention(x, x, x),
        "latent_attention, state": lambda: latte_ext.latent_attention(
            x, x, x, state=state, return_state=True
        ),
        "latent_attention_step": lambda: latent_attention_step(head, head, head, state.clone()),
        "linear_recurrence": lambda: latte_ext.linear_recurrence(tokens, tokens),
        "rg_lru": lambda: latte_ext.rg_lru(tokens, tokens, tokens, decay, return_state=True),
        "rg_lru_step": lambda: latte_ext.rg_lru_step(row, row, row, decay, hidden.clone()),
        "short_conv": lambda: latte_ext.short_conv(tokens, parameter, return_state=True),
        "short_conv, centred": lambda: latte_ext.short_conv(tokens, weight, causal=False),
        "short_conv_step": lambda: latte_ext.short_conv_step(row, parameter, None, tail.clone()),
        "sliding_window_attention": lambda: latte_ext.sliding_window_attention(x, x, x, window=3),
        "sliding_window_attention, cache": lambda: latte_ext.sliding_window_attention(
            x, x, x, window=3, cache=cache, return_cache=True
        ),
        "sliding_window_attention_step": lambda: latte_ext.sliding_window_attention_step(
            head, head, head, cache.clone()
        ),
        "macchiato_attention": lambda: latte_ext.macchiato_attention(logits, x, x, x, x, window=3),
        "macchiato_attention_step": lambda: latte_ext.macchiato_attention_step(
            one, head, head, head, head, both.clone()
        ),
        "rotate": lambda: rotary.rotate(x, torch.arange(9)),
    }


class Operators(TorchDispatchMode):
    """Counts operators of this package."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += func.namespace == "latte_ext"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference"])
@pytest.mark.parametrize("name", of_every_function())
def test_every_function_as_its_operator(name: str, mode: str) -> None:
    """Direct and dispatched calls agree to the bit; a mode sees the operator."""
    call = of_every_function()[name]
    with GRAD_MODES[mode]():
        direct = call()
        with Operators() as seen:
            dispatched = call()
    assert seen.calls == 1
    for got, want in zip(*map(pytree.tree_leaves, (direct, dispatched)), strict=True):
        assert torch.equal(got, want)
        assert (got.stride(), got.requires_grad) == (want.stride(), want.requires_grad)
        assert got.is_inference() == want.is_inference()


@pytest.mark.parametrize("name", of_every_function())
def test_every_function_without_its_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = of_every_function()[name]
    want = call()

    def refuse(*args: object) -> object:
        raise AssertionError("the dispatcher was asked")

    operator = name.partition(",")[0]
    for module in (_ops, _mixer_ops, _window_ops, _macchiato_ops, _rotary_ops):
        if hasattr(module, operator):
            monkeypatch.setattr(module, operator, refuse)
    for x, y in zip(*map(pytree.tree_leaves, (call(), want)), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(AssertionError, match="dispatcher was asked"), Operators():
        call()


def arguments_of_every_function() -> dict[str, tuple[Callable[..., object], dict[str, object]]]:
    x, latent = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 4)
    keys, values = torch.randn(2, 2, 5, 3), torch.randn(2, 2, 5, 6)
    tokens, decay, hidden = torch.randn(2, 5, 4), torch.zeros(4), torch.zeros(2, 4)
    mask, tail = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 2, 4)
    heads = {"q": x, "k": keys, "v": values}
    row = {name: y[:, :, 0] for name, y in heads.items()}
    masked = {**heads, "key_mask": mask}
    gates = {"x": tokens, "gate_a": tokens, "gate_x": tokens, "log_lambda": decay}
    gate_row = {name: y[:, 0] if y.dim() == 3 else y for name, y in gates.items()}
    weight = torch.randn(4, 3)

    def on_state(q: Tensor, k: Tensor, v: Tensor, *state: Tensor) -> object:
        return latent_attention_step(q, k, v, LatentState(*state)), state

    def on_ring(q: Tensor, k: Tensor, v: Tensor, *ring: Tensor) -> object:
        return latte_ext.sliding_window_attention_step(q, k, v, latte_ext.WindowCache(*ring)), ring

    state = dict(zip(NAMES[3:], LatentState.empty(2, 2, 3, 6).tensors(), strict=True))
    ring = latte_ext.WindowCache.empty(2, 2, 3, 3, 6).tensors()
    cache = dict(zip(("key", "value", "valid", "position"), ring, strict=True))
    gated = {"q_latent": latent, "k_latent": keys, "v_latent": values, **masked, "window": 3}
    return {
        "latent_attention": (latte_ext.latent_attention, {**masked, "return_state": True}),
        "latent_attention_step": (lambda **a: on_state(*a.values()), {**row, **state}),
        "sliding_window_attention": (latte_ext.sliding_window_attention, {**masked, "window": 3}),
        "sliding_window_attention_step": (lambda **a: on_ring(*a.values()), {**row, **cache}),
        "macchiato_attention": (latte_ext.macchiato_attention, {**gated, "v_latent": None}),
        "macchiato_attention, v_latent": (latte_ext.macchiato_attention, gated),
        "linear_recurrence": (
            latte_ext.linear_recurrence,
            {"a": tokens, "b": tokens, "h0": hidden, "return_state": True},
        ),
        "rg_lru": (
            latte_ext.rg_lru, {**gates, "h0": hidden, "key_mask": mask, "return_state": True},
        ),
        "rg_lru_step": (latte_ext.rg_lru_step, {**gate_row, "state": hidden}),
        "short_conv": (
            latte_ext.short_conv,
            {"x": tokens, "weight": weight, "bias": decay, "state": tail, "return_state": True},
        ),
        "short_conv_step": (
            latte_ext.short_conv_step,
            {"x": tokens[:, 0], "weight": weight, "bias": decay, "state": tail},
        ),
        "rotate": (rotary.rotate, {"x": x, "position": torch.arange(5)}),
    }  # fmt: skip


def altered(value: object) -> Iterator[object]:
    yield from (value, None, 2)
    if not isinstance(value, Tensor):
        yield from (0, -1, 2**63, float("nan"), "3")
        return
    yield from (value[0], value[None], value.to(torch.bfloat16), value.to(torch.float64))
    yield from (value.int(), value.bool(), value.tolist(), value.to("meta"))
    for dim, size in enumerate(value.shape):
        longer = torch.cat([value, value], dim)
        yield from (longer.narrow(dim, 0, n) for n in {0, 1, size - 1, size + 1, 2 * size})


def outcome(call: Callable[..., object], arguments: dict[str, object]) -> object:
    fresh = {n: x.clone() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    try:
        result = call(**fresh)
    except Exception as error:
        return type(error)
    leaves = pytree.tree_leaves((result, fresh))
    return [x if x.is_meta else (x.dtype, x.tolist()) for x in leaves if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", arguments_of_every_function())
def test_altered_arguments_meet_the_same_checks(name: str) -> None:
    """What goes around the dispatcher refuses no less and returns nothing else."""
    call, arguments = arguments_of_every_function()[name]
    refused = 0
    for key, value in arguments.items():
        for other in altered(value):
            changed = arguments | {key: other}
            with torch.no_grad():
                direct = outcome(call, changed)
                with Operators():
                    dispatched = outcome(call, changed)
            refused += isinstance(direct, type)
            assert repr(direct) == repr(dispatched), (key, other)
    assert refused > 5 * len(arguments) / 2


# Reading tensors ---------------------------------------------------------------------------------


def test_torch_without_the_exchange_api() -> None:
    """torch before 2.10: everything as documented, through attributes and the operator."""
    script = (
        "import sys, torch, pytest\n"
        "torch.Tensor.__dlpack_c_exchange_api__ = None\n"
        "from latte_ext import _core\n"
        "x = torch.zeros(1, 1, 1)\n"
        "state = x.clone(), x.clone(), x[..., None].clone()\n"
        "assert _core.latent_attention_step_direct(x, x, x, *state, 1.0, True) is None\n"
        "sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    here = Path(__file__).parent
    files = [here / name for name in ("test_step.py", "test_bad_input.py")]
    result = subprocess.run(
        [sys.executable, "-c", script, "-q", "-p", "no:cacheprovider", *map(str, files)],
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
