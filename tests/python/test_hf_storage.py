# SPDX-License-Identifier: Apache-2.0
"""`LatteCache` as bytes: generation goes on from what was read, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_helpers import one_thread, tiny, tokens  # noqa: E402, F401
from latte_ext import LatentState, hf, storage  # noqa: E402


def converted(**options: Any) -> Any:
    return hf.convert(tiny(), window=8, latents=5, gate=0.5, init_std=0.4, **options)


@pytest.mark.parametrize(
    "options", [{"sinks": 2}, {"sinks": 0}, {"mixer": "conv"}, {"mixer": "rglru"}, {"layers": [1]}]
)
def test_a_cache_comes_back(options: dict[str, Any]) -> None:
    model, ids = converted(**options), tokens(2, 30)
    cache = hf.LatteCache(model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :20], cache=cache, use_cache=True)
        again = hf.LatteCache.from_bytes(model.config, cache.to_bytes())
        assert again.nbytes == cache.nbytes
        assert again.get_seq_length() == 20
        for start, stop in ((20, 21), (21, 30)):
            got, want = (
                model(input_ids=ids[:, start:stop], cache=c, use_cache=True).logits
                for c in (again, cache)
            )
            assert torch.equal(got, want)


def test_an_unused_cache_comes_back() -> None:
    config = converted().config
    again = hf.LatteCache.from_bytes(config, hf.LatteCache(config).to_bytes())
    assert again.get_seq_length() == 0
    assert [layer.past for layer in again.layers] == [None] * config.num_hidden_layers


@pytest.mark.parametrize(
    "state",
    [
        LatentState.empty(1, 1, 1, 1),
        [None],
        [[], None, None],
        [LatentState.empty(1, 1, 1, 1), None, None],
        [[torch.zeros(2), None, None, None], None, None],
    ],
)
def test_other_states_raise(state: Any) -> None:
    config = converted().config
    assert config.num_hidden_layers == 3
    with pytest.raises(ValueError, match=r"^\[LatteCache.from_bytes\] data "):
        hf.LatteCache.from_bytes(config, storage.to_bytes(state))
