# SPDX-License-Identifier: Apache-2.0
"""sliding_window_attention against the float64 reference, its cache and steps."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from helpers import DTYPES, assert_close, random_mask, threads
from latte_ext import (
    MacchiatoState,
    WindowCache,
    WindowSinks,
    sliding_window_attention,
    sliding_window_attention_step,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from window_helpers import CAUSAL, FEATURES, attention_inputs, band, check, normal, solve

OPS = torch.ops.latte_ext


@CAUSAL
@pytest.mark.parametrize("window", [1, 3, 16, 23, 100])
def test_window_is_masked_softmax_attention(window: int, causal: bool) -> None:
    q, k, v = attention_inputs()
    y = sliding_window_attention(q, k, v, window=window, causal=causal)
    mask = band(23, window, causal)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("window", [1, 4, 40])
def test_pieces_and_steps_are_the_whole(window: int) -> None:
    """Packed pieces of different lengths, with a mask, then token by token without one."""
    q, k, v = attention_inputs()
    mask = torch.rand(2, 23) < 0.7
    ends = torch.tensor([[0, 0], [9, 5], [9, 6], [13, 18]])
    for n in range(2):
        mask[n, ends[-1, n] :] = True
    whole = sliding_window_attention(q, k, v, window=window, key_mask=mask)
    cache = None
    for begin, end in itertools.pairwise(ends):
        parts = [slice(int(a), int(b)) for a, b in zip(begin, end, strict=True)]
        joined = [
            torch.cat([x[n : n + 1, :, part] for n, part in enumerate(parts)], 2) for x in (q, k, v)
        ]
        y, cache = sliding_window_attention(
            *joined,
            window=window,
            key_mask=torch.cat([mask[n : n + 1, part] for n, part in enumerate(parts)], 1),
            cu_seqlens=torch.cat([ends[0, :1], (end - begin).cumsum(0)]),
            cache=cache,
            return_cache=True,
        )
        want = torch.cat([whole[n : n + 1, :, part] for n, part in enumerate(parts)], 2)
        torch.testing.assert_close(y, want)
    assert cache is not None
    assert torch.equal(cache.position, ends[-1])
    for _ in range(5):
        at = cache.position.tolist()
        rows = [torch.stack([x[n, :, t] for n, t in enumerate(at)]) for x in (q, k, v, whole)]
        torch.testing.assert_close(sliding_window_attention_step(*rows[:3], cache), rows[3])


# Values and gradients -----------------------------------------------------------------------------

SIZES = [
    (1, 1, 1, 1),
    (31, 5, 6, 2),
    (64, 16, 16, 64),
    (65, 7, 33, 17),
    (130, 64, 64, 100),
    (200, 33, 10, 1),
    (129, 16, 65, 500),
    (70, 1, 1, 3),
]


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(
    size: tuple[int, int, int, int], dtype: torch.dtype, causal: bool
) -> None:
    tokens, key_dim, dim, window = size
    inputs = attention_inputs(tokens=tokens, key_dim=key_dim, dim=dim, dtype=dtype)
    check(sliding_window_attention, *inputs, window=window, causal=causal)


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, dtype: torch.dtype, causal: bool) -> None:
    options = FEATURES[feature]
    inputs = attention_inputs(heads=6, kv_heads=3, tokens=131, dtype=dtype)
    if "cu_seqlens" in options:
        inputs = tuple(x[:1] for x in inputs)
    check(sliding_window_attention, *inputs, window=20, causal=causal, **options)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["batch", "tokens"])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    batch, tokens = shape
    inputs = attention_inputs(batch=batch, tokens=tokens, dtype=torch.float32)
    y, cache = sliding_window_attention(*inputs, window=3, return_cache=True)
    assert y.shape == (batch, 4, tokens, 6)
    assert cache.position.tolist() == [tokens] * batch


@CAUSAL
def test_gradcheck(causal: bool) -> None:
    inputs = [x.requires_grad_() for x in attention_inputs(tokens=7, key_dim=3, dim=2)]
    mask = random_mask(2, 7)

    def window(*args: Tensor) -> Tensor:
        return sliding_window_attention(*args, window=3, causal=causal, key_mask=mask)

    assert torch.autograd.gradcheck(window, inputs)

    def capped(*args: Tensor) -> Tensor:
        return sliding_window_attention(*args, window=3, causal=causal, key_mask=mask, softcap=0.8)

    assert torch.autograd.gradcheck(capped, inputs)


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.1, 0.7, 50.0, 1e4])
def test_softcap(softcap: float, dtype: torch.dtype, causal: bool) -> None:
    q, k, v = attention_inputs(heads=6, kv_heads=3, tokens=131, dtype=dtype)
    mask = random_mask(2, 131)
    check(
        sliding_window_attention, 3 * q, k, v, window=20, causal=causal, key_mask=mask,
        softcap=softcap,
    )  # fmt: skip


def test_softcap_bounds_logits() -> None:
    """Infinite logits become +-softcap; NaN stays."""
    q, k, v = (torch.ones(1, 1, 3, 1) for _ in range(3))
    k[0, 0, :, 0] = torch.tensor([torch.inf, -torch.inf, torch.inf])
    v[0, 0, :, 0] = torch.tensor([0.0, 1.0, 0.0])
    y = sliding_window_attention(q, k, v, window=3, softcap=2.0)
    p = torch.tensor([1.0, math.exp(-4)])
    torch.testing.assert_close(y[0, 0, 1, 0], p[1] / p.sum())
    k[0, 0, 1] = torch.nan
    y = sliding_window_attention(q, k, v, window=3, softcap=2.0)
    assert y.flatten().isnan().tolist() == [False, True, True]


# Properties ---------------------------------------------------------------------------------------


@CAUSAL
def test_threads_change_no_bit(causal: bool) -> None:
    """One long head, which is cut among the threads."""
    inputs = attention_inputs(1, 2, 1, 3000, 8, 8, dtype=torch.float32)
    dy = normal(1, 2, 3000, 8, dtype=torch.float32)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(solve(sliding_window_attention, inputs, dy, window=100, causal=causal))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_nan_reaches_the_tokens_that_see_it() -> None:
    for name in ("k", "v"):
        q, k, v = attention_inputs(tokens=40, dtype=torch.float32)
        clean = sliding_window_attention(q, k, v, window=6)
        (k if name == "k" else v)[:, :, 21] = torch.nan
        y = sliding_window_attention(q, k, v, window=6)
        assert y[:, :, 21:27].isnan().all()
        outside = (torch.arange(40) < 21) | (torch.arange(40) > 26)
        assert torch.equal(y[:, :, outside], clean[:, :, outside])
        mask = (torch.arange(40) != 21).expand(2, -1)
        assert sliding_window_attention(q, k, v, window=6, key_mask=mask).isfinite().all()


def test_large_logits() -> None:
    q, k, v = attention_inputs(tokens=70)
    q = q * 1e4
    got = sliding_window_attention(q.float(), k.float(), v.float(), window=9)
    want = sliding_window_attention(q.float().double(), k.float().double(), v, window=9)
    assert got.isfinite().all()
    assert (got - want).abs().median() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_step_is_one_more_token(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Around the ring, at positions of their own, with and without sinks and a cap."""
    q, k, v = attention_inputs(2, *heads, 90, 33, 16, dtype=dtype)
    position = torch.tensor([[0, 1, 2], [0, 1, 1000]])
    k_sink, v_sink = k[:, :, :3].clone(), v[:, :, :3].clone()
    empty = WindowCache.empty(2, heads[1], 70, 33, 16, dtype=dtype)
    empty.position[1] = 200
    for sunk, softcap in ((False, None), (True, None), (True, 1.5)):
        sinks = WindowSinks(q, k_sink, v_sink, position) if sunk else None
        want = sliding_window_attention(
            q, k, v, window=70, cache=empty, sinks=sinks, softcap=softcap
        )
        cache = empty.clone()
        for t in range(90):
            part = sinks._replace(q=q[:, :, t]) if sinks else None
            y = sliding_window_attention_step(
                q[:, :, t], k[:, :, t], v[:, :, t], cache, sinks=part, softcap=softcap
            )
            tolerance = 1e-12 if dtype == torch.float64 else 4e-6
            assert_close(
                y,
                want[:, :, t].double(),
                tolerance=tolerance + (dtype.itemsize == 2) * 8e-3,
                scale=1.0,
                name=f"y at {t}",
            )
        assert cache.position.tolist() == [90, 290]


def test_cache_object() -> None:
    q, k, v = attention_inputs(3, 2, 2, 9, dtype=torch.bfloat16)
    _, cache = sliding_window_attention(q, k, v, window=4, return_cache=True)
    assert cache.nbytes == 3 * (2 * 4 * (5 + 6) * 2 + 4 + 8)
    picked = cache.select([2, 0, 2])
    assert torch.equal(picked.key[1], cache.key[0])
    assert torch.equal(cache.select(torch.tensor([True, False, True])).value, cache.value[[0, 2]])
    other = cache.clone()
    sliding_window_attention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], other)
    assert cache.position.tolist() == [9] * 3
    assert other.position.tolist() == [10] * 3
    assert cache.to("cpu").key is cache.key
    state = MacchiatoState(None, cache)
    assert state.nbytes == cache.nbytes
    assert torch.equal(state.select([1]).window.key, cache.key[1:2])  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="index does not fit"):
        cache.select([3])
    with pytest.raises(TypeError, match="expected signed integers or bool"):
        cache.select(torch.tensor([0.5]))


# Errors -------------------------------------------------------------------------------------------


def bad_calls() -> Iterator[tuple[str, dict[str, object], type[Exception], str]]:
    q, k, v = attention_inputs(dtype=torch.float32)
    yield "window_0", {"window": 0}, ValueError, r"window is 0, expected at least 1"
    yield "window_2^63", {"window": 1 << 63}, ValueError, r"window is \d+, expected at most 2"
    yield "q_scalar", {"q": torch.tensor(1.0)}, ValueError, r"q has shape \(\), expected 4"
    yield "v_batch", {"v": v[:1]}, ValueError, r"v has shape .*, expected \(2, 2, 23, 6\)"
    for bad in ([0, 9, 8, 23], [1, 23], [0, 24], [[0, 23]]):
        packed = {"q": q[:1], "k": k[:1], "v": v[:1], "cu_seqlens": torch.tensor(bad)}
        yield f"borders_{bad}", packed, ValueError, r"cu_seqlens.* (is|ends|has) .*, expected"
    yield "window_type", {"window": 2.0}, TypeError, r"window is a float, expected an int"
    yield "q_rank", {"q": q[0]}, ValueError, r"q has shape .*, expected 4 dimensions"
    yield "k_dim", {"k": k[..., :2]}, ValueError, r"k has shape .*, expected \(2, 2, 23, 5\)"
    yield "v_tokens", {"v": v[:, :, :3]}, ValueError, r"v has shape .*, expected \(2, 2, 23, 6\)"
    yield (
        "heads",
        {"k": k[:, :1].expand(-1, 3, -1, -1), "v": v[:, :1].expand(-1, 3, -1, -1)},
        (ValueError),
        r"q has 4 heads, expected a multiple of the 3",
    )
    yield "double", {"v": v.double()}, TypeError, r"expected float64 for all three or for none"
    yield "scale", {"scale": math.inf}, ValueError, r"scale is inf, expected a finite number"
    for softcap in (0, -1.0, math.inf, math.nan):
        yield (
            f"softcap_{softcap}",
            {"softcap": softcap},
            ValueError,
            r"softcap is .*, expected a pos",
        )
    yield "softcap_type", {"softcap": "1"}, TypeError, r"softcap is a str, expected a float"
    yield "mask", {"key_mask": torch.ones(2, 5).bool()}, ValueError, r"key_mask has shape .*\(2, 23"
    yield "borders", {"cu_seqlens": torch.tensor([0, 23])}, ValueError, r"q has batch 2, expected 1"
    cache = WindowCache.empty(2, 2, 4, 5, 6)
    yield "cache", {"cache": cache}, ValueError, r"cache.key has shape .*, expected \(2, 2, 3, 5\)"
    replaced = WindowCache.empty(2, 2, 3, 5, 6)
    replaced.valid = replaced.valid[:, :2]
    yield (
        "cache_valid",
        {"cache": replaced},
        ValueError,
        r"cache.valid has shape \(2, 2\), expected",
    )
    yield "cache_type", {"cache": 3}, TypeError, r"cache is a int, expected a WindowCache"
    symmetric = {"causal": False, "return_cache": True}
    yield "symmetric_cache", symmetric, ValueError, r"causal=False, expected causal=True"
    sinks = WindowSinks(q, k[:, :, :2], v[:, :, :3])
    yield "sinks", {"sinks": sinks}, ValueError, r"sinks.v has shape .*, expected \(2, 2, 2, 6\)"
    yield "sinks_q", {"sinks": WindowSinks(q[:, :, 1:], k, v)}, ValueError, r"sinks.q has shape"
    none = WindowSinks(q, k[:, :, :0], v[:, :, :0])
    yield "sinks_0", {"sinks": none}, ValueError, r"sinks.k has 0 sinks, expected at least 1"
    double = WindowSinks(q, k.double(), v)
    yield "sinks_dtype", {"sinks": double}, TypeError, r"sinks.k has dtype torch.float64, expected"
    for position, error in ((torch.zeros(2, 2), TypeError), (torch.zeros(2, 1).long(), ValueError)):
        placed = WindowSinks(q, k[:, :, :2], v[:, :, :2], position)
        yield f"position_{error.__name__}", {"sinks": placed}, error, r"sinks.position has"
    yield (
        "sinks_sparse",
        {"sinks": sinks._replace(k=k.to_sparse())},
        TypeError,
        r"sinks.k has layout",
    )
    yield "sinks_type", {"sinks": 1}, TypeError, r"sinks is a int, expected a WindowSinks"
    yield "backend", {"backend": "gpu"}, ValueError, r"backend is 'gpu', expected"


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[0])
@pytest.mark.parametrize(
    "way", [{}, {"backend": "reference"}, {"return_cache": True}], ids=["", "reference", "cache"]
)
def test_bad_input(
    case: tuple[str, dict[str, object], type[Exception], str], way: dict[str, object]
) -> None:
    q, k, v = attention_inputs(dtype=torch.float32)
    _, change, error, text = case
    arguments = {"q": q, "k": k, "v": v, "window": 3} | way | change
    with pytest.raises(error, match=r"^\[sliding_window_attention\] .*" + text):
        sliding_window_attention(**arguments)  # type: ignore[call-overload]


# Inside torch -------------------------------------------------------------------------------------


@pytest.mark.supports("opcheck", "sliding_window_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_(requires_grad) for x in attention_inputs(dtype=dtype))
    arguments = (
        q,
        k,
        v,
        random_mask(2, 23),
        None,
        *[None] * 5,
        4,
        0,
        True,
        0.5,
        0.0,
        requires_grad,
    )
    torch.library.opcheck(OPS.sliding_window_attention.default, arguments)
    if requires_grad:
        return
    y, log_sum, wide = OPS.sliding_window_attention.default(*arguments[:-1], True)
    saved = (log_sum, y if dtype == torch.float32 else wide, torch.randn_like(y), None)
    torch.library.opcheck(
        OPS.sliding_window_attention_backward.default, (*arguments[:10], *saved, *arguments[10:-1])
    )
    cache = WindowCache.empty(2, 2, 4, 5, 6, dtype=dtype).tensors()
    rows = [x[:, :, 0] for x in (q, k, v)]
    torch.library.opcheck(
        OPS.sliding_window_attention_step.default, (*rows, *cache, None, None, None, None, 0.5, 2.0)
    )


def test_what_is_not_differentiable_says_so() -> None:
    inputs = [x.requires_grad_() for x in attention_inputs()]
    y = sliding_window_attention(*inputs, window=3)
    (dq,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="got a second derivative, expected first order"):
        dq.sum().backward()
    cache = WindowCache.empty(2, 2, 4, 5, 6, dtype=torch.float64)
    rows = [x[:, :, 0] for x in inputs]
    with pytest.raises(RuntimeError, match="expected none: the cache is updated in place"):
        sliding_window_attention_step(*rows, cache)
