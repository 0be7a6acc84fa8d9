# SPDX-License-Identifier: Apache-2.0
"""T6: a draft and the commit of some of its tokens leave what steps leave, bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import latte_ext
import pytest
import torch
from helpers import load_example
from hypothesis import given, settings
from hypothesis import strategies as st
from latte_ext import LatentState, MacchiatoState, WindowCache, WindowSinks
from latte_ext.nn import RGLRU, VARIANTS, LatentAttention, LatteConfig, LatteLM, ShortConv
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

SETTINGS = settings(deadline=None, max_examples=12, derandomize=True, database=None)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
N, WIDTH = 4, 5


def rows(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    return (spread * torch.randn(shape, dtype=torch.float64)).to(dtype)


def same_bits(actual: object, expected: object) -> None:
    for got, want in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if want is None:
            assert got is None
            continue
        assert got.dtype == want.dtype
        assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


def at_each_end(
    state: Any, step: Callable[[int, Any], Tensor], width: int = WIDTH
) -> tuple[Tensor, list[Any]]:
    """The steps' outputs along dimension -2, and the states after 0 to `width` of them."""
    state, states, outputs = state.clone(), [state.clone()], []
    for i in range(width):
        outputs.append(step(i, state))
        states.append(state.clone())
    return torch.stack(outputs, -2), states


def chosen(states: list[Any], accepted: list[int]) -> Any:
    """Sequence n as it was after accepted[n] steps."""
    return tree_map(
        lambda *parts: (
            parts[0]
            if parts[0] is None
            else torch.stack([parts[count][n] for n, count in enumerate(accepted)])
        ),
        *states,
    )


def read(tokens: int, latents: int, dim: int, heads: int, dtype: torch.dtype) -> LatentState:
    shape = (N, heads, tokens)
    k, v = rows(*shape, latents, dtype=dtype), rows(*shape, dim, dtype=dtype)
    return latte_ext.latent_attention(k, k, v, return_state=True)[1]


counts = st.lists(st.integers(0, WIDTH), min_size=N, max_size=N)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1)])
@SETTINGS
@given(
    accepted=counts, tokens=st.sampled_from([0, 9]), spread=st.sampled_from([1.0, 40.0]),
    scale=st.sampled_from([1.0, 0.7, -0.3]), seed=st.integers(0, 99),
    sizes=st.sampled_from([(1, 1), (5, 7), (16, 33)]),
)  # fmt: skip
def test_latents(
    dtype: torch.dtype, heads: int, kv_heads: int, accepted: list[int], tokens: int, spread: float,
    scale: float, seed: int, sizes: tuple[int, int],
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    latents, dim = sizes
    q = rows(N, heads, WIDTH, latents, dtype=dtype)
    k = rows(N, kv_heads, WIDTH, latents, dtype=dtype, spread=spread)
    k[k > 1.5 * spread] = -torch.inf
    v = rows(N, kv_heads, WIDTH, dim, dtype=dtype)
    state = read(tokens, latents, dim, kv_heads, dtype)
    wanted, states = at_each_end(
        state,
        lambda i, s: latte_ext.latent_attention_step(
            q[:, :, i], k[:, :, i], v[:, :, i], s, scale=scale
        ),
    )
    before = state.clone()
    y, draft = latte_ext.latent_attention_draft(q, k, v, state, scale=scale)
    same_bits(y, wanted)
    same_bits(state, before)
    state.commit(draft, accepted)
    same_bits(state, chosen(states, accepted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("with_sinks", [False, True])
@SETTINGS
@given(accepted=counts, tokens=st.sampled_from([0, 2, 13]), seed=st.integers(0, 99))
def test_windows(
    dtype: torch.dtype, window: int, with_sinks: bool, accepted: list[int], tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    past = rows(3, N, 2, tokens, 6, dtype=dtype).unbind()
    _, cache = latte_ext.sliding_window_attention(*past, window=window, return_cache=True)
    cache = cache.clone()
    cache.valid[0] = False
    q, (k, v) = rows(N, 4, WIDTH, 6, dtype=dtype), rows(2, N, 2, WIDTH, 6, dtype=dtype).unbind()
    sinks = None
    if with_sinks:
        places = torch.arange(2).expand(N, -1)
        sinks = WindowSinks(q, rows(N, 2, 2, 6, dtype=dtype), rows(N, 2, 2, 6, dtype=dtype), places)

    def step(i: int, cache: WindowCache) -> Tensor:
        seen = None if sinks is None else sinks._replace(q=q[:, :, i])
        return latte_ext.sliding_window_attention_step(
            q[:, :, i], k[:, :, i], v[:, :, i], cache, sinks=seen, softcap=9.0
        )

    wanted, caches = at_each_end(cache, step)
    before = cache.clone()
    y, draft = latte_ext.sliding_window_attention_draft(q, k, v, cache, sinks=sinks, softcap=9.0)
    same_bits(y, wanted)
    same_bits(cache, before)
    cache.commit(draft, torch.tensor(accepted, dtype=torch.int32))
    same_bits(cache, chosen(caches, accepted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("latent_heads", [1, 2, 4])
@pytest.mark.parametrize(("window", "latents"), [(3, 5), (3, 0), (0, 5)])
@pytest.mark.parametrize("own_values", [False, True])
def test_macchiato(
    dtype: torch.dtype, latent_heads: int, window: int, latents: int, own_values: bool
) -> None:
    torch.manual_seed(0)

    def inputs(tokens: int) -> tuple[Tensor, ...]:
        return (
            rows(N, 4, tokens, 1 + latents, dtype=dtype),
            rows(N, latent_heads, tokens, latents, dtype=dtype),
            rows(N, 4, tokens, 6, dtype=dtype),
            *rows(2, N, 2, tokens, 6, dtype=dtype).unbind(),
        )

    _, state = latte_ext.macchiato_attention(*inputs(7), window=window, return_state=True)
    more = inputs(WIDTH)
    values = rows(N, 2, WIDTH, 6, dtype=dtype) if own_values else None

    def step(i: int, state: MacchiatoState) -> Tensor:
        return latte_ext.macchiato_attention_step(
            *(x[:, :, i] for x in more), state,
            latent_scale=0.7, v_latent=None if values is None else values[:, :, i],
        )  # fmt: skip

    accepted = [0, 2, 5, 3]
    wanted, states = at_each_end(state, step)
    before = state.clone()
    y, draft = latte_ext.macchiato_attention_draft(*more, state, latent_scale=0.7, v_latent=values)
    same_bits(y, wanted)
    same_bits(state, before)
    state.commit(draft, accepted)
    same_bits(state, chosen(states, accepted))


@pytest.mark.parametrize("dtype", DTYPES)
@SETTINGS
@given(accepted=counts, seed=st.integers(0, 99), channels=st.sampled_from([1, 7, 40]))
def test_mixers(dtype: torch.dtype, accepted: list[int], seed: int, channels: int) -> None:
    torch.manual_seed(seed)
    shape = (N, WIDTH, channels)
    x, gate_a, gate_x = rows(3, *shape, dtype=dtype).unbind()
    log_lambda, weight = rows(channels, dtype=dtype), rows(channels, 4, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    h, fresh = rows(N, channels, dtype=wide), torch.tensor([True, False, False, True])
    h[fresh] = 0
    unread = fresh.clone()

    def rg_lru_step(i: int, h: Tensor) -> Tensor:
        y = latte_ext.rg_lru_step(x[:, i], gate_a[:, i], gate_x[:, i], log_lambda, h, fresh=unread)
        unread.zero_()
        return y

    wanted, states = at_each_end(h, rg_lru_step)
    same_bits(latte_ext.rg_lru(x, gate_a, gate_x, log_lambda, h0=h, fresh=fresh), wanted)
    after = h.clone()
    latte_ext.rg_lru_commit(after, x, gate_a, gate_x, log_lambda, accepted, fresh=fresh)
    same_bits(after, chosen(states, accepted))

    linear, states = h.clone(), [h]
    for i in range(WIDTH):
        one = slice(i, i + 1)
        states.append(
            latte_ext.linear_recurrence(
                gate_a[:, one], x[:, one], h0=states[-1], return_state=True
            )[1]
        )
    linear[2] = states[0][2] = -0.0
    latte_ext.linear_recurrence_commit(linear, gate_a, x, [*accepted[:2], 0, accepted[3]])
    same_bits(linear, chosen(states, [*accepted[:2], 0, accepted[3]]))

    tail = rows(N, 3, channels, dtype=dtype)
    wanted, states = at_each_end(
        tail, lambda i, s: latte_ext.short_conv_step(x[:, i], weight, None, s)
    )
    same_bits(latte_ext.short_conv(x, weight, state=tail), wanted)
    latte_ext.short_conv_commit(tail, x, accepted)
    same_bits(tail, chosen(states, accepted))


def test_a_refused_token_with_scale_zero() -> None:
    """-inf times 0 would be NaN."""
    state, q = read(3, 5, 7, 2, torch.float32), rows(N, 2, 2, 5)
    _, draft = latte_ext.latent_attention_draft(q, q, rows(N, 2, 2, 7), state, scale=0.0)
    before = state.clone()
    state.commit(draft, [0, 0, 2, 0])
    same_bits(state.select([0, 1, 3]), before.select([0, 1, 3]))
    assert not state.mean.isnan().any()


# Layers and models


def language_model(variant: str, **options: Any) -> LatteLM:
    sizes = {"vocab_size": 32, "embed_dim": 16, "num_layers": 2, "num_heads": 4}
    if variant != "softmax":
        sizes["num_latents"] = 5
    window = {"window": 3} if "window" in VARIANTS[variant] else {}
    config = LatteConfig.named(variant, **{**sizes, **window, **options})
    return LatteLM(config, dtype=torch.float64).eval()


GROUPS = [{}, {"kv_heads": 2}, {"kv_heads": 2, "latent_heads": 1}]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", GROUPS)
@pytest.mark.parametrize("tokens", [0, 11])
def test_models(variant: str, options: dict[str, Any], tokens: int) -> None:
    """To rounding, since a matrix product of w rows rounds differently from w of one."""
    model = language_model(variant, **options)
    past, more = torch.randint(32, (N, tokens)), torch.randint(32, (N, WIDTH))
    cache = model.empty_cache(N)
    with torch.no_grad():
        _, cache = model(past, cache=cache, return_cache=True)
    before = [layer.clone() for layer in cache]
    stepped, states = [layer.clone() for layer in cache], [before]
    wanted = []
    for i in range(WIDTH):
        wanted.append(model.step(more[:, i], stepped))
        states.append([layer.clone() for layer in stepped])
    logits, draft = model.draft(more, cache)
    torch.testing.assert_close(logits, torch.stack(wanted, 1), rtol=0, atol=1e-12)
    same_bits(cache, before)
    accepted = [0, 2, WIDTH, 3]
    model.commit(cache, draft, accepted)
    want = tree_map(
        lambda *parts: (
            parts[0]
            if parts[0] is None
            else torch.stack([parts[count][n] for n, count in enumerate(accepted)])
        ),
        *states,
    )
    for got, expected in zip(tree_leaves(cache), tree_leaves(want), strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    same_bits([layer.select([0]) for layer in cache], [layer.select([0]) for layer in before])


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_refused_has_no_influence(variant: str) -> None:
    """Not a bit: neither the refused tokens nor the neighbours' counts."""
    model = language_model(variant)
    _, cache = model.prefill(torch.randint(32, (N, 6)))
    tokens = torch.randint(32, (N, WIDTH))
    other = tokens.clone()
    other[:, 2:] = (other[:, 2:] + 1) % 32
    results = []
    for drafted, accepted in ((tokens, [2, 2, 2, 2]), (other, [2, 0, 2, 1])):
        mine = [layer.clone() for layer in cache]
        model.commit(mine, model.draft(drafted, mine)[1], accepted)
        results.append([layer.select([0, 2]) for layer in mine])
    same_bits(*results)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_latent_layer(kv_heads: int) -> None:
    layer = LatentAttention(16, 4, 5, kv_heads=kv_heads, dtype=torch.float64)
    x = rows(N, WIDTH, 16, dtype=torch.float64)
    state = layer.empty_state(N)
    y, draft = layer.draft(x, state)
    stepped = layer.empty_state(N)
    wanted = torch.stack([layer.step(x[:, i], stepped) for i in range(WIDTH)], 1)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-13)
    state.commit(draft, [WIDTH] * N)
    torch.testing.assert_close(state.mean, stepped.mean, rtol=0, atol=1e-13)


def test_memory_of_a_draft_is_that_of_its_factors() -> None:
    _, draft = latte_ext.latent_attention_draft(
        rows(1, 2, 3, 8),
        k := rows(1, 2, 3, 8),
        v := rows(1, 2, 3, 16),
        read(2, 8, 16, 2, torch.float32).select([0]),
    )
    assert draft.k is k
    assert draft.v is v


def test_drafts_pass_through_copies_and_files(tmp_path: Any) -> None:
    state = read(3, 5, 7, 2, torch.float32)
    _, draft = latte_ext.latent_attention_draft(
        rows(N, 2, 3, 5), rows(N, 2, 3, 5), rows(N, 2, 3, 7), state
    )
    torch.save(draft, tmp_path / "draft")
    other = state.clone()
    other.commit(torch.load(tmp_path / "draft"), [1, 2, 3, 0])
    state.commit(copy.deepcopy(draft), [1, 2, 3, 0])
    same_bits(other, state)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("width", [1, 4])
def test_speculative_generation_is_greedy_generation(variant: str, width: int) -> None:
    """With a proposer that is right now and then, so that sequences keep different counts."""
    module = load_example("speculative")
    model = language_model(variant)
    small = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    prompt = torch.randint(32, (N, 6))
    result = module.generate(model, small, prompt, 25, width=width)
    assert torch.equal(result.tokens, model.generate(prompt, 25, temperature=0))
    if width == 1:
        assert (result.passes, result.proposed) == (24, 0)
    else:
        assert result.passes < 24
        assert 0 < result.accepted < result.proposed


def test_the_example_says_what_it_saved(capsys: pytest.CaptureFixture[str]) -> None:
    load_example("speculative").main([])
    assert "same tokens as greedy decoding: True" in capsys.readouterr().out


# Bad input


def latent_draft(width: int = 3) -> tuple[LatentState, Any]:
    state = LatentState.empty(N, 2, 5, 7)
    q = rows(N, 2, width, 5)
    return state, latte_ext.latent_attention_draft(q, q, rows(N, 2, width, 7), state)[1]


@pytest.mark.parametrize(
    ("accepted", "error", "message"),
    [
        ([0, 1, 2, 4], ValueError, r"accepted is \[0, 1, 2, 4\], expected 0 to 3 tokens each"),
        ([0, -1, 2, 3], ValueError, r"accepted is \[0, -1, 2, 3\], expected 0 to 3"),
        ([0, 1, 2], ValueError, r"accepted has shape \(3,\), expected \(4,\)"),
        (2, ValueError, r"accepted has shape \(\), expected"),
        ([0.0, 1.0, 2.0, 3.0], TypeError, "dtype torch.float32, expected signed integers"),
        (torch.ones(N, dtype=torch.bool), TypeError, "dtype torch.bool"),
        ("many", TypeError, "accepted is a str"),
    ],
)
def test_bad_counts(accepted: Any, error: type[Exception], message: str) -> None:
    state, draft = latent_draft()
    before = state.clone()
    with pytest.raises(error, match=r"^\[LatentState.commit\] .*" + message):
        state.commit(draft, accepted)
    same_bits(state, before)


def test_bad_drafts() -> None:
    state, draft = latent_draft()
    with pytest.raises(TypeError, match=r"^\[LatentState.commit\] draft is a tuple, expected"):
        state.commit(tuple(draft), [0] * N)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^\[LatentState.commit\] draft.k has shape"):
        LatentState.empty(N, 2, 4, 7).commit(draft, [0] * N)
    with pytest.raises(ValueError, match=r"^\[LatentState.commit\] draft.v has shape"):
        LatentState.empty(N, 2, 5, 6).commit(draft, [0] * N)
    model, other = language_model("latte-conv++"), language_model("latte-rglru++")
    tokens = torch.randint(32, (N, 3))
    _, drafts = model.draft(tokens, model.empty_cache(N))
    with pytest.raises(TypeError, match=r"^\[LatteLM.commit\] draft.mixer is a ConvDraft"):
        other.commit(other.empty_cache(N), drafts, [1] * N)
    windowed = language_model("latte-conv-swa++")
    with pytest.raises(TypeError, match=r"^\[LatteLM.commit\] draft.window is a NoneType"):
        windowed.commit(windowed.empty_cache(N), drafts, [1] * N)
    for layer in (RGLRU(4, causal=False), ShortConv(4, causal=False)):
        with pytest.raises(ValueError, match="draft got causal=False"):
            layer.draft(torch.randn(1, 2, 4), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": rows(N, 3, 3, 5)}, ValueError, "q has 3 heads"),
        ({"q": rows(N, 2, 5)}, ValueError, "q has shape"),
        ({"k": rows(N, 2, 2, 5)}, ValueError, "k has shape"),
        (
            {"v": rows(N, 2, 3, 7, dtype=torch.float64)},
            TypeError,
            "have dtypes float32, float32, float64",
        ),
        ({"state": None}, TypeError, "state is a NoneType"),
        ({"state": LatentState.empty(1, 2, 5, 7)}, ValueError, "shape"),
        ({"scale": "1"}, TypeError, "scale is a str"),
        ({"q": rows(N, 2, 3, 5).requires_grad_()}, RuntimeError, "requires grad"),
    ],
)
def test_bad_inputs_of_a_draft(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    q = rows(N, 2, 3, 5)
    whole = {"q": q, "k": q, "v": rows(N, 2, 3, 7), "state": LatentState.empty(N, 2, 5, 7)}
    with pytest.raises(error, match=r"^\[latent_attention_draft\] .*" + message):
        latte_ext.latent_attention_draft(**{**whole, **change})


def test_bad_inputs_of_windows_and_mixers() -> None:
    q = rows(N, 2, 3, 6)
    cache = WindowCache.empty(N, 2, 4, 6, 6)
    with pytest.raises(ValueError, match=r"^\[sliding_window_attention_draft\] cache.value has"):
        latte_ext.sliding_window_attention_draft(q, q, rows(N, 2, 3, 5), cache)
    with pytest.raises(ValueError, match=r"^\[sliding_window_attention_draft\] "):
        latte_ext.sliding_window_attention_draft(q, rows(N, 2, 2, 6), q, cache)
    with pytest.raises(ValueError, match=r"^\[macchiato_attention_draft\] "):
        latte_ext.macchiato_attention_draft(
            rows(N, 2, 3, 5), rows(N, 2, 3, 5), q, q, q, MacchiatoState(None, cache)
        )
    x = rows(N, 3, 6)
    with pytest.raises(ValueError, match=r"^\[short_conv_commit\] x has shape"):
        latte_ext.short_conv_commit(rows(N, 3, 5), x, [0] * N)
    with pytest.raises(ValueError, match=r"^\[rg_lru_commit\] gate_x has shape"):
        latte_ext.rg_lru_commit(rows(N, 6), x, x, x[:, :2], rows(6), [0] * N)
    with pytest.raises(ValueError, match=r"^\[linear_recurrence_commit\] accepted is"):
        latte_ext.linear_recurrence_commit(rows(N, 6), x, x, [4] * N)
    with pytest.raises(ValueError, match=r"^\[LatteLM\] tokens has shape"):
        language_model("latte").draft(torch.zeros(3, dtype=torch.int64), [])


@pytest.mark.parametrize("variant", ["latte-conv-swa++", "latte-rglru-swa++"])
def test_a_refused_call_leaves_every_layer(variant: str) -> None:
    model, tokens = language_model(variant), torch.randint(32, (N, 5))
    _, cache = model.prefill(tokens)
    before = [layer.clone() for layer in cache]
    _, draft = model.draft(tokens, cache)
    short = model.draft(tokens[:, :2], cache)[1]
    other = [cache[0], *(layer.select([0, 1]) for layer in cache[1:])]
    missing = [cache[0], *(layer._replace(mixer=None) for layer in cache[1:])]
    part = draft[-1]._replace(attention=draft[-1].attention._replace(window=None))
    for error, call in (
        (ValueError, lambda: model.commit(cache, draft[:1], [1] * N)),
        (ValueError, lambda: model.commit(cache, [draft[0], *short[1:]], [1] * N)),
        (ValueError, lambda: model.commit(cache, draft, [1, 2, 6])),
        (TypeError, lambda: model.commit(cache, [*draft[:-1], part], [1] * N)),
        (ValueError, lambda: model.step(tokens[:, 0], cache[:1])),
        (ValueError, lambda: model.step(tokens[:, 0], other)),
        (ValueError, lambda: model.step(tokens, cache)),
        (TypeError, lambda: model.step(tokens[:, 0], missing)),
        (TypeError, lambda: model.step(tokens[:, 0], None)),  # type: ignore[arg-type]
        (TypeError, lambda: model.step([1] * N, cache)),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=r"^\[[\w.]+\] .*, expected"):
            call()
        same_bits(cache, before)


@pytest.mark.parametrize(("sequences", "width"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_draft(sequences: int, width: int) -> None:
    """No sequences, or no tokens: outputs without rows, and a commit that changes nothing."""
    for variant in VARIANTS:
        model = language_model(variant)
        cache = model.empty_cache(sequences)
        tokens = torch.randint(32, (sequences, width))
        logits, draft = model.draft(tokens, cache)
        assert logits.shape == (sequences, width, 32)
        model.commit(cache, draft, [0] * sequences)
        same_bits(cache, model.empty_cache(sequences))


@pytest.mark.parametrize("variant", ["latte-rglru-swa++", "latte-conv-swa++"])
def test_in_inference_mode(variant: str) -> None:
    model, tokens = language_model(variant), torch.randint(32, (2, 3))
    caches = []
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            cache = model.empty_cache(2)
            model.commit(cache, model.draft(tokens, cache)[1], [1, 3])
            caches.append(cache)
    same_bits(*caches)
