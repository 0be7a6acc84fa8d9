# SPDX-License-Identifier: Apache-2.0
"""sliding_window_attention and macchiato_attention against the float64 reference, and their limits,
caches and steps."""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import (
    DTYPES,
    TOLERANCES,
    assert_close,
    compute_dtype,
    random_mask,
    rms,
    threads,
    time_major,
)
from latte_ext import (
    MacchiatoState,
    WindowCache,
    WindowSinks,
    latent_attention,
    macchiato_attention,
    macchiato_attention_step,
    sliding_window_attention,
    sliding_window_attention_step,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def attention_inputs(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    tokens: int = 23,
    key_dim: int = 5,
    dim: int = 6,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(batch, heads, tokens, key_dim, dtype=dtype),
        normal(batch, kv_heads, tokens, key_dim, dtype=dtype),
        normal(batch, kv_heads, tokens, dim, dtype=dtype),
    )


def band(tokens: int, window: int, causal: bool) -> Tensor:
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (distance.abs() < window) & ((distance >= 0) | (not causal))


CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "symmetric"])


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


def macchiato_inputs(
    latents: int = 3, latent_heads: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    q, k, v = attention_inputs(dtype=dtype)
    return (
        normal(2, 4, 23, 1 + latents, dtype=dtype),
        normal(2, latent_heads, 23, latents, dtype=dtype),
        q,
        k,
        v,
    )


@CAUSAL
def test_macchiato_limits(causal: bool) -> None:
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
def test_macchiato_pieces_and_steps_are_the_whole(window: int, latent_heads: int) -> None:
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
def test_macchiato_step_dtypes(latent_heads: int, dtype: torch.dtype) -> None:
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


# Values and gradients ----------------------------------------------------------------------------

Attention = Callable[..., Tensor]


def solve(
    attention: Attention, inputs: tuple[Tensor, ...], dy: Tensor, **options: object
) -> list[Tensor]:
    """y and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = attention(*leaves, **options)
    if not y.numel():
        return [y, *(torch.zeros_like(x) for x in inputs)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, materialize_grads=True)]


def check(attention: Attention, *inputs: Tensor, **options: object) -> None:
    """The compiled operator against the reference on the same numbers in float64."""
    v = inputs[-1]
    heads = inputs[0].shape[1]
    dy = normal(v.shape[0], heads, *v.shape[2:], dtype=v.dtype)
    got = solve(attention, inputs, dy, **options)
    doubles = tuple(x.double() for x in inputs)
    want = solve(attention, doubles, dy.double(), backend="reference", **options)
    tolerance = TOLERANCES[compute_dtype(v.dtype)]
    assert got[0].dtype == v.dtype
    # A gradient keeps the error of its terms, also where they cancel.
    scale = rms(v) * rms(dy) * math.sqrt(v.shape[-1])
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if i:
            assert a.dtype == inputs[i - 1].dtype
        size = max(scale if i else rms(v), float(b.abs().max()) if b.numel() else 0.0)
        bound = 2 * (tolerance.gradient if i else tolerance.value)
        # Values with fewer heads than the latents: torch adds two gradients of half precision.
        if i == 5 and v.dtype.itemsize == 2 and v.shape[1] % inputs[1].shape[1]:
            bound += torch.finfo(v.dtype).eps
        assert_close(a, b, tolerance=bound, scale=size, name=f"output {i}")


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


FEATURES: dict[str, dict[str, object]] = {
    "mask": {"key_mask": random_mask(2, 131)},
    "mask_left": {"key_mask": torch.arange(131) >= torch.tensor([[70], [3]])},
    "mask_one_row_empty": {"key_mask": torch.arange(131) < torch.tensor([[0], [131]])},
    "mask_strided": {"key_mask": random_mask(131, 2).t()},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 69, 70, 131])},
    "packed_empty": {"cu_seqlens": torch.tensor([0, 0, 1, 1, 131, 131], dtype=torch.int32)},
    "packed_mask": {"cu_seqlens": torch.tensor([0, 90, 131]), "key_mask": random_mask(1, 131)},
    "scale": {"scale": -0.7},
}


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("latents", [None, 0, 5])
def test_features(feature: str, latents: int | None, dtype: torch.dtype, causal: bool) -> None:
    options = FEATURES[feature]
    inputs = attention_inputs(heads=6, kv_heads=3, tokens=131, dtype=dtype)
    attention: Attention = sliding_window_attention
    if latents is not None:
        q_latent = normal(2, 6, 131, 1 + latents, dtype=dtype)
        inputs = (q_latent, normal(2, 1, 131, latents, dtype=dtype), *inputs)
        attention = macchiato_attention
    if "cu_seqlens" in options:
        inputs = tuple(x[:1] for x in inputs)
    check(attention, *inputs, window=20, causal=causal, **options)


@CAUSAL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 1, 4), (4, 2, 1), (6, 2, 3), (4, 4, 2)], ids=str)
def test_macchiato_heads(heads: tuple[int, int, int], dtype: torch.dtype, causal: bool) -> None:
    query_heads, latent_heads, kv_heads = heads
    inputs = (
        normal(2, query_heads, 75, 17, dtype=dtype),
        normal(2, latent_heads, 75, 16, dtype=dtype),
        *attention_inputs(heads=query_heads, kv_heads=kv_heads, tokens=75, dtype=dtype),
    )
    check(macchiato_attention, *inputs, window=9, causal=causal, latent_scale=0.6)


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
    inputs = attention_inputs(batch=batch, tokens=tokens, dtype=torch.float32)
    y, cache = sliding_window_attention(*inputs, window=3, return_cache=True)
    assert y.shape == (batch, 4, tokens, 6)
    assert cache.position.tolist() == [tokens] * batch
    q_latent, k_latent = normal(batch, 4, tokens, 3), normal(batch, 2, tokens, 2)
    leaves = [x.double().requires_grad_() for x in (q_latent, k_latent, *inputs)]
    macchiato_attention(*leaves, window=3).sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in leaves)


@CAUSAL
def test_gradcheck(causal: bool) -> None:
    inputs = [x.requires_grad_() for x in attention_inputs(tokens=7, key_dim=3, dim=2)]
    mask = random_mask(2, 7)

    def window(*args: Tensor) -> Tensor:
        return sliding_window_attention(*args, window=3, causal=causal, key_mask=mask)

    assert torch.autograd.gradcheck(window, inputs)
    latents = [normal(2, 4, 7, 3).requires_grad_(), normal(2, 1, 7, 2).requires_grad_()]

    def macchiato(*args: Tensor) -> Tensor:
        return macchiato_attention(*args, window=3, causal=causal, key_mask=mask)

    assert torch.autograd.gradcheck(macchiato, (*latents, *inputs))


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


@pytest.mark.parametrize("is_packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks_against_the_reference(dtype: torch.dtype, is_packed: bool) -> None:
    q, k, v = attention_inputs(batch=1 if is_packed else 2, tokens=40, dtype=dtype)
    borders = torch.tensor([0, 25, 40]) if is_packed else None
    k_sink, v_sink = normal(2, 2, 3, 5, dtype=dtype), normal(2, 2, 3, 6, dtype=dtype)
    for position in (None, torch.tensor([[0, 1, 2], [0, 4, 9]])):

        def attention(
            *args: Tensor, position: Tensor | None = position, **options: object
        ) -> Tensor:
            q_sink, k_sink, v_sink, *rest = args
            sinks = WindowSinks(q_sink, k_sink, v_sink, position)
            return sliding_window_attention(*rest, sinks=sinks, **options)  # type: ignore[arg-type,call-overload,no-any-return]

        check_sinks(attention, (q.sin(), k_sink, v_sink, q, k, v), borders)


def check_sinks(attention: Attention, inputs: tuple[Tensor, ...], borders: Tensor | None) -> None:
    q, v = inputs[3], inputs[5]
    dy = normal(*q.shape[:3], v.shape[3], dtype=v.dtype)
    options = {"window": 6, "cu_seqlens": borders}
    got = solve(attention, inputs, dy, **options)
    doubles = tuple(x.double() for x in inputs)
    want = solve(attention, doubles, dy.double(), backend="reference", **options)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        size = max(float(b.abs().max()), rms(v) * rms(dy) * math.sqrt(v.shape[3]))
        # Keys and values of half precision are cast by torch, which rounds once more.
        assert_close(a, b, tolerance=2e-5, scale=size, name=f"output {i}")


# Properties --------------------------------------------------------------------------------------


@CAUSAL
def test_threads_change_no_bit(causal: bool) -> None:
    """One long head, which is cut among the threads."""
    inputs = (normal(1, 2, 3000, 4), normal(1, 1, 3000, 3))
    inputs += attention_inputs(1, 2, 1, 3000, 8, 8)
    inputs = tuple(x.float() for x in inputs)
    dy = normal(1, 2, 3000, 8).float()
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(
                solve(sliding_window_attention, inputs[2:], dy, window=100, causal=causal)
            )
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
    """Around the ring, at positions of their own, with and without sinks."""
    q, k, v = attention_inputs(2, *heads, 90, 33, 16, dtype=dtype)
    position = torch.tensor([[0, 1, 2], [0, 1, 1000]])
    k_sink, v_sink = k[:, :, :3].clone(), v[:, :, :3].clone()
    empty = WindowCache.empty(2, heads[1], 70, 33, 16, dtype=dtype)
    empty.position[1] = 200
    for sunk in (False, True):
        sinks = WindowSinks(q, k_sink, v_sink, position) if sunk else None
        want = sliding_window_attention(q, k, v, window=70, cache=empty, sinks=sinks)
        cache = empty.clone()
        for t in range(90):
            part = sinks._replace(q=q[:, :, t]) if sinks else None
            y = sliding_window_attention_step(q[:, :, t], k[:, :, t], v[:, :, t], cache, sinks=part)
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


# Errors ------------------------------------------------------------------------------------------


def bad_calls() -> Iterator[tuple[str, dict[str, object], type[Exception], str]]:
    q, k, v = attention_inputs(dtype=torch.float32)
    yield "window_0", {"window": 0}, ValueError, r"window is 0, expected at least 1"
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
    yield "mask", {"key_mask": torch.ones(2, 5).bool()}, ValueError, r"key_mask has shape"
    yield "borders", {"cu_seqlens": torch.tensor([0, 23])}, ValueError, r"q has batch 2, expected 1"
    cache = WindowCache.empty(2, 2, 4, 5, 6)
    yield "cache", {"cache": cache}, ValueError, r"cache.key has shape .*, expected \(2, 2, 3, 5\)"
    yield "cache_type", {"cache": 3}, TypeError, r"cache is a int, expected a WindowCache"
    symmetric = {"causal": False, "return_cache": True}
    yield "symmetric_cache", symmetric, ValueError, r"causal=False, expected causal=True"
    sinks = WindowSinks(q, k[:, :, :2], v[:, :, :3])
    yield "sinks", {"sinks": sinks}, ValueError, r"sinks.v has shape .*, expected \(2, 2, 2, 6\)"
    yield "sinks_type", {"sinks": 1}, TypeError, r"sinks is a int, expected WindowSinks"
    yield "backend", {"backend": "gpu"}, ValueError, r"backend is 'gpu', expected"


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[0])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_input(
    case: tuple[str, dict[str, object], type[Exception], str], backend: str | None
) -> None:
    q, k, v = attention_inputs(dtype=torch.float32)
    _, change, error, text = case
    arguments = {"q": q, "k": k, "v": v, "window": 3, "backend": backend} | change
    with pytest.raises(error, match=r"^\[sliding_window_attention\] .*" + text):
        sliding_window_attention(**arguments)  # type: ignore[call-overload]


def bad_macchiato_calls() -> Iterator[tuple[str, dict[str, object], type[Exception], str]]:
    q_latent, k_latent, q, _, _ = macchiato_inputs(dtype=torch.float32)
    yield "columns", {"q_latent": q_latent[..., 1:]}, ValueError, r"q_latent has shape .*, expected"
    yield "tokens", {"k_latent": k_latent[:, :, 1:]}, ValueError, r"k_latent has shape"
    three = k_latent.expand(-1, 3, -1, -1)
    yield "heads", {"k_latent": three}, ValueError, r"multiple of the 3 heads of k_latent"
    yield "dtype", {"k_latent": k_latent.double()}, TypeError, r"k_latent has dtype torch.float64"
    yield "int", {"q_latent": q_latent.int()}, TypeError, r"q_latent has dtype torch.int32"
    yield "window", {"window": -1}, ValueError, r"window is -1, expected at least 0"
    yield "state", {"state": 3}, TypeError, r"state is a int, expected a MacchiatoState"
    yield "no_ring", {"state": MacchiatoState(None, None)}, TypeError, r"state.latent is a NoneType"
    sinks = WindowSinks(q, q[:, :2, :1], q[:, :2, :1])
    yield "sinks", {"window": 0, "sinks": sinks}, ValueError, r"sinks"


@pytest.mark.parametrize("case", list(bad_macchiato_calls()), ids=lambda case: case[0])
def test_bad_macchiato_input(case: tuple[str, dict[str, object], type[Exception], str]) -> None:
    names = ("q_latent", "k_latent", "q", "k", "v")
    _, change, error, text = case
    arguments = dict(zip(names, macchiato_inputs(dtype=torch.float32), strict=True)) | {"window": 3}
    with pytest.raises(error, match=r"^\[macchiato_attention\] .*" + text):
        macchiato_attention(**arguments | change)  # type: ignore[call-overload]


# Inside torch ------------------------------------------------------------------------------------

OPS = torch.ops.latte_ext


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool, dtype: torch.dtype) -> None:
    q_latent, k_latent, q, k, v = macchiato_inputs(latent_heads=2, dtype=dtype)
    q_latent = q_latent.float()
    tensors = [x.requires_grad_(requires_grad) for x in (q_latent, k_latent, q, k, v)]
    q_latent, k_latent, q, k, v = tensors
    mask = random_mask(2, 23)
    window = (q, k, v, mask, None, 4, 0, True, 0.5, requires_grad)
    torch.library.opcheck(OPS.sliding_window_attention.default, window)
    gated = (q_latent, k_latent, None, q, k, v, mask, mask, None, None, None, None)
    scalars = (4, 0, True, 0.5, 1.0)
    torch.library.opcheck(OPS.macchiato_attention.default, (*gated, *scalars, requires_grad))
    if requires_grad:
        return
    y, log_sum, wide = OPS.sliding_window_attention.default(*window[:-1], True)
    saved = (log_sum, y if dtype == torch.float32 else wide, torch.randn_like(y), None)
    torch.library.opcheck(
        OPS.sliding_window_attention_backward.default, (*window[:5], *saved, *window[5:-1])
    )
    y, total, log_sum, wide, _, norm, mean = OPS.macchiato_attention.default(*gated, *scalars, True)
    total = y if dtype == torch.float32 else total
    saved = (total, log_sum, wide, torch.randn_like(y), norm, mean)
    torch.library.opcheck(OPS.macchiato_attention_backward.default, (*gated, *saved, *scalars))
    cache = WindowCache.empty(2, 2, 4, 5, 6, dtype=dtype).tensors()
    rows = [x[:, :, 0] for x in (q, k, v)]
    torch.library.opcheck(
        OPS.sliding_window_attention_step.default, (*rows, *cache, None, None, None, None, 0.5)
    )
    state = (torch.zeros(2, 2, 3), torch.ones(2, 2, 3), torch.zeros(2, 2, 3, 6))
    torch.library.opcheck(
        OPS.macchiato_attention_step.default,
        (
            q_latent[:, :, 0], k_latent[:, :, 0], None, *rows, *state, *cache,
            None, None, None, None, 0.5, 1.0,
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
    for attention, arguments in (
        (sliding_window_attention, inputs[2:]),
        (macchiato_attention, inputs),
    ):
        y = attention(*arguments, window=3)  # type: ignore[operator]
        (dq,) = torch.autograd.grad(y.square().sum(), arguments[0], create_graph=True)
        with pytest.raises(RuntimeError, match="got a second derivative, expected first order"):
            dq.sum().backward()
    state = MacchiatoState(None, WindowCache.empty(2, 2, 4, 5, 6, dtype=torch.float64))
    assert state.window is not None
    rows = [x[:, :, 0] for x in inputs]
    with pytest.raises(RuntimeError, match="expected none: the cache is updated in place"):
        sliding_window_attention_step(*rows[2:], state.window)
