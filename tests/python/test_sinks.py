# SPDX-License-Identifier: Apache-2.0
"""Sinks of sliding_window_attention and macchiato_attention against the float64 reference."""

import pytest
import torch
from helpers import DTYPES, random_mask, threads, time_major
from latte_ext import (
    WindowCache,
    WindowSinks,
    macchiato_attention,
    sliding_window_attention,
    sliding_window_attention_step,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from window_helpers import CAUSAL, attention_inputs, band, check, macchiato_inputs, normal, solve

OPS = torch.ops.latte_ext


def sunk_window(*args: Tensor, position: Tensor | None, **options: object) -> Tensor:
    *sinks, q, k, v = args
    return sliding_window_attention(q, k, v, sinks=WindowSinks(*sinks, position), **options)  # type: ignore[arg-type,call-overload,no-any-return]


def sunk_macchiato(*args: Tensor, position: Tensor | None, **options: object) -> Tensor:
    *sinks, q_latent, k_latent, q, k, v = args
    return macchiato_attention(  # type: ignore[call-overload,no-any-return]
        q_latent, k_latent, q, k, v,
        sinks=WindowSinks(*sinks, position), **options,  # type: ignore[arg-type]
    )  # fmt: skip


def sink_inputs(
    count: int, q: Tensor, k: Tensor, v: Tensor, sequences: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `count` sinks beside q, k and v."""
    shape = (sequences or q.shape[0], k.shape[1], count)
    return (
        normal(*q.shape, dtype=q.dtype),
        normal(*shape, k.shape[3], dtype=k.dtype),
        normal(*shape, v.shape[3], dtype=v.dtype),
    )


def positions(sequences: int, count: int) -> Tensor:
    return torch.randint(-5, 40, (sequences, count))


def test_sinks_are_tokens_that_left_the_window() -> None:
    """The first tokens as sinks: as if the window reached back to them as well."""
    q, k, v = attention_inputs()
    position = torch.arange(3).expand(2, 3)
    sinks = WindowSinks(q, k[:, :, :3], v[:, :, :3], position)
    y = sliding_window_attention(q, k, v, window=4, sinks=sinks)
    mask = band(23, 4, True) | ((torch.arange(23) < 3) & (torch.ones(23, 23) > 0).tril())
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(y, expected)
    cache = None
    for piece in (slice(0, 2), slice(2, 11), slice(11, 23)):
        part = sinks._replace(q=q[:, :, piece])
        got, cache = sliding_window_attention(
            q[:, :, piece], k[:, :, piece], v[:, :, piece], window=4, sinks=part, cache=cache,
            return_cache=True,
        )  # fmt: skip
        torch.testing.assert_close(got, expected[:, :, piece])


# Values and gradients -----------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 4, 8, 70])
@pytest.mark.parametrize("is_placed", [False, True], ids=["always", "placed"])
def test_values_and_gradients(
    is_placed: bool, count: int, dtype: torch.dtype, causal: bool
) -> None:
    inputs = attention_inputs(heads=6, kv_heads=3, tokens=131, key_dim=7, dtype=dtype)
    position = positions(2, count) if is_placed else None
    check(
        sunk_window, *sink_inputs(count, *inputs), *inputs, position=position, window=20,
        causal=causal,
    )  # fmt: skip


FEATURES: dict[str, dict[str, object]] = {
    "mask": {"key_mask": random_mask(2, 131)},
    "mask_one_row_empty": {"key_mask": torch.arange(131) < torch.tensor([[0], [131]])},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 69, 70, 131])},
    "packed_empty": {"cu_seqlens": torch.tensor([0, 0, 1, 1, 131, 131], dtype=torch.int32)},
    "packed_mask": {"cu_seqlens": torch.tensor([0, 90, 131]), "key_mask": random_mask(1, 131)},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 0.6},
    "wide_window": {"window": 2**62},
}


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("latents", [None, 0, 5])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, latents: int | None, dtype: torch.dtype, causal: bool) -> None:
    options = {"window": 20} | FEATURES[feature]
    inputs = attention_inputs(heads=6, kv_heads=3, tokens=131, dtype=dtype)
    batch = 2
    if "cu_seqlens" in options:
        inputs = tuple(x[:1] for x in inputs)
        batch = len(options["cu_seqlens"]) - 1  # type: ignore[arg-type]
    sinks = sink_inputs(4, *inputs, sequences=batch)
    position = positions(batch, 4)
    if latents is None:
        check(sunk_window, *sinks, *inputs, position=None, causal=causal, **options)
        check(sunk_window, *sinks, *inputs, position=position, causal=causal, **options)
        return
    batch = inputs[0].shape[0]
    gate = (
        normal(batch, 6, 131, 1 + latents, dtype=dtype),
        normal(batch, 3, 131, latents, dtype=dtype),
    )
    check(sunk_macchiato, *sinks, *gate, *inputs, position=position, causal=causal, **options)


def test_types_of_their_own() -> None:
    q, k, v = attention_inputs(tokens=40, dtype=torch.float32)
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    sinks = [x.to(dtype) for x, dtype in zip(sink_inputs(3, q, k, v), dtypes, strict=True)]
    wide = [x.float() for x in sinks]
    got = sunk_window(*sinks, q, k, v, position=None, window=6)
    torch.testing.assert_close(got, sunk_window(*wide, q, k, v, position=None, window=6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_strides(dtype: torch.dtype) -> None:
    inputs = attention_inputs(tokens=70, key_dim=16, dim=16, dtype=dtype)
    inputs = (*sink_inputs(4, *inputs), *inputs)
    position = positions(4, 2).t()
    check(sunk_window, *(time_major(x) for x in inputs), position=position, window=9)
    check(sunk_window, *(x.mT.contiguous().mT for x in inputs), position=position, window=9)
    expanded = [x[:1].expand(2, -1, -1, -1) for x in inputs]
    check(sunk_window, *expanded, position=position[:1].expand(2, -1), window=9)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["batch", "tokens"])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    batch, tokens = shape
    inputs = attention_inputs(batch=batch, tokens=tokens)
    leaves = [x.requires_grad_() for x in (*sink_inputs(3, *inputs), *inputs)]
    sunk_window(*leaves, position=positions(batch, 3), window=3).sum().backward()
    for x in leaves:
        assert x.grad is not None
        assert (x.grad == 0).all()


@CAUSAL
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_gradcheck(softcap: float | None, causal: bool) -> None:
    inputs = attention_inputs(tokens=7, key_dim=3, dim=2)
    leaves = [x.requires_grad_() for x in (*sink_inputs(2, *inputs), *inputs)]
    position = torch.tensor([[0, 1], [3, -2]])

    def window(*args: Tensor) -> Tensor:
        return sunk_window(*args, position=position, window=3, causal=causal, softcap=softcap)

    assert torch.autograd.gradcheck(window, leaves)


# Properties ---------------------------------------------------------------------------------------


@CAUSAL
def test_threads_change_no_bit(causal: bool) -> None:
    """One long head, which is cut among the threads, and packed sequences."""
    q, k, v = attention_inputs(1, 2, 1, 4500, 8, 8, dtype=torch.float32)
    dy = normal(1, 2, 4500, 8, dtype=torch.float32)
    for borders in (None, torch.tensor([0, 3000, 3001, 4500])):
        inputs = (*sink_inputs(4, q, k, v, sequences=3 if borders is not None else 1), q, k, v)
        options = {"window": 100, "causal": causal, "cu_seqlens": borders, "position": None}
        results = []
        for count in (1, 2, 5):
            with threads(count):
                results.append(solve(sunk_window, inputs, dy, **options))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_nan_in_the_window_stays_there() -> None:
    inputs = attention_inputs(tokens=40, dtype=torch.float32)
    q, k, v = inputs
    sinks = sink_inputs(3, *inputs)
    clean = sunk_window(*sinks, q, k, v, position=None, window=6)
    v[:, :, 21] = torch.nan
    y = sunk_window(*sinks, q, k, v, position=None, window=6)
    assert y[:, :, 21:27].isnan().all()
    outside = (torch.arange(40) < 21) | (torch.arange(40) > 26)
    assert torch.equal(y[:, :, outside], clean[:, :, outside])


def test_nan_in_a_key_reaches_the_tokens_that_see_it() -> None:
    inputs = attention_inputs(tokens=40, dtype=torch.float32)
    q_sink, k_sink, v_sink = sink_inputs(2, *inputs)
    position = torch.tensor([[0, 10], [0, 10]])
    k_sink[:, :, 1] = torch.nan
    y = sunk_window(q_sink, k_sink, v_sink, *inputs, position=position, window=6)
    assert y[:, :, 16:].isnan().all()
    assert y[:, :, :16].isfinite().all()


def test_backward_after_a_step_on_the_cache() -> None:
    q, k, v = attention_inputs(tokens=9)
    cache = WindowCache.empty(2, 2, 4, 5, 6, dtype=torch.float64)
    sinks = WindowSinks(q, k[:, :, :2], v[:, :, :2], torch.tensor([[0, 1], [0, 1]]))
    leaf = q.requires_grad_()
    y = sliding_window_attention(leaf, k, v, window=4, cache=cache, sinks=sinks)
    with torch.no_grad():
        sliding_window_attention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], cache)
    y.sum().backward()
    assert leaf.grad is not None


# Inside torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, dtype: torch.dtype) -> None:
    inputs = attention_inputs(dtype=dtype)
    tensors = [x.requires_grad_(requires_grad) for x in (*inputs, *sink_inputs(3, *inputs))]
    q, k, v, *sinks = tensors
    given = (*sinks, positions(2, 3), torch.tensor([0, 4]))
    arguments = (q, k, v, None, None, *given, 4, 0, True, 0.5, 0.0, requires_grad)
    torch.library.opcheck(OPS.sliding_window_attention.default, arguments)
    q_latent, k_latent, *_ = macchiato_inputs(latent_heads=2, dtype=dtype)
    q_latent = q_latent.float()
    gated = (q_latent, k_latent, None, q, k, v, *[None] * 6, *given)
    scalars = (4, 0, True, 0.5, 0.0, 1.0)
    torch.library.opcheck(OPS.macchiato_attention.default, (*gated, *scalars, requires_grad))
    if requires_grad:
        return
    y, log_sum, wide = OPS.sliding_window_attention.default(*arguments[:-1], True)
    saved = (log_sum, y if dtype == torch.float32 else wide, torch.randn_like(y), None)
    torch.library.opcheck(
        OPS.sliding_window_attention_backward.default, (*arguments[:10], *saved, *arguments[10:-1])
    )
    y, total, log_sum, wide, *_ = OPS.macchiato_attention.default(*gated, *scalars, True)
    saved = (y if dtype == torch.float32 else total, log_sum, wide, torch.randn_like(y))
    torch.library.opcheck(
        OPS.macchiato_attention_backward.default, (*gated, *saved, None, None, *scalars)
    )


def test_compile() -> None:
    inputs = attention_inputs(dtype=torch.float32)
    inputs = (*sink_inputs(3, *inputs), *inputs)
    position = positions(2, 3)

    def both(*args: Tensor) -> Tensor:
        *sinks, q, k, v = args
        given = WindowSinks(*sinks, position)
        y = sliding_window_attention(q, k, v, window=4, sinks=given, softcap=2.0)
        return y.sin() + macchiato_attention(q[..., :3], k[..., :2], q, k, v, window=4, sinks=given)

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(*results)
    torch.compiler.reset()


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return sunk_window(*args, position=None, window=4)

    inputs = attention_inputs(dtype=torch.float32)
    inputs = (*sink_inputs(3, *inputs), *inputs)
    program = torch.export.export(Model(), inputs)
    assert torch.equal(program.module()(*inputs), Model()(*inputs))


def test_autocast_changes_nothing() -> None:
    inputs = attention_inputs(dtype=torch.float32)
    inputs = (*sink_inputs(3, *inputs), *inputs)
    want = sunk_window(*inputs, position=None, window=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sunk_window(*inputs, position=None, window=4), want)
