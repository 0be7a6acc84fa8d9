# SPDX-License-Identifier: Apache-2.0
"""Conversion of encoders, which attend in both directions, and tables of learned positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from hf_helpers import SIZES, one_thread, randomized, tiny, tokens  # noqa: E402, F401
from latte_ext import hf  # noqa: E402
from latte_ext.hf.positions import extended_rows  # noqa: E402

_BERT = {
    "vocab_size": SIZES["vocab_size"], "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": SIZES["vocab_size"], "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip

# Model class: configuration class, options, automatic class.
ENCODERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "BertModel": ("BertConfig", _BERT, "AutoModel"),
    "BertForMaskedLM": ("BertConfig", _BERT, "AutoModelForMaskedLM"),
    "BertForSequenceClassification": ("BertConfig", _BERT, "AutoModelForSequenceClassification"),
    "BertForTokenClassification": ("BertConfig", _BERT, "AutoModelForTokenClassification"),
    "RobertaModel": ("RobertaConfig", _BERT, "AutoModel"),
    "RobertaForMaskedLM": ("RobertaConfig", _BERT, "AutoModelForMaskedLM"),
    "DistilBertModel": ("DistilBertConfig", _DISTILBERT, "AutoModel"),
}
OPEN: dict[str, Any] = {"window": 6, "latents": 5, "sinks": 2, "gate": 0.5, "init_std": 0.4}
LENGTHS = (40, 23)


def encoder(name: str = "BertModel") -> Any:
    """A tiny random model in evaluation mode."""
    config_name, options, _ = ENCODERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**options)
    config._attn_implementation = "eager"
    return randomized(getattr(transformers, name)(config).eval())


def padded(count: int = 40) -> dict[str, Tensor]:
    """Two rows, the second with padding on the right."""
    mask = torch.ones(2, count, dtype=torch.int64)
    mask[1, LENGTHS[1] :] = 0
    return {"input_ids": tokens(2, count) * mask, "attention_mask": mask}


@torch.no_grad()
def output(model: Any, **inputs: Tensor) -> Tensor:
    """Hidden states or logits."""
    return model(**inputs)[0]


def real(y: Tensor) -> Tensor:
    """Of the tokens that are no padding, or of whole texts."""
    return y if y.dim() == 2 else torch.cat([y[0], y[1, : LENGTHS[1]]])


@pytest.mark.parametrize("name", ENCODERS)
def test_lossless(name: str) -> None:
    """With the gate shut and a window over everything, the pretrained model."""
    model, inputs = encoder(name), padded()
    want = output(model, **inputs)
    hf.convert(model, window=64, latents=4, sinks=2, gate=40.0, positions=200)
    torch.testing.assert_close(real(output(model, **inputs)), real(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_hidden_states(name: str) -> None:
    """Are those of the layers, when they are asked for."""
    model, inputs = encoder(name), padded()
    want = model(**inputs, output_hidden_states=True).hidden_states
    hf.convert(model, window=64, latents=4, gate=40.0)
    got = model(**inputs, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 4
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(real(one), real(other), atol=1e-5, rtol=1e-5)
    again = hf.convert(encoder(name), **OPEN)
    assert len(again(**inputs, output_hidden_states=True).hidden_states) == 4


def plain_attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    latte_given: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a converted layer of an encoder computes, with one T x T matrix of probabilities."""
    plan, branch = module.latte_plan, module.latte
    at = torch.arange(q.shape[2])
    near = ((at[:, None] - at).abs() < plan.window) | (at < plan.sinks)
    if mask is None:
        mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
    seen = near & mask[:, None, None]
    logits = (q @ k.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    x = latte_given.hidden
    heads = q.shape[1]
    q_latent = (x @ branch.q_weight.T).unflatten(2, (heads, -1)).transpose(1, 2)
    p = (q_latent + branch.q_bias[:, None]).softmax(-1)
    k_latent = (x @ branch.k_weight.T).unflatten(2, (heads, -1)).transpose(1, 2)
    weights = k_latent.masked_fill(~mask[:, None, :, None], -torch.inf).softmax(2)
    y = p[..., :1] * (logits.softmax(-1) @ v) + p[..., 1:] @ (weights.transpose(2, 3) @ v)
    return y.transpose(1, 2), None


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_against_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, sinks and latents to both sides, values and gradients, in float64."""
    model, inputs = hf.convert(encoder(name), **OPEN).double(), padded()
    parameters = list(model.latte_parameters())

    def run() -> tuple[Tensor, ...]:
        y = real(model(**inputs)[0])
        return y, *torch.autograd.grad(y.square().sum(), parameters)

    got = run()
    interface = transformers.AttentionInterface
    monkeypatch.setitem(interface._global_mapping, "latte", plain_attention)
    for one, other in zip(got, run(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_both_directions() -> None:
    """Tokens far ahead are seen through latents, and through nothing else."""
    ids = tokens(1, 60)
    other = ids.clone()
    other[0, -1] = 3 + (ids[0, -1] - 2) % 90
    for latents, reached in ((0, False), (5, True)):
        model = hf.convert(encoder(), **{**OPEN, "latents": latents})
        changed = (output(model, input_ids=ids) != output(model, input_ids=other)).any(2)[0]
        # Three layers of five tokens to each side.
        assert bool(changed[44:].all())
        assert bool(changed[2:44].any()) == reached


def test_padded_rows_are_as_alone() -> None:
    model, inputs = hf.convert(encoder(), **OPEN), padded()
    got = output(model, **inputs)
    for row, count in enumerate(LENGTHS):
        alone = output(model, input_ids=inputs["input_ids"][row : row + 1, :count])
        torch.testing.assert_close(got[row, :count], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    model, inputs = hf.convert(encoder(name), **OPEN, positions=200), padded(150)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, ENCODERS[name][2]).from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.max_position_embeddings == 200
    assert torch.equal(output(loaded, **inputs), output(model, **inputs))


def test_adapter(tmp_path: Path) -> None:
    """Holds no table: the pretrained one goes on in the same way again."""
    model, inputs = hf.convert(encoder(), **OPEN, positions=200), padded(150)
    hf.save_adapter(model, tmp_path)
    loaded = hf.load_adapter(encoder(), tmp_path)
    assert torch.equal(output(loaded, **inputs), output(model, **inputs))


def test_adapter_before_positions(tmp_path: Path) -> None:
    """Settings that an older adapter does not name are as they were."""
    model, inputs = hf.convert(encoder(), **OPEN), padded()
    del model.config.latte["positions"]
    hf.save_adapter(model, tmp_path)
    loaded = hf.load_adapter(encoder(), tmp_path)
    assert torch.equal(output(loaded, **inputs), output(model, **inputs))


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_positions(name: str) -> None:
    """Rows beyond the pretrained ones; what was there stays."""
    original, model = encoder(name), hf.convert(encoder(name), **OPEN, positions=200)
    before = original.embeddings.position_embeddings.weight
    embeddings = model.embeddings
    table = embeddings.position_embeddings.weight
    assert table.shape == (200, 32)
    assert not table.requires_grad
    assert torch.equal(table[:64], before)
    # The first row is [CLS]'s; RoBERTa's own is the one after that of the padding.
    first = 2 if name == "RobertaModel" else 1
    period = 30 if name == "RobertaModel" else 31
    assert torch.equal(table[64 : 64 + period], before[first : first + period])
    assert torch.equal(table[64 + period : 200], table[64 : 200 - period])
    assert torch.equal(embeddings.position_ids, torch.arange(200)[None])
    if hasattr(embeddings, "token_type_ids"):
        assert torch.equal(embeddings.token_type_ids, torch.zeros(1, 200, dtype=torch.int64))
    assert bool(output(model, input_ids=tokens(1, 190)).isfinite().all())
    assert original.config.max_position_embeddings == 64


def test_positions_of_a_model_with_a_head() -> None:
    model = hf.convert(encoder("BertForMaskedLM"), **OPEN, positions=100)
    assert output(model, input_ids=tokens(1, 100)).shape == (1, 100, 97)


@pytest.mark.parametrize("rows", [2, 3, 4, 9])
def test_extended_rows_of_short_tables(rows: int) -> None:
    table = torch.randn(rows, 3)
    got = extended_rows(table, 20)
    assert got.shape == (20, 3)
    assert torch.equal(got[:rows], table)


def test_only_the_new_is_trained() -> None:
    model, inputs = hf.convert(encoder(), **OPEN, positions=80), padded()
    model(**inputs)[0].square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".latte." in name for name in trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": True}, "decay is True"),
        ({"output_rank": 2}, "output_rank is positive"),
        ({"positions": 0}, "positions is 0"),
        ({"positions": 63}, "positions is 63, expected at least the 64 rows"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.convert(encoder(), **OPEN, **options)


def test_bad_use() -> None:
    with pytest.raises(ValueError, match="positions is 512 for a LlamaForCausalLM, expected None"):
        hf.convert(tiny(), **OPEN, positions=512)
    options = {**_BERT, "relative_attention_num_buckets": 8}
    other = transformers.MPNetModel(transformers.MPNetConfig(**options))
    with pytest.raises(ValueError, match="MPNetModel has 0 attention layers"):
        hf.convert(other, **OPEN)
    model = hf.convert(encoder(), **OPEN)
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        model.train()(**padded())
