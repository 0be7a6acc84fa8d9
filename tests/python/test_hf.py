# SPDX-License-Identifier: Apache-2.0
"""Conversion of transformers' models: lossless, and the same by every way to compute it."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from hf_helpers import FAMILIES, logits, one_thread, tiny, tokens  # noqa: E402, F401
from latte_ext import hf  # noqa: E402
from latte_ext.hf.convert import attention_layers  # noqa: E402

# A gate that matters, and latents that differ.
OPEN: dict[str, Any] = {"window": 8, "latents": 5, "sinks": 2, "gate": 0.5, "init_std": 0.4}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one latent head": {"latent_heads": 1},
    "heads": {"features": "heads"},
    "heads, one latent head": {"features": "heads", "latent_heads": 1},
    "conv": {"mixer": "conv"},
    "rglru": {"mixer": "rglru"},
    "decay": {"decay": True},
    "gain and output": {"value_gain": True, "output_rank": 3},
    "no sinks": {"sinks": 0},
    "window and sinks alone": {"latents": 0},
    "some layers": {"layers": [1]},
}


def converted(family: str = "llama", **options: Any) -> Any:
    """A tiny model whose latents matter."""
    model = hf.convert(tiny(family), **{**OPEN, **options})
    with torch.no_grad():
        for index, parameter in enumerate(model.latte_parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def assert_same(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_lossless(family: str) -> None:
    """With the gate shut and a window over everything, the pretrained model."""
    model, ids = tiny(family), tokens()
    want = logits(model, ids)
    hf.convert(model, window=64, latents=4, sinks=2, gate=40.0)
    assert_same(logits(model, ids), want, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_window_and_sinks(family: str) -> None:
    """Latents that never see more than the window change nothing but what is theirs; a short
    window does change the result, and generation with a cache equals that without."""
    model, ids = tiny(family), tokens()
    want = logits(model, ids)
    hf.convert(model, **OPEN)
    got = logits(model, ids)
    assert (got - want).abs().max() > 1e-3
    cache = hf.LatteCache(model.config)
    parts = [
        model(input_ids=part, cache=cache, use_cache=True).logits
        for part in ids.split([13, 1, 9, 17], dim=1)
    ]
    assert_same(torch.cat(parts, dim=1), got)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cache(variant: str) -> None:
    """Chunks and steps with a cache give what one call without it gives."""
    model, ids = converted(**VARIANTS[variant]), tokens()
    want = logits(model, ids)
    cache = hf.LatteCache(model.config)
    with torch.no_grad():
        parts = [
            model(input_ids=part, cache=cache, use_cache=True).logits
            for part in ids.split([3, 1, 20, *[1] * 16], dim=1)
        ]
    assert_same(torch.cat(parts, dim=1), want)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate(variant: str) -> None:
    model, ids = converted(**VARIANTS[variant]), tokens(2, 20)
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), want)
    assert torch.equal(model.generate(ids, prefill_chunk_size=7, **options), want)


def test_generate_beams_and_samples() -> None:
    model, ids = converted(), tokens(2, 12)
    options = {"max_new_tokens": 16, "attention_mask": torch.ones_like(ids)}
    beams = {**options, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    want = model.generate(ids, use_cache=False, **beams)
    assert torch.equal(model.generate(ids, **beams), want)
    samples = {**options, "num_return_sequences": 3, "do_sample": True}
    torch.manual_seed(5)
    want = model.generate(ids, use_cache=False, **samples)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, **samples), want)


def test_cache_size_is_constant() -> None:
    model = converted()
    sizes = []
    for count in (16, 200):
        cache = hf.LatteCache(model.config)
        model.generate(
            tokens(1, 10), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            cache=cache, attention_mask=torch.ones(1, 10),
        )  # fmt: skip
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1] > 0


def test_conversation_goes_on_with_its_cache() -> None:
    model, ids = converted(), tokens(1, 30)
    cache = hf.LatteCache(model.config)
    options = {"max_new_tokens": 5, "do_sample": False}
    first = model.generate(ids[:, :12], cache=cache, **options)
    again = torch.cat([first, ids[:, 12:]], dim=1)
    got = model.generate(again, cache=cache, **options)
    assert torch.equal(got, model.generate(again, use_cache=False, **options))
    cache.reset()
    assert torch.equal(model.generate(ids[:, :12], cache=cache, **options), first)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["plain", "heads", "conv", "rglru"])
def test_padding(side: str, variant: str) -> None:
    """A padded row gives what it gives alone."""
    model, ids = converted(**VARIANTS[variant]), tokens(2, 40)
    short = 23
    mask = torch.ones_like(ids)
    real = slice(40 - short, None) if side == "left" else slice(short)
    mask[0] = 0
    mask[0, real] = 1
    ids = ids * mask
    position = (mask.cumsum(1) - 1).clamp(min=0)
    got = logits(model, ids, attention_mask=mask, position_ids=position)
    assert_same(got[0, real], logits(model, ids[:1, real])[0])
    assert_same(got[1], logits(model, ids[1:])[0])


@pytest.mark.parametrize("variant", ["plain", "conv"])
def test_padded_generation(variant: str) -> None:
    model, ids = converted(**VARIANTS[variant]), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    both = model.generate(ids * mask, attention_mask=mask, **options)
    alone = model.generate(ids[:1, 9:], attention_mask=torch.ones(1, 11), **options)
    assert torch.equal(both[0, 20:], alone[0, 11:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed(variant: str) -> None:
    """Rows whose positions start again are sequences of their own."""
    model, ids = converted(**VARIANTS[variant]), tokens(2, 40)
    lengths = ([11, 29], [40])
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    got = logits(model, ids, position_ids=position)
    for row, parts in enumerate(lengths):
        start = 0
        for count in parts:
            alone = logits(model, ids[row : row + 1, start : start + count])
            assert_same(got[row, start : start + count], alone[0])
            start += count


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_assisted_generation(how: str) -> None:
    model = converted()
    ids = tokens(1, 8).repeat(1, 3)
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    want = model.generate(ids, **options)
    if how == "assistant":
        options["assistant_model"] = converted(gate=2.0)
    else:
        options["prompt_lookup_num_tokens"] = 4
    assert torch.equal(model.generate(ids, **options), want)


def test_crop() -> None:
    model, ids = converted(mixer="conv"), tokens(1, 40)
    want = logits(model, ids)
    cache = hf.LatteCache(model.config)
    options = {"cache": cache, "use_cache": True}
    with torch.no_grad():
        model(input_ids=ids[:, :20], **options)
        with pytest.raises(RuntimeError, match=r"\[LatteCache\] crop"):
            cache.crop(-1)
        cache.activate_past_recording()
        model(input_ids=ids[:, 20:25], **options)
        model(input_ids=ids[:, 25:26], **options)
        cache.crop(-3)
        got = model(input_ids=ids[:, 23:], **options).logits
    assert_same(got, want[:, 23:])


@pytest.mark.parametrize("variant", ["plain", "conv", "rglru", "window and sinks alone"])
def test_cache_moves_and_multiplies(variant: str) -> None:
    """Offloading and batches that are repeated or chosen leave each row its past."""
    model, ids = converted(**VARIANTS[variant]), tokens(2, 30)
    want = logits(model, ids)
    cache = hf.LatteCache(model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :20], cache=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        cache.reorder_cache(torch.tensor([0, 2]))
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        again = ids[[1, 0]]
        got = model(input_ids=again[:, 20:], cache=cache, use_cache=True).logits
    assert_same(got, want[[1, 0], 20:])
    assert cache.batch_size == 2


def load_half(model: Any, folder: Path) -> Any:
    """In bfloat16, as from_pretrained does it: with rotations in float32."""
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_rotates_as_float32(family: str, tmp_path: Path) -> None:
    wide, half = tiny(family), load_half(tiny(family), tmp_path)
    for model in (wide, half):
        hf.convert(model, **OPEN)
    for one, other in zip(attention_layers(wide), attention_layers(half), strict=True):
        assert (one.latte_plan.rotation is None) == (other.latte_plan.rotation is None)
        if one.latte_plan.rotation is not None:
            assert one.latte_plan.rotation == other.latte_plan.rotation


def test_weights_stay_float32_beside_bfloat16(tmp_path: Path) -> None:
    model = hf.convert(load_half(tiny(), tmp_path / "pretrained"), **OPEN)
    ids = tokens()
    assert {p.dtype for p in model.latte_parameters()} == {torch.float32}
    loaded = load_half(model, tmp_path / "converted")
    assert {p.dtype for p in loaded.latte_parameters()} == {torch.float32}
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_cache_by_its_old_name() -> None:
    """past_key_values, which transformers renamed: the cache that was given, no new one."""
    model, ids = converted(), tokens(1, 30)
    want = logits(model, ids)
    cache = hf.LatteCache(model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with torch.no_grad():
            model(input_ids=ids[:, :20], past_key_values=cache)
            got = model(input_ids=ids[:, 20:], past_key_values=cache).logits
    assert_same(got, want[:, 20:])
    assert cache.get_seq_length() == 30


def test_cache_in_training() -> None:
    """None by default, and one where it is asked for."""
    model, ids = converted().train(), tokens(1, 12)
    assert model(input_ids=ids).cache is None
    assert isinstance(model(input_ids=ids, use_cache=True).cache, hf.LatteCache)
    assert isinstance(model.eval()(input_ids=ids).cache, hf.LatteCache)


@pytest.mark.parametrize("options", [{"latent_heads": 3}, {"layers": [7]}, {"window": 0}])
def test_a_refused_conversion_leaves_the_model(options: dict[str, Any]) -> None:
    model, ids = tiny(), tokens()
    want = logits(model, ids)
    with pytest.raises(ValueError, match=r"\["):
        hf.convert(model, **{**OPEN, **options})
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(model, ids), want)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(variant: str, tmp_path: Path) -> None:
    model, ids = converted(**VARIANTS[variant]), tokens()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_families(family: str, tmp_path: Path) -> None:
    model, ids = converted(family), tokens()
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_adapter(tmp_path: Path) -> None:
    model, ids = converted(), tokens()
    hf.save_adapter(model, tmp_path)
    assert torch.equal(logits(hf.load_adapter(tiny(), tmp_path), ids), logits(model, ids))
    with pytest.raises(ValueError, match=r"\[load_adapter\] model is of type 'qwen2'"):
        hf.load_adapter(tiny("qwen2"), tmp_path)
    with pytest.raises(ValueError, match=r"\[load_adapter\] .* is \("):
        hf.load_adapter(converted(latents=4), tmp_path)


def test_copy_and_pickle() -> None:
    model, ids = converted(output_rank=2), tokens()
    want = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), want)
        next(other.latte_parameters()).data.add_(1)
    assert torch.equal(logits(model, ids), want)


def test_only_the_new_is_trained() -> None:
    model = hf.convert(tiny(), **OPEN, output_rank=2, value_gain=True)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".latte." in name for name in trained)
    assert len(trained) == len(list(model.latte_parameters()))
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_gradient_checkpointing() -> None:
    model, ids = converted(), tokens()
    parameters = list(model.latte_parameters())
    model.train()
    want = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters)
    model.activation_checkpointing_enable()
    got = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision() -> None:
    model, ids = converted(), tokens()
    want = logits(model, ids)
    half = converted().to(torch.bfloat16)
    got = logits(half, ids).float()
    assert (got - want).abs().max() < 0.1 * want.abs().max()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert half.generate(ids, **options).shape == (2, 48)


def test_pipeline(caplog: pytest.LogCaptureFixture) -> None:
    model = converted()
    vocabulary = {f"t{i}": i for i in range(97)}
    from tokenizers import Tokenizer as Raw
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    raw = Raw(WordLevel(vocabulary, unk_token="t3"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="t0")
    generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    out = generate("t4 t5 t6", max_new_tokens=4, do_sample=False)
    assert out[0]["generated_text"].startswith("t4 t5 t6t")
    assert not [record for record in caplog.records if "not supported" in record.message]


def test_pretrained_configuration_is_left_alone() -> None:
    model = tiny()
    config = model.config
    hf.convert(model, **OPEN)
    assert not hasattr(config, "latte")
    assert config.model_type == "llama"
    assert model.config.model_type == "latte_llama"
    assert all(layer.config is model.config for layer in attention_layers(model))


def bad(**options: Any) -> Any:
    return hf.convert(tiny(), **{**OPEN, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0"),
        ({"latents": -1}, "latents is -1"),
        ({"sinks": -1}, "sinks is -1"),
        ({"layers": [7]}, "layers has 7"),
        ({"latent_heads": 3}, "latent_heads is 3"),
        ({"features": "other"}, "features is 'other'"),
        ({"features": "heads", "mixer": "conv"}, "mixer is 'conv'"),
        ({"mixer": "lstm"}, "mixer is 'lstm'"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad(**options)


def test_bad_use() -> None:
    with pytest.raises(TypeError, match="'windows'"):
        bad(windows=3)
    for option, value, kind in (
        ("window", None, "an int"), ("latents", 2.5, "an int"), ("decay", 1, "a bool"),
        ("gate", "5", "a float"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=rf"^\[LatteSettings\] {option} is a .*expected {kind}"):
            bad(**{option: value})
    with pytest.raises(TypeError, match=r"^\[convert\] model is a NoneType, expected a PreTrained"):
        hf.convert(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="converted already"):
        hf.convert(converted())
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type is 'dynamic'"):
        hf.convert(tiny(rope_parameters=rope), **OPEN)
    with pytest.raises(ValueError, match=r"\[save_adapter\] model is a LlamaForCausalLM"):
        hf.save_adapter(tiny(), "unused")
    model, ids = converted(), tokens()
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 40, 40\)"):
        logits(model, ids, attention_mask=mask)
    cache = transformers.DynamicCache()
    with pytest.raises(TypeError, match="cache is a DynamicCache, expected LatteCache"):
        logits(model, ids, cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="cache_implementation is 'static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match="without latents"):
        hf.LatteCache(tiny().config)
    model = hf.convert(tiny(attention_dropout=0.1), **OPEN)
    model.train()
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        model(input_ids=ids)
