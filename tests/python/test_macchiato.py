# SPDX-License-Identifier: Apache-2.0
"""macchiato_attention against the float64 reference, its limits, states and steps."""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import DTYPES, assert_close, random_mask, time_major
from latte_ext import (
    MacchiatoState,
    WindowCache,
    WindowSinks,
    latent_attention,
    macchiato_attention,
    macchiato_attention_step,
    sliding_window_attention,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from window_helpers import CAUSAL, FEATURES, attention_inputs, check, macchiato_inputs, normal

OPS = torch.ops.latte_ext


@CAUSAL
def test_limits(causal: bool) -> None:
    q_latent, k_latent, q, k, v = macchiato_inputs(latent_heads=2)
    plain = latent_attention(q_latent[..., 1:], k_latent, v, causal=causal)
    y = macchiato_attention(q_latent, k_latent, q, k, v, window=0, causal=causal)
    torch.testing.assert_close(y, plain)

    local = sliding_window_attention(q, k, v, window=5, causal=causal)
    empty = k_latent[..., :0]
    y = macchiato_attention(q_latent[..., :1], empty, q, k, v, window=5, causal=causal)
    torch.testing.assert_close(y, local)

    only_window = q_latent.clone()
    only_window[..., 1:] = -torch.inf
    y = macchiato_attention(only_window, k_latent, q, k, v, window=5, causal=causal)
    torch.testing.assert_close(y, local)
    y = macchiato_attention(only_window, k_latent, q, k, v, window=23, causal=causal)
    full = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(y, full)

    no_window = q_latent.clone()
    no_window[..., 0] = -torch.inf
    y = macchiato_attention(no_window, k_latent, q, k, v, window=5, causal=causal)
    torch.testing.assert_close(y, plain)


@pytest.mark.parametrize("latent_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 4])
def test_pieces_and_steps_are_the_whole(window: int, latent_heads: int) -> None:
    inputs = macchiato_inputs(latent_heads=latent_heads)
    whole = macchiato_attention(*inputs, window=window)
    head = [x[:, :, :9] for x in inputs]
    y, state = macchiato_attention(*head, window=window, return_state=True)
    torch.testing.assert_close(y, whole[:, :, :9])
    rest = [x[:, :, 9:] for x in inputs]
    y, final = macchiato_attention(*rest, window=window, state=state, return_state=True)
    torch.testing.assert_close(y, whole[:, :, 9:])
    assert isinstance(state, MacchiatoState)
    stepped = state.clone()
    for t in range(9, 23):
        y = macchiato_attention_step(*(x[:, :, t] for x in inputs), stepped)
        torch.testing.assert_close(y, whole[:, :, t])
    for got, want in zip(stepped, final, strict=True):
        if want is not None:
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("latent_heads", [1, 2, 4])
def test_step_dtypes(latent_heads: int, dtype: torch.dtype) -> None:
    inputs = macchiato_inputs(latents=9, latent_heads=latent_heads, dtype=dtype)
    whole = macchiato_attention(*inputs, window=6, latent_scale=0.5)
    _, state = macchiato_attention(
        *(x[:, :, :8] for x in inputs), window=6, latent_scale=0.5, return_state=True
    )
    for t in range(8, 23):
        row = [x[:, :, t] for x in inputs]
        y = macchiato_attention_step(*row, state, latent_scale=0.5)
        assert y.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 4e-6
        # Two roundings of nearly the same number differ by one unit at most.
        tolerance += torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
        assert_close(y, whole[:, :, t].double(), tolerance=tolerance, scale=1.0, name=f"y at {t}")


# Values and gradients -----------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("latents", [0, 5])
def test_features(feature: str, latents: int, dtype: torch.dtype, causal: bool) -> None:
    options = FEATURES[feature]
    inputs = (
        normal(2, 6, 131, 1 + latents, dtype=dtype),
        normal(2, 1, 131, latents, dtype=dtype),
        *attention_inputs(heads=6, kv_heads=3, tokens=131, dtype=dtype),
    )
    if "cu_seqlens" in options:
        inputs = tuple(x[:1] for x in inputs)
    check(macchiato_attention, *inputs, window=20, causal=causal, **options)


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 1, 4), (4, 2, 1), (6, 2, 3), (4, 4, 2)], ids=str)
def test_heads(heads: tuple[int, int, int], dtype: torch.dtype, causal: bool) -> None:
    query_heads, latent_heads, kv_heads = heads
    inputs = (
        normal(2, query_heads, 75, 17, dtype=dtype),
        normal(2, latent_heads, 75, 16, dtype=dtype),
        *attention_inputs(heads=query_heads, kv_heads=kv_heads, tokens=75, dtype=dtype),
    )
    check(macchiato_attention, *inputs, window=9, causal=causal, latent_scale=0.6)


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("latent_heads", [1, 2, 4])
def test_latents_have_values_of_their_own(
    latent_heads: int, dtype: torch.dtype, causal: bool
) -> None:
    inputs = macchiato_inputs(latents=5, latent_heads=latent_heads, dtype=dtype)
    v_latent = normal(2, 2, 23, 6, dtype=dtype)
    v_latent[:, :, 3] = 0

    def attention(*args: Tensor, **options: object) -> Tensor:
        q_latent, k_latent, q, k, v_latent, v = args
        return macchiato_attention(q_latent, k_latent, q, k, v, v_latent=v_latent, **options)  # type: ignore[arg-type,call-overload,no-any-return]

    check(attention, *inputs[:4], v_latent, inputs[4], window=5, causal=causal)
    check(attention, *inputs[:4], v_latent, inputs[4], window=0, causal=causal)


@pytest.mark.parametrize("latent_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 4])
def test_pieces_with_values_for_the_latents(window: int, latent_heads: int) -> None:
    inputs = macchiato_inputs(latent_heads=latent_heads)
    v_latent = normal(2, 2, 23, 6)
    whole = macchiato_attention(*inputs, window=window, v_latent=v_latent)
    state, row = None, 0
    for end in (7, 15):
        part = slice(row, end)
        y, state = macchiato_attention(
            *(x[:, :, part] for x in inputs), window=window, v_latent=v_latent[:, :, part],
            state=state, return_state=True,
        )  # fmt: skip
        torch.testing.assert_close(y, whole[:, :, part])
        row = end
    assert state is not None
    for t in range(row, 23):
        y = macchiato_attention_step(
            *(x[:, :, t] for x in inputs), state, v_latent=v_latent[:, :, t]
        )
        torch.testing.assert_close(y, whole[:, :, t])


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap(dtype: torch.dtype, causal: bool) -> None:
    inputs = macchiato_inputs(latents=5, dtype=dtype)
    check(macchiato_attention, *inputs, window=9, causal=causal, softcap=0.7)
    whole = macchiato_attention(*inputs, window=9, softcap=0.7)
    assert not torch.equal(whole, macchiato_attention(*inputs, window=9))
    head, row = [x[:, :, :20] for x in inputs], [x[:, :, 20] for x in inputs]
    _, state = macchiato_attention(*head, window=9, softcap=0.7, return_state=True)
    y = macchiato_attention_step(*row, state, softcap=0.7)
    torch.testing.assert_close(y, whole[:, :, 20])


def test_infinite_gates() -> None:
    """Columns, and whole rows, of -inf: probabilities of exactly zero, in gradients too."""
    inputs = macchiato_inputs(latents=4, latent_heads=4, dtype=torch.float32)
    q_latent = inputs[0]
    q_latent[:, :, ::4, 0] = -torch.inf
    q_latent[:, :, 1::4, 1:] = -torch.inf
    q_latent[:, :, 2::4] = -torch.inf
    check(macchiato_attention, *inputs, window=5)
    y = macchiato_attention(*inputs, window=5)
    assert (y[:, :, 2::4] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_strides(dtype: torch.dtype) -> None:
    inputs = (normal(2, 4, 70, 6, dtype=dtype), normal(2, 2, 70, 5, dtype=dtype))
    inputs += attention_inputs(tokens=70, key_dim=16, dim=16, dtype=dtype)
    check(macchiato_attention, *(time_major(x) for x in inputs), window=9)
    check(macchiato_attention, *(x.mT.contiguous().mT for x in inputs), window=9)
    expanded = [x[:1].expand(2, -1, -1, -1) for x in inputs]
    check(macchiato_attention, *expanded, window=9)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["batch", "tokens"])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    batch, tokens = shape
    inputs = (normal(batch, 4, tokens, 3), normal(batch, 2, tokens, 2))
    inputs += attention_inputs(batch=batch, tokens=tokens)
    leaves = [x.requires_grad_() for x in inputs]
    macchiato_attention(*leaves, window=3).sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    inputs = (normal(1, 4, 40, 6), normal(1, 2, 40, 5), *attention_inputs(batch=1, tokens=40))

    def both(*args: Tensor) -> Tensor:
        gated = macchiato_attention(*args, window=9)
        return gated.sin() + sliding_window_attention(*args[2:], window=9)

    def gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    compiled = gradients(torch.compile(both, fullgraph=True))
    for got, want in zip(compiled, gradients(both), strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@CAUSAL
def test_gradcheck(causal: bool) -> None:
    inputs = (normal(2, 4, 7, 3), normal(2, 1, 7, 2))
    inputs += attention_inputs(tokens=7, key_dim=3, dim=2)
    mask = random_mask(2, 7)

    def macchiato(*args: Tensor) -> Tensor:
        return macchiato_attention(*args, window=3, causal=causal, key_mask=mask)

    assert torch.autograd.gradcheck(macchiato, [x.requires_grad_() for x in inputs])


def test_gradcheck_through_state_and_sinks() -> None:
    """From what a second call returns to all that the first one took."""
    q_latent, k_latent = normal(1, 2, 6, 3), normal(1, 1, 6, 2)
    q, k, v = attention_inputs(1, 2, 1, 6, 3, 2)
    q_sink = normal(1, 2, 6, 3)
    position = torch.tensor([[0, 1]])

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        *rows, q_sink = args
        k, v = rows[3], rows[4]
        state = None
        outputs = []
        for part in (slice(0, 4), slice(4, 6)):
            sinks = WindowSinks(q_sink[:, :, part], k[:, :, :2], v[:, :, :2], position)
            y, state = macchiato_attention(
                *(x[:, :, part] for x in rows), window=2, state=state, return_state=True,
                sinks=sinks,
            )  # fmt: skip
            outputs.append(y)
        assert state is not None
        assert state.latent is not None
        assert state.window is not None
        return (*outputs, state.latent.mean, state.window.key, state.window.value)

    leaves = [x.requires_grad_() for x in (q_latent, k_latent, q, k, v, q_sink)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


# Errors -------------------------------------------------------------------------------------------


def bad_calls() -> Iterator[tuple[str, dict[str, object], type[Exception], str]]:
    q_latent, k_latent, q, _, _ = macchiato_inputs(dtype=torch.float32)
    yield "sparse", {"k_latent": k_latent.to_sparse()}, TypeError, r"k_latent has layout .*sparse"
    yield "columns", {"q_latent": q_latent[..., 1:]}, ValueError, r"q_latent has shape .*, expected"
    yield "tokens", {"k_latent": k_latent[:, :, 1:]}, ValueError, r"k_latent has shape"
    three = k_latent.expand(-1, 3, -1, -1)
    yield "heads", {"k_latent": three}, ValueError, r"multiple of the 3 heads of k_latent"
    yield "dtype", {"k_latent": k_latent.double()}, TypeError, r"k_latent has dtype torch.float64"
    yield "int", {"q_latent": q_latent.int()}, TypeError, r"q_latent has dtype torch.int32"
    yield "v_latent", {"v_latent": q[:, :2]}, ValueError, r"v_latent has shape .*, expected"
    yield "v_latent_type", {"v_latent": 1}, TypeError, r"v_latent is a int, expected a torch.Tensor"
    yield "softcap", {"softcap": 0.0}, ValueError, r"softcap is 0.0, expected a positive finite"
    yield "window", {"window": -1}, ValueError, r"window is -1, expected at least 0"
    yield "state", {"state": 3}, TypeError, r"state is a int, expected a MacchiatoState"
    yield "no_ring", {"state": MacchiatoState(None, None)}, TypeError, r"state.latent is a NoneType"
    sinks = WindowSinks(q, q[:, :2, :1], q[:, :2, :1])
    yield "sinks", {"window": 0, "sinks": sinks}, ValueError, r"sinks"


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[0])
def test_bad_input(case: tuple[str, dict[str, object], type[Exception], str]) -> None:
    names = ("q_latent", "k_latent", "q", "k", "v")
    _, change, error, text = case
    arguments = dict(zip(names, macchiato_inputs(dtype=torch.float32), strict=True)) | {"window": 3}
    with pytest.raises(error, match=r"^\[macchiato_attention\] .*" + text):
        macchiato_attention(**arguments | change)  # type: ignore[call-overload]


# Inside torch -------------------------------------------------------------------------------------


@pytest.mark.supports("opcheck", "macchiato_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, dtype: torch.dtype) -> None:
    q_latent, k_latent, q, k, v = macchiato_inputs(latent_heads=2, dtype=dtype)
    q_latent = q_latent.float()
    tensors = [x.requires_grad_(requires_grad) for x in (q_latent, k_latent, q, k, v)]
    q_latent, k_latent, q, k, v = tensors
    mask = random_mask(2, 23)
    gated = (q_latent, k_latent, None, q, k, v, mask, mask, *[None] * 9)
    scalars = (4, 0, True, 0.5, 0.0, 1.0)
    torch.library.opcheck(OPS.macchiato_attention.default, (*gated, *scalars, requires_grad))
    if requires_grad:
        return
    y, total, log_sum, wide, _, norm, mean = OPS.macchiato_attention.default(*gated, *scalars, True)
    total = y if dtype == torch.float32 else total
    saved = (total, log_sum, wide, torch.randn_like(y), norm, mean)
    torch.library.opcheck(OPS.macchiato_attention_backward.default, (*gated, *saved, *scalars))
    cache = WindowCache.empty(2, 2, 4, 5, 6, dtype=dtype).tensors()
    rows = [x[:, :, 0] for x in (q, k, v)]
    state = (torch.zeros(2, 2, 3), torch.ones(2, 2, 3), torch.zeros(2, 2, 3, 6))
    torch.library.opcheck(
        OPS.macchiato_attention_step.default,
        (
            q_latent[:, :, 0], k_latent[:, :, 0], None, *rows, *state, *cache,
            None, None, None, None, 0.5, 2.0, 1.0,
        ),
    )  # fmt: skip


def macchiato_twice(*inputs: Tensor) -> tuple[Tensor, MacchiatoState]:
    """With a state in between: what a compiled model does."""
    head, rest = [x[:, :, :9] for x in inputs], [x[:, :, 9:] for x in inputs]
    y, state = macchiato_attention(*head, window=4, return_state=True)
    z, state = macchiato_attention(*rest, window=4, state=state, return_state=True)
    return torch.cat([y, z], dim=2).sin(), state


def test_compile() -> None:
    inputs = [x.requires_grad_() for x in macchiato_inputs(dtype=torch.float32)]
    compiled = torch.compile(macchiato_twice, fullgraph=True, backend="aot_eager")
    results = []
    for function in (macchiato_twice, compiled):
        y, state = function(*inputs)
        assert state.window is not None
        results.append([y, state.window.key, *torch.autograd.grad(y.sum(), inputs)])
    torch.testing.assert_close(*results)
    torch.compiler.reset()


def test_compile_steps() -> None:
    inputs = macchiato_inputs(dtype=torch.float32)
    _, state = macchiato_attention(*inputs, window=4, return_state=True)
    other = state.clone()
    row = [x[:, :, 3] for x in inputs]
    compiled = torch.compile(macchiato_attention_step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(compiled(*row, other), macchiato_attention_step(*row, state))
    assert torch.equal(state.window.position, other.window.position)  # type: ignore[union-attr]
    torch.compiler.reset()


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, MacchiatoState]:
            return macchiato_twice(*inputs)

    inputs = macchiato_inputs(dtype=torch.float32)
    program = torch.export.export(Model(), inputs)
    got, want = program.module()(*inputs), Model()(*inputs)
    assert torch.equal(got[0], want[0])


def test_autocast_changes_nothing() -> None:
    inputs = macchiato_inputs(dtype=torch.float32)
    want = macchiato_attention(*inputs, window=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(macchiato_attention(*inputs, window=4), want)


def test_what_is_not_differentiable_says_so() -> None:
    inputs = [x.requires_grad_() for x in macchiato_inputs()]
    y = macchiato_attention(*inputs, window=3)
    (dq,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="got a second derivative, expected first order"):
        dq.sum().backward()
