# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family that conversion is tested for."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_HEADS = {"head_dim": 16}
_LAYERS = ["sliding_attention", "full_attention", "full_attention"]

# Family: configuration class, model class, options.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama3 rotation": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _HEADS),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **_HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": _LAYERS,
            "attn_logit_softcapping": 0.5,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": _LAYERS},
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1]}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "granite": (
        "GraniteConfig", "GraniteForCausalLM", {"attention_multiplier": 0.2, "logits_scaling": 2.0}
    ),
    "cohere2": (
        "Cohere2Config", "Cohere2ForCausalLM", {"sliding_window": 8, "layer_types": _LAYERS}
    ),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", _HEADS),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {"use_qkv_bias": True}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For the tests that import it: two workers of pytest-xdist with two threads each on two cores
    take up to ten times as long, since every operator waits for a thread that does not run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(family: str = "llama", *, seed: int = 0, **options: Any) -> Any:
    """A random model in evaluation mode, with weights that make its attention matter."""
    config_name, model_name, special = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(**{**SIZES, **copy.deepcopy(special), **options})
    config._attn_implementation = "eager"
    return randomized(getattr(transformers, model_name)(config).eval())


@torch.no_grad()
def randomized(model: Any) -> Any:
    """A model with weights that make its attention matter."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.normal_(std=1.2 / parameter.shape[1] ** 0.5)
        elif "embed" in name:
            parameter.normal_()
    return model


def tokens(batch: int = 2, count: int = 40, *, seed: int = 1) -> Tensor:
    """Random token ids (B,T), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIZES["vocab_size"], (batch, count), generator=generator)


@torch.no_grad()
def logits(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Of one call without a cache."""
    options.setdefault("use_cache", False)
    return model(input_ids=ids, **options).logits
