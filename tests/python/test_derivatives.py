# SPDX-License-Identifier: Apache-2.0
"""Second derivatives, forward mode and torch.func: against finite differences and the reference."""

from collections.abc import Callable, Sequence
from typing import Any

import latte_ext
import pytest
import torch
from helpers import OLD_TORCH, make_problem, random_mask
from latte_ext import _compositions, latent_attention
from mixer_helpers import library, make_call
from torch import Tensor, func
from torch.autograd import forward_ad, gradcheck, gradgradcheck

OPS = torch.ops.latte_ext
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "state": {"initial_state": True},
    "bidirectional": {"causal": False},
    "mask": {"key_mask": random_mask(2, 7)},
    "bidirectional_mask": {"causal": False, "key_mask": random_mask(2, 7)},
    "packed": {"lengths": (2, 0, 5), "initial_state": True},
    "bidirectional_packed": {"lengths": (2, 0, 5), "causal": False},
    "one_sequence_packed": {"lengths": (7,)},
    "grouped": {"heads": 4, "kv_heads": 2, "scale": 0.5, "batch": 1, "tokens": 5},
    "steep": {"spread": 400.0, "initial_state": True, "batch": 1},
    "no_tokens": {"tokens": 0, "initial_state": True},
}
CASE = pytest.mark.parametrize("case", OPTIONS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few tokens are several chunks, the last one of them not full."""
    monkeypatch.setattr(_compositions, "CHUNK", 3)


Function = Callable[..., tuple[Tensor, ...]]


def attention_case(case: str) -> tuple[Function, list[Tensor], Function]:
    """A function of its differentiable inputs, those, and the reference of the function."""
    options = {"batch": 2, "heads": 1, "dtype": torch.float64} | OPTIONS[case]
    problem = make_problem(2, 2, options.pop("tokens", 7), **options)
    inputs = [problem.q, problem.k, problem.v]
    if problem.state is not None:
        inputs += problem.state[1:]

    def function(*x: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        state = None
        if problem.state is not None:
            state = latte_ext.LatentState(problem.state[0], *x[3:])
        y, final = latent_attention(
            *x[:3], causal=problem.causal, scale=problem.scale, key_mask=problem.key_mask,
            cu_seqlens=problem.cu_seqlens, state=state, return_state=True, backend=backend,
        )  # type: ignore[call-overload]  # fmt: skip
        # norm alone counts from max, a constant that is none of finite differences.
        return y, final.lse.nan_to_num(neginf=0.0), final.mean

    return function, inputs, lambda *x: function(*x, backend="reference")


MIXERS: dict[str, dict[str, Any]] = {
    "linear_recurrence": {},
    "linear_recurrence_state": {"state": True},
    "linear_recurrence_reverse": {"state": True, "reverse": True},
    "linear_recurrence_packed": {"state": True, "lengths": (2, 0, 3)},
    "linear_recurrence_packed_reverse": {"state": True, "lengths": (2, 0, 3), "reverse": True},
    "linear_recurrence_no_tokens": {"state": True, "tokens": 0},
    "short_conv": {"state": True},
    "short_conv_centred": {"causal": False, "bias": False},
    "short_conv_packed": {"state": True, "lengths": (2, 0, 6)},
    "rg_lru": {"state": True},
    "rg_lru_packed": {"lengths": (2, 0, 3)},
    "rg_lru_masked_reverse": {"masked": True, "reverse": True},
}


def mixer_case(case: str) -> tuple[Function, list[Tensor], Function]:
    op = next(op for op in ("linear_recurrence", "rg_lru", "short_conv") if case.startswith(op))
    call = make_call(op, dtype=torch.float64, channels=2, **{"tokens": 5} | MIXERS[case])
    names = list(call.inputs)

    def function(*x: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        return tuple(library(call, dict(zip(names, x, strict=True)), backend))

    return function, list(call.inputs.values()), lambda *x: function(*x, backend="reference")


CASES = [*OPTIONS, *MIXERS]
# Whose gradient has no forward mode.
BACKWARD_ONLY = [case for case in CASES if case.startswith("rg_lru")]
FORWARD_OVER_REVERSE = [case for case in CASES if case not in BACKWARD_ONLY]


def make_case(case: str) -> tuple[Function, list[Tensor], Function]:
    if OLD_TORCH and "packed" in case:
        pytest.skip("torch 2.6 cannot read borders within a transform")
    return attention_case(case) if case in OPTIONS else mixer_case(case)


@pytest.mark.supports("double backward")
@pytest.mark.supports("forward mode")
@pytest.mark.parametrize("case", [case for case in CASES if case != "steep"])
def test_forward_mode_and_double_backward(case: str) -> None:
    function, inputs, _ = make_case(case)
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    # fast_mode has no forward mode here: `test_transforms` proves forward over reverse.
    assert gradgradcheck(function, leaves, fast_mode=True)


def directional(function: Function, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    """A scalar that is not linear in any output."""
    torch.manual_seed(3)
    weights = [torch.randn_like(y) for y in function(*inputs)]

    def loss(*x: Tensor) -> Tensor:
        outputs = function(*x)
        return sum(  # type: ignore[return-value]
            ((y * w).sin().sum() for y, w in zip(outputs, weights, strict=True)),
            start=torch.zeros(()),
        )

    return loss


def tangents(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x.detach().nan_to_num(neginf=0.0).cos() for x in inputs)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, n: func.grad(f, n),
    "grad of grad": lambda f, n: func.grad(
        lambda *x: sum(g.sin().sum() for g in func.grad(f, n)(*x)), n
    ),
    "reverse over forward": lambda f, n: func.grad(lambda *x: func.jvp(f, x, tangents(x))[1], n),
    "forward over reverse": lambda f, n: lambda *x: func.jvp(func.grad(f, n), x, tangents(x))[1],
}


def supported(transform: str) -> Any:
    return pytest.param(transform, marks=pytest.mark.supports(f"torch.func: {transform}"))


@pytest.mark.parametrize("transform", [supported(name) for name in TRANSFORMS])
@pytest.mark.parametrize("case", CASES)
def test_transforms(case: str, transform: str) -> None:
    """The compiled operators and the reference agree on every derivative."""
    function, inputs, reference = make_case(case)
    names = tuple(range(len(inputs)))
    got = TRANSFORMS[transform](directional(function, inputs), names)
    want = TRANSFORMS[transform](directional(reference, inputs), names)
    if transform == "forward over reverse" and case in BACKWARD_ONLY:
        with pytest.raises(RuntimeError, match=r"\[rg_lru_backward\] got a forward-mode tangent"):
            got(*inputs)
        return
    for i, (x, y) in enumerate(zip(got(*inputs), want(*inputs), strict=True)):
        torch.testing.assert_close(
            x, y, rtol=1e-9, atol=1e-11, msg=lambda m, i=i: f"input {i}: {m}"
        )


# Compositions ------------------------------------------------------------------------------------


@CASE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_compositions_are_the_operators(case: str, dtype: torch.dtype) -> None:
    options = {"batch": 2, "heads": 2, "dtype": dtype} | OPTIONS[case]
    problem = make_problem(3, 4, options.pop("tokens", 7), **options)
    state = problem.state or (None,) * 3
    forward = (problem.q, problem.k, problem.v, problem.key_mask, problem.cu_seqlens, *state)
    options = (problem.causal, problem.scale)
    backward = (*forward, problem.dy, problem.d_norm, problem.d_mean, *options)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for operator, composition, arguments in (
        (OPS.latent_attention, _compositions.latent_attention, (*forward, *options)),
        (OPS.latent_attention_backward, _compositions.latent_attention_backward, backward),
    ):
        for got, want in zip(composition(*arguments), operator(*arguments), strict=True):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_compositions_in_their_own_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert _compositions.CHUNK == 16
    problem = make_problem(3, 4, 70, lengths=(16, 37, 0, 17), dtype=torch.float64)
    arguments = (problem.q, problem.k, problem.v, None, problem.cu_seqlens, None, None, None)
    cotangents = (problem.dy, problem.d_norm, problem.d_mean)
    for got, want in (
        (_compositions.latent_attention, OPS.latent_attention),
        (_compositions.latent_attention_backward, OPS.latent_attention_backward),
    ):
        given = cotangents if want is OPS.latent_attention_backward else ()
        for x, y in zip(
            got(*arguments, *given, True, 1.0), want(*arguments, *given, True, 1.0), strict=True
        ):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_absent_keys(transform: str) -> None:
    """-inf logits, latents without a token, masked NaN: finite derivatives, the reference's."""
    q, k, v = (torch.randn(1, 1, 9, 3, dtype=torch.float64) for _ in range(3))
    k[:, :, :4, 0] = k[..., 1] = k[:, :, :2] = -torch.inf
    q[:, :, 3] = -torch.inf
    key_mask = torch.ones(1, 9, dtype=torch.bool)
    key_mask[:, 5] = False
    k[:, :, 5] = v[:, :, 5] = torch.nan

    def loss(backend: str | None) -> Callable[..., Tensor]:
        return lambda *x: latent_attention(*x, key_mask=key_mask, backend=backend).sin().sum()  # type: ignore[call-overload, no-any-return]

    results = [TRANSFORMS[transform](loss(b), (0, 1, 2))(q, k, v) for b in (None, "reference")]
    for got, want in zip(*results, strict=True):
        assert got[:, :, key_mask[0]].isfinite().all()
        torch.testing.assert_close(got, want, equal_nan=True)


def test_memory_of_double_backward_is_linear() -> None:
    """What is kept per token does not grow with T: at twice the tokens, twice the bytes."""
    sizes = []
    for tokens in (48, 96):
        problem = make_problem(4, 4, tokens, dtype=torch.float64)
        kept: list[int] = []

        def keep(x: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(x.untyped_storage().nbytes())
            return x

        leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y = _compositions.latent_attention(*leaves, *[None] * 5, True, 1.0)[0]
            torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        sizes.append(sum(kept))
    assert 1.8 < sizes[1] / sizes[0] < 2.1


# vmap --------------------------------------------------------------------------------------------

PACKED = torch.tensor([0, 2, 2, 7])
VMAPPED: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], tuple[int | None, ...]]] = {
    "causal": (latent_attention, [(3, 2, 4, 7, 2), (3, 2, 2, 7, 2), (3, 2, 2, 7, 3)], (0, 0, 0)),
    "inner dimension": (
        lambda q, k, v: latent_attention(q, k, v, causal=False),
        [(2, 2, 7, 3, 2), (2, 2, 7, 2, 3), (2, 2, 7, 3)], (3, 4, None),
    ),
    "packed": (
        lambda q, k, v: latent_attention(q, k, v, cu_seqlens=PACKED, return_state=True)[1].mean,
        [(3, 1, 4, 7, 2), (3, 1, 2, 7, 2), (3, 1, 2, 7, 3)], (0, 0, 0),
    ),
    "mask of each": (
        lambda q, mask: latent_attention(q, q, q, key_mask=mask > 0), [(3, 2, 1, 7, 2), (3, 2, 7)],
        (0, 0),
    ),
    "mask of each, packed": (
        lambda q, mask: latent_attention(q, q, q, key_mask=mask > 0, cu_seqlens=PACKED),
        [(3, 1, 1, 7, 2), (3, 1, 7)], (0, 0),
    ),
    "window": (
        lambda q, k: latte_ext.sliding_window_attention(q, k, k, window=3),
        [(3, 2, 4, 7, 2), (3, 2, 2, 7, 2)], (0, 0),
    ),
    "macchiato": (
        lambda p, k, q: latte_ext.macchiato_attention(p, k, q, q, q, window=2),
        [(3, 2, 1, 7, 4), (3, 2, 1, 7, 3), (3, 2, 1, 7, 2)], (0, 0, 0),
    ),
    "linear_recurrence": (
        lambda a, b: latte_ext.linear_recurrence(a.sigmoid(), b, cu_seqlens=PACKED),
        [(3, 1, 7, 2), (1, 7, 2)], (0, None),
    ),
    "rg_lru": (latte_ext.rg_lru, [(3, 2, 7, 4)] * 3 + [(3, 4)], (0, 0, 0, 0)),
    "rg_lru, mask of each": (
        lambda x, mask: latte_ext.rg_lru(x, x, x, x[0, 0], key_mask=mask > 0),
        [(3, 2, 7, 4), (3, 2, 7)], (0, 0),
    ),
    "short_conv": (latte_ext.short_conv, [(3, 2, 7, 4), (4, 3), (3, 4)], (0, None, 0)),
    "rotate": (
        lambda x: latte_ext.rotary.rotate(x, torch.arange(7)), [(3, 2, 2, 7, 4)], (0,)
    ),
}  # fmt: skip


@pytest.mark.supports("vmap, and vmap of gradients")
@pytest.mark.parametrize("of", ["values", "gradients"])
@pytest.mark.parametrize("name", VMAPPED)
def test_vmap(name: str, of: str) -> None:
    """A map is the stack of its elements, without torch's fallback and its warning."""
    function, shapes, in_dims = VMAPPED[name]
    inputs = [torch.randn(shape) for shape in shapes]
    called = function
    if of == "gradients":
        numbers = tuple(range(len(inputs)))
        called = func.grad(lambda *x: function(*x).sin().sum(), numbers)
    got = func.vmap(called, in_dims)(*inputs)
    size = max(x.shape[dim] for x, dim in zip(inputs, in_dims, strict=True) if dim is not None)
    each = [
        called(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    if of == "values":
        got, each = (got,), [(x,) for x in each]
    for x, parts in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(parts), rtol=1e-5, atol=1e-6)


def test_per_sample_gradients_are_one_call() -> None:
    """vmap(grad) reaches the kernels as one batch, not sample by sample."""
    q = torch.randn(5, 1, 2, 7, 3)
    calls: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if op.namespace == "latte_ext":
                calls.append(op._schema.name)
            return op(*args, **(kwargs or {}))

    with Count():
        func.vmap(func.grad(lambda x: latent_attention(x, x, x).sin().sum()))(q)
    assert sorted(calls) == ["latte_ext::latent_attention", "latte_ext::latent_attention_backward"]


def test_hessian_and_jacobians() -> None:
    x = torch.randn(1, 1, 5, 2, dtype=torch.float64)

    def loss(x: Tensor, backend: str | None = None) -> Tensor:
        return latent_attention(x, x.sin(), x.cos(), backend=backend).sin().sum()  # type: ignore[call-overload, no-any-return]

    want = func.hessian(lambda x: loss(x, "reference"))(x)
    for outer in (func.jacrev, func.jacfwd):
        for inner in (func.jacrev, func.jacfwd):
            torch.testing.assert_close(outer(inner(loss))(x), want)
    batched = func.vmap(func.hessian(loss))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[0], want)


def test_vmap_of_steps() -> None:
    """The states of all elements are updated in place."""
    q, k, v = torch.randn(3, 2, 4, 2), torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 5)
    state = [torch.zeros(3, 2, 2, 2), torch.ones(3, 2, 2, 2), torch.randn(3, 2, 2, 2, 5)]
    alone = [x.clone() for x in state]
    # The mapped dimension inside: merging it has to copy the state.
    inside = [x.movedim(0, 2).contiguous().movedim(2, 0) for x in state]

    def step(q: Tensor, k: Tensor, v: Tensor, *state: Tensor) -> Tensor:
        return latte_ext.latent_attention_step(q, k, v, latte_ext.LatentState(*state))

    for given in (state, inside):
        y = func.vmap(step)(q, k, v, *given)
        for i in range(3):
            row = [x[i].clone() for x in alone]
            torch.testing.assert_close(y[i], step(q[i], k[i], v[i], *row))
            for got, want in zip(given, row, strict=True):
                torch.testing.assert_close(got[i], want)
    with pytest.raises(RuntimeError, match=r"\[latent_attention_step\] got max without the mapped"):
        func.vmap(lambda q, k, v: step(q, k, v, *(x[0] for x in alone)))(q, k, v)


# Refusals ----------------------------------------------------------------------------------------


def test_raw_operators_answer_or_raise() -> None:
    """No operator returns a result without a graph for an input that requires grad."""
    x = torch.randn(1, 2, 5, 4, requires_grad=True)
    row = torch.randn(1, 5, 4, requires_grad=True)
    nothing = [None] * 5
    for y in (
        OPS.latent_attention(x, x, x, *nothing, True, 1.0)[0],
        OPS.linear_recurrence(row, row, None, None, False)[0],
        OPS.rg_lru(row, row, row, row[0, 0], *nothing[:4], False)[0],
        OPS.short_conv(row, x[0, 0, :4, :3], None, None, None, True)[0],
        OPS.sliding_window_attention(x, x, x, *nothing, None, None, 3, 0, True, 1.0, 0.0, True)[0],
        OPS.rotate(x, torch.arange(5), None, 10.0, None, False, False),
    ):
        assert y.requires_grad
    rates = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"\[rotate\] got rates that require grad"):
        OPS.rotate(x, torch.arange(5), rates, 10.0, None, False, False)


@pytest.mark.parametrize("op", ["sliding_window_attention", "macchiato_attention"])
def test_windows_refuse_what_they_lack(op: str) -> None:
    def call(x: Tensor) -> Tensor:
        if op == "macchiato_attention":
            return latte_ext.macchiato_attention(x, x[..., 1:], x, x, x, window=2)
        return latte_ext.sliding_window_attention(x, x, x, window=2)

    x = torch.randn(1, 1, 5, 3)
    tangent = rf"\[{op}\] got a forward-mode"
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match=tangent),
    ):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    with pytest.raises(RuntimeError, match=tangent):
        func.jvp(call, (x,), (x,))
    leaf = x.clone().requires_grad_()
    (d,) = torch.autograd.grad(call(leaf).sin().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"\[{op}_backward\] got a second derivative"):
        d.sum().backward()
    with pytest.raises(RuntimeError, match=rf"\[{op}_backward\] got a second derivative"):
        func.grad(lambda x: func.grad(lambda x: call(x).sin().sum())(x).sum())(x)
