# SPDX-License-Identifier: Apache-2.0
"""The paper's variants as whole models: theorems, caches, both directions, torch's compilers."""

import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latte_ext import reference
from latte_ext.nn import (
    RGLRU,
    VARIANTS,
    LatteBlock,
    LatteConfig,
    LatteEncoder,
    LatteLM,
    LayerCache,
    MacchiatoAttention,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

SETTINGS = settings(deadline=None, max_examples=6, derandomize=True, database=None)
TOKENS, WINDOW = 23, 5
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def one_thread(fixed_surroundings: None) -> Iterator[None]:
    """The tensors are small: a second thread only costs."""
    torch.set_num_threads(1)
    yield
    torch.compiler.reset()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def config(variant: str, **options: Any) -> LatteConfig:
    sizes = {"vocab_size": 32, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_latents": 5}
    for name in VARIANTS[variant].keys() & {"num_latents"}:
        del sizes[name]
    if "window" in VARIANTS[variant]:
        sizes["window"] = WINDOW
    return LatteConfig.named(variant, **{**sizes, **options})


def language_model(variant: str, **options: Any) -> LatteLM:
    """In float64, every parameter away from its start."""
    model = LatteLM(config(variant, **options), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def encoder(variant: str, **options: Any) -> LatteEncoder:
    return LatteEncoder(config(variant, **options), 3, dtype=torch.float64)


def random_tokens(batch: int, tokens: int = TOKENS) -> Tensor:
    return torch.randint(32, (batch, tokens))


def tensors(cache: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(cache) if leaf is not None]


def assert_same(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    for got, want in zip(tensors(actual), tensors(expected), strict=True):
        assert got.dtype == want.dtype
        close(got, want, tolerance)


# The configuration


def test_the_names_mean_what_they_say() -> None:
    assert set(VARIANTS) == {
        "latte", "latte-conv++", "latte-rglru++", "latte-conv-swa++", "latte-rglru-swa++", "softmax"
    }  # fmt: skip
    for variant in VARIANTS:
        made = LatteConfig.named(
            variant,
            vocab_size=9,
            embed_dim=8,
            num_layers=1,
            num_heads=2,
            **({} if variant == "softmax" else {"num_latents": 3}),
        )
        assert made.window == (128 if "swa" in variant or variant == "softmax" else 0)
        assert made.mixer == next((m for m in ("conv", "rglru") if m in variant), "none")
        plus = variant != "latte"
        assert (made.norm, made.mlp, made.bias) == (
            ("rms", "silu", False) if plus else ("layer", "gelu", True)
        )
        model = LatteLM(made)
        kinds = {type(module) for module in model.modules()}
        assert (nn.RMSNorm in kinds) == plus
        assert (nn.LayerNorm in kinds) != plus


def test_options_overrule_the_variant() -> None:
    assert config("latte", window=7).window == 7
    assert config("latte-conv-swa++", mixer="none").mixer == "none"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config("latte").window = 3  # type: ignore[misc]


@pytest.mark.parametrize("width", [16, 96, 100])
def test_a_gated_mlp_has_about_as_many_weights(width: int) -> None:
    plain, gated = (
        LatteConfig(32, width, 1, 4, 5, mlp=mlp).hidden_dim  # type: ignore[arg-type]
        for mlp in ("gelu", "silu")
    )
    assert gated % 8 == 0
    assert 2 * plain <= 3 * gated < 2 * plain + 24
    assert LatteConfig(32, width, 1, 4, 5, mlp_dim=24).hidden_dim == 24


@pytest.mark.parametrize(
    "call",
    [
        lambda: LatteConfig.named("latte++", vocab_size=1, embed_dim=4, num_layers=1, num_heads=1),
        lambda: config("latte", norm="batch"),
        lambda: config("latte", mlp="relu"),
        lambda: config("latte", mixer="ssm"),
        lambda: config("latte", num_layers=0),
        lambda: config("softmax", mixer="conv"),
        lambda: LatteLM(config("latte", num_latents=0)),
        lambda: LatteLM(config("latte", window=-1)),
        lambda: LatteLM(config("latte", latent_heads=3)),
        lambda: LatteLM(config("latte", kv_heads=3)),
        lambda: LatteLM(config("latte-conv-swa++", head_dim=3)),
        lambda: LatteLM(config("latte", latent_dropout=1.0)),
        lambda: MacchiatoAttention(16, 4, 5, window=3, causal=False).step(torch.randn(1, 16), None),  # type: ignore[arg-type]
        lambda: MacchiatoAttention(16, 4, 5, window=3)(torch.randn(1, 3, 15)),
    ],
)
def test_bad_parts_raise(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"\[\w+\] .* expected"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: config("latte", embed_dim="16"),
        lambda: config("latte", window=4.0),
        lambda: config("latte", num_layers=True),
        lambda: config("latte", head_dim=2.5),
        lambda: config("latte", dropout=None),
        lambda: config("latte", tie_head=1),
        lambda: MacchiatoAttention(16, "4", 5, window=3),  # type: ignore[arg-type]
        lambda: MacchiatoAttention(16, 4, 5, window=3)([1]),  # type: ignore[arg-type]
        lambda: MacchiatoAttention(16, 4, 5, window=0)(torch.randn(1, 3, 16), state=3),  # type: ignore[arg-type]
        lambda: LatteLM(config("latte"))(random_tokens(2), key_mask=[True]),  # type: ignore[arg-type]
        lambda: LatteLM(config("latte")).prefill(random_tokens(1), cu_seqlens=[0, 3]),  # type: ignore[arg-type]
        lambda: LatteLM(config("latte"))(random_tokens(2), cache=[3, 3]),  # type: ignore[list-item]
    ],
)
def test_other_types_raise(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"^\[\w+\] .* is a \w+, expected"):
        call()


# The layer


def attention_by_definition(layer: MacchiatoAttention, x: Tensor, x_qk: Tensor) -> Tensor:
    """The layer with every probability as a matrix."""
    heads, tokens = layer.num_heads, x.shape[1]

    def split(y: Tensor, count: int) -> Tensor:
        return y.unflatten(2, (count, -1)).transpose(1, 2).repeat_interleave(heads // count, 1)

    def turned(y: Tensor) -> Tensor:
        assert layer.rotary_base is not None
        half = layer.head_dim // 2
        rate = layer.rotary_base ** (-torch.arange(half, dtype=x.dtype) / half)
        factor = torch.polar(torch.ones(()).to(x.dtype), torch.arange(tokens)[:, None] * rate)
        z = torch.complex(y[..., :half], y[..., half:]) * factor
        return torch.cat([z.real, z.imag], -1)

    v = split(layer.v_proj(x), layer.kv_heads)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    past = distance >= 0 if layer.causal else torch.ones_like(distance, dtype=torch.bool)
    near = past & (distance.abs() < layer.window)
    q = turned(split(layer.q_proj(x), heads))
    k = turned(split(layer.k_proj(x), layer.kv_heads))
    logits = (q @ k.mT / math.sqrt(layer.head_dim)).masked_fill(~near, -math.inf)
    y = logits.softmax(-1) @ v
    if layer.num_latents:
        p = split(layer.q_latent_proj(x_qk), heads).softmax(-1)
        k = split(layer.k_latent_proj(x_qk), layer.latent_heads)
        logits = k.mT.unsqueeze(3).masked_fill(~past, -math.inf)
        mean = torch.einsum("bhlts,bhsd->bhtld", logits.softmax(-1), v)
        y = p[..., :1] * y + torch.einsum("bhtl,bhtld->bhtd", p[..., 1:], mean)
    return layer.out_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"kv_heads": 2}, {"latent_heads": 1}, {"kv_heads": 2, "latent_heads": 4, "head_dim": 6}],
)
@pytest.mark.parametrize("latents", [0, 3])
def test_macchiato_is_its_definition(causal: bool, options: dict[str, Any], latents: int) -> None:
    layer = MacchiatoAttention(
        16, 4, latents, window=WINDOW, causal=causal, dtype=torch.float64, **options
    )
    x, x_qk = torch.randn(2, 2, TOKENS, 16, dtype=torch.float64, requires_grad=True)
    got, expected = layer(x, x_qk=x_qk), attention_by_definition(layer, x, x_qk)
    close(got, expected)
    weight = torch.randn_like(got)
    inputs = [x, *layer.parameters()] + ([x_qk] if latents else [])
    gradients = torch.autograd.grad((got * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for gradient, want in zip(gradients, wanted, strict=True):
        close(gradient, want, 1e-10)


def test_without_a_window_it_is_latent_attention() -> None:
    layer = MacchiatoAttention(16, 4, 5, window=0, kv_heads=2, latent_heads=1).double()
    x = torch.randn(2, TOKENS, 16, dtype=torch.float64)
    q = layer.q_latent_proj(x).unflatten(2, (4, 5)).transpose(1, 2)
    k = layer.k_latent_proj(x).unflatten(2, (1, 5)).transpose(1, 2).expand(-1, 2, -1, -1)
    v = layer.v_proj(x).unflatten(2, (2, 4)).transpose(1, 2)
    y, _ = reference.latent_attention(q, k, v)
    close(layer(x), layer.out_proj(y.transpose(1, 2).flatten(2)))


def test_window_and_latents_start_with_one_half_each() -> None:
    layer = MacchiatoAttention(16, 4, 20, window=3)
    logits = layer.q_latent_proj(torch.zeros(1, 16)).unflatten(1, (4, 21))
    close(logits.softmax(-1)[..., 0], torch.full((1, 4), 0.5), 1e-6)


def test_latent_dropout_drops_the_window_too() -> None:
    layer = MacchiatoAttention(16, 4, 5, window=3, latent_dropout=1 - 1e-12)
    x = torch.randn(2, TOKENS, 16)
    assert (layer(x) == 0).all()
    assert (layer.eval()(x) != 0).any()


# The theorems, for whole models


@variants
@SETTINGS
@given(data=st.data())
def test_t1_whole_split_and_step_agree(variant: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    tokens = data.draw(st.integers(0, 40))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=3)))
    model, x = language_model(variant), random_tokens(data.draw(st.integers(1, 3)), tokens)
    with torch.no_grad():
        whole, final = model(x, return_cache=True)
        pieces, cache = [], None
        for start, stop in itertools.pairwise([0, *cuts, tokens]):
            logits, cache = model(x[:, start:stop], cache=cache, return_cache=True)
            pieces.append(logits)
    close(torch.cat(pieces, 1), whole)
    close(model(x), whole)
    assert_same(cache, final)
    stepped = model.empty_cache(x.shape[0])
    rows = [model.step(x[:, t], stepped) for t in range(tokens)]
    close(torch.stack([whole[:, :0].sum(1), *rows], 1)[:, 1:], whole)
    assert_same(stepped, final)
    if tokens:
        logits, cache = model.prefill(x)
        close(logits, whole[:, -1])
        assert_same(cache, final)


@variants
def test_gradients_cross_a_split(variant: str) -> None:
    model, x = language_model(variant), random_tokens(2)
    weight = torch.randn(2, TOKENS, 32, dtype=torch.float64)
    wanted = torch.autograd.grad((model(x) * weight).sum(), list(model.parameters()))
    head, cache = model(x[:, :9], return_cache=True)
    tail = model(x[:, 9:], cache=cache)
    loss = (torch.cat([head, tail], dim=1) * weight).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, want in zip(gradients, wanted, strict=True):
        close(gradient, want, 1e-10)


@variants
def test_t2_packed_sequences_are_each_alone(variant: str) -> None:
    """And their caches, at different positions, step on together."""
    model, lengths = language_model(variant), [7, 1, 15]
    borders = torch.tensor([0, *itertools.accumulate(lengths)])
    packed, more = random_tokens(1, sum(lengths)), random_tokens(len(lengths), 12)
    alone = [model.prefill(x) for x in packed.split(lengths, 1)]
    logits, cache = model.prefill(packed, cu_seqlens=borders)
    close(logits, torch.cat([logits for logits, _ in alone]))
    joined = tree_map(
        lambda *parts: parts[0] if parts[0] is None else torch.cat(parts),
        *(cache for _, cache in alone),
    )
    assert_same(cache, joined)
    with torch.no_grad():
        for t in range(12):
            logits = model.step(more[:, t], cache)
        close(logits, model(more, cache=joined)[:, -1])
        for n, x in enumerate(packed.split(lengths, 1)):
            whole = model(torch.cat([x, more[n : n + 1]], 1))
            close(logits[n], whole[0, -1])
        first, left = model(
            packed[:, :10], cu_seqlens=torch.tensor([0, 4, 4, 10]), return_cache=True
        )
        second = model(packed[:, 10:], cu_seqlens=torch.tensor([0, 3, 4, 13]), cache=left)
        order = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13, 4, 5, 6, 7, 8, 9, *range(14, 23)])
        pieces = torch.cat([packed[:, :10], packed[:, 10:]], 1)[:, order]
        whole = model(pieces, cu_seqlens=torch.tensor([0, 7, 8, 23]))
        close(torch.cat([first, second], 1)[:, order], whole)


@variants
@pytest.mark.parametrize("side", ["left", "right"])
def test_t3_padding_is_absent(variant: str, side: str) -> None:
    model, x = language_model(variant), random_tokens(2)
    real = slice(8, None) if side == "left" else slice(15)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1] = False
    mask[1, real] = True
    with torch.no_grad():
        got, expected = model(x, key_mask=mask)[1, real], model(x[1:, real])[0]
        close(got, expected)
        if side == "left":
            logits, cache = model.prefill(x, key_mask=mask)
            close(logits, torch.stack([model(x[:1])[0, -1], expected[-1]]))
            more = random_tokens(2, 9)
            for t in range(9):
                logits = model.step(more[:, t], cache)
            close(logits[1], model(torch.cat([x[1:, real], more[1:]], 1))[0, -1])


@variants
def test_the_future_changes_nothing(variant: str) -> None:
    model, x = language_model(variant), random_tokens(1)
    changed = x.clone()
    changed[:, 12:] = (x[:, 12:] + 1) % 32
    assert torch.equal(model(x)[:, :12], model(changed)[:, :12])
    assert not torch.equal(model(x)[:, 12:], model(changed)[:, 12:])


# Caches


@variants
def test_caches_have_a_fixed_size(variant: str) -> None:
    model = LatteLM(config(variant))
    empty, filled = model.empty_cache(3), model.prefill(random_tokens(3, 50))[1]
    for a, b in zip(empty, filled, strict=True):
        assert a.nbytes == b.nbytes > 0
    for x, y in zip(tensors(empty), tensors(filled), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        # Nothing longer is kept alive behind it.
        assert y.untyped_storage().nbytes() == y.nbytes


@variants
def test_caches_are_cloned_and_selected(variant: str) -> None:
    """As beam search does: branches from one past, then the better ones kept."""
    model, x, more = language_model(variant), random_tokens(2), random_tokens(4, 3)
    _, cache = model.prefill(x)
    kept = [layer.clone() for layer in cache]
    beams = [layer.select([0, 0, 1, 1]) for layer in cache]
    for t in range(3):
        logits = model.step(more[:, t], beams)
    assert_same(cache, kept, 0.0)
    whole = model(torch.cat([x.repeat_interleave(2, 0), more], 1))
    close(logits, whole[:, -1])
    chosen, same = ([layer.select(i) for layer in beams] for i in ([3, 0], torch.tensor([-1, -4])))
    close(model.step(more[:2, 0], chosen), model.step(more[:2, 0], same))
    moved = [layer.to("cpu").detach() for layer in cache]
    assert_same(moved, cache, 0.0)
    assert all(isinstance(layer, LayerCache) for layer in moved)
    with pytest.raises(ValueError, match=r"index does not fit"):
        cache[0].select([2])
    assert all(x.shape[0] == 1 for x in tensors(cache[0].select([False, True])))


@variants
def test_generate_samples_from_the_model(variant: str) -> None:
    model, prompt = language_model(variant), random_tokens(2, 4)
    drawn = model.generate(prompt, 8, temperature=0)
    with torch.no_grad():
        assert torch.equal(drawn[:, 4:], model(drawn)[:, 3:-1].argmax(-1))


# Both directions


@variants
def test_encoder_sees_both_directions_and_no_padding(variant: str) -> None:
    model, x = encoder(variant), random_tokens(2)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[:, :4] = mask[:, -3:] = False
    close(model(x, key_mask=mask), model(x[:, 4:-3]))
    assert torch.equal(model(x, key_mask=torch.zeros_like(mask))[0], model.head.bias)
    block = model.blocks[0]
    inputs = torch.randn(1, TOKENS, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(block(inputs)[0, 11].sum(), inputs)
    reach = WINDOW if variant == "softmax" else TOKENS
    seen = gradient[0].abs().sum(1) > 0
    assert torch.equal(seen, (torch.arange(TOKENS) - 11).abs() < reach)


def test_the_mirrored_block_gives_the_mirrored_output() -> None:
    """Mirrored: the two recurrences exchanged. (Rotations and even convolutions have a side.)"""
    settings = config("latte-rglru-swa++", rotary_base=None)
    block = LatteBlock(settings, causal=False, dtype=torch.float64)
    x = torch.randn(1, TOKENS, 16, dtype=torch.float64)
    expected = block(x)
    assert isinstance(block.mixer, RGLRU)
    with torch.no_grad():
        for parameter in block.mixer.parameters():
            parameter.copy_(parameter.flip(0))
    close(block(x.flip(1)).flip(1), expected)


@variants
def test_packed_encoder_blocks(variant: str) -> None:
    block = LatteBlock(config(variant), causal=False, dtype=torch.float64)
    x = torch.randn(1, TOKENS, 16, dtype=torch.float64)
    packed = block(x, cu_seqlens=torch.tensor([0, 7, 7, TOKENS]))
    close(packed, torch.cat([block(x[:, :7]), block(x[:, 7:])], 1))


# Inside torch


@variants
def test_state_dict_round_trip(variant: str) -> None:
    model, x = LatteLM(config(variant)), random_tokens(2)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = LatteLM(config(variant))
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), model(x))


@variants
def test_half_precision_model_steps(variant: str) -> None:
    model, x = LatteLM(config(variant), dtype=torch.bfloat16), random_tokens(2)
    cache = model.empty_cache(2)
    stepped = torch.stack([model.step(x[:, t], cache) for t in range(TOKENS)], dim=1)
    close(stepped, model(x), 0.1)


@variants
def test_every_parameter_learns(variant: str) -> None:
    for model, output in (
        (language_model(variant), 32),
        (encoder(variant).train(), 3),
    ):
        y = model(random_tokens(2))
        assert y.shape[-1] == output
        (y * torch.randn_like(y)).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert (p.grad != 0).any(), name


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)


# Those that test_torch_models.py does not compile: a compilation takes some ten seconds.
others = pytest.mark.parametrize("variant", ["latte-conv-swa++", "latte-rglru++", "softmax"])


@others
def test_compile(variant: str) -> None:
    model = language_model(variant)
    function = compiled(model)
    parameters = list(model.parameters())
    for tokens in (TOKENS, TOKENS + 8):
        x = random_tokens(2, tokens)
        got, expected = function(x), model(x)
        close(got, expected)
        assert_same(
            torch.autograd.grad(got.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters),
            1e-9,
        )


@others
def test_compile_step(variant: str) -> None:
    model, x = language_model(variant), random_tokens(2)
    _, cache = model.prefill(x)
    other = [layer.clone() for layer in cache]
    step = compiled(model.step)
    for t in range(3):
        close(step(x[:, t], other), model.step(x[:, t], cache))
    assert_same(other, cache)


@variants
def test_export(variant: str) -> None:
    model, x = language_model(variant), random_tokens(2)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch, 1: tokens},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    other = random_tokens(3, TOKENS + 10)
    close(loaded(other), model(other))


class OneMore(nn.Module):
    """A decode step without side effects."""

    def __init__(self, model: LatteLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, cache: list[LayerCache]) -> tuple[Tensor, list[LayerCache]]:
        logits, cache = self.model(tokens.unsqueeze(1), cache=cache, return_cache=True)
        return logits.squeeze(1), cache


@variants
def test_export_with_a_cache(variant: str) -> None:
    model, x = language_model(variant), random_tokens(2)
    _, cache = model.prefill(x)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(OneMore(model), (x[:, 0], cache)), buffer)
    buffer.seek(0)
    logits, after = torch.export.load(buffer).module()(x[:, 0], cache)
    close(logits, model.step(x[:, 0], cache))
    assert_same(after, cache)


@variants
def test_caches_are_saved_as_plain_data(variant: str) -> None:
    _, cache = language_model(variant).prefill(random_tokens(2))
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True), cache, 0.0)
