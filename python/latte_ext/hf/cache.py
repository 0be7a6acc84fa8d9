# SPDX-License-Identifier: Apache-2.0
"""`LatteCache`: what generate() keeps of a converted model, a fixed number of bytes.

Notation: N sequences, T tokens, Hk key/value heads, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import storage
from ..nn.recurrent import RecurrentState
from ..window_cache import MacchiatoState, WindowCache
from .latents import MixerState
from .sinks import Sinks


@dataclass
class Past:
    """The tokens before the next ones, of one layer.

    Args:
        tokens: how many, those of the padding included.
        attention: latents and window. sinks: the first tokens. mixer: what stands before the
            latents.
    """

    tokens: int
    attention: MacchiatoState
    sinks: Sinks | None
    mixer: MixerState | None

    @property
    def window(self) -> WindowCache:
        assert self.attention.window is not None
        return self.attention.window

    @property
    def device(self) -> torch.device:
        return self.window.device

    def _map(self, function: Callable[[Any], Any]) -> Past:
        def mapped(part: Any) -> Any:
            return None if part is None else function(part)

        return Past(self.tokens, function(self.attention), mapped(self.sinks), mapped(self.mixer))

    def clone(self) -> Past:
        return self._map(lambda part: part.clone())

    def select(self, index: Tensor) -> Past:
        return self._map(lambda part: part[index] if _is_tensor(part) else part.select(index))

    def to(self, device: torch.device | str) -> Past:
        def move(part: Any) -> Any:
            if _is_tensor(part) or hasattr(part, "to"):
                return part.to(device)
            return type(part)(*(x.to(device) for x in part))

        return self._map(move)

    @property
    def nbytes(self) -> int:
        parts = (self.attention, self.sinks, self.mixer)
        return sum(part.nbytes for part in parts if part is not None)


class Call(NamedTuple):
    """A recorded call: the past before it, its tokens, and the past after some of them."""

    before: Past | None
    tokens: int
    after: Callable[[int], Past]


class LatteLayer(CacheLayerMixin):  # type: ignore[misc]
    """The past of one layer, and while calls are recorded, the way back."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.past: Past | None = None
        self.record_past = False
        self._calls: list[Call] = []
        self._device: torch.device | None = None

    def advance(self, past: Past, call: Call | None) -> None:
        """The past after a call."""
        self.past, self.is_initialized = past, True
        self._device = past.device
        if call is not None:
            self._calls.append(call)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the sizes are known at the first call."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of the new tokens: attention itself reads the past."""
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0 if self.past is None else self.past.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.past is None else self.past.window.batch

    def reset(self) -> None:
        self.past, self.is_initialized = None, False
        self._calls.clear()

    def offload(self) -> None:
        if self.past is not None:
            self.past = self.past.to("cpu")

    def prefetch(self) -> None:
        if self.past is not None and self._device is not None:
            self.past = self.past.to(self._device)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.past is not None:
            index = torch.arange(self.batch_size).repeat_interleave(repeats)
            self.batch_select_indices(index)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._calls.clear()
        if self.past is not None:
            self.past = self.past.select(indices)

    def activate_past_recording(self) -> None:
        """From now on tokens can be taken back, until the next call of `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove tokens, and forgets how to take back others.

        Raises:
            RuntimeError: they were not recorded.
        """
        count = -tokens_to_remove
        recorded = sum(call.tokens for call in self._calls)
        if count < 0 or count > recorded:
            raise RuntimeError(
                f"[LatteCache] crop got {tokens_to_remove}, expected 0 to {-recorded}: only what "
                "came after activate_past_recording() and the last crop can be taken back"
            )
        while count:
            call = self._calls.pop()
            self.past = call.after(call.tokens - count) if count < call.tokens else call.before
            count -= min(count, call.tokens)
        self._calls.clear()


class LatteCache(Cache):  # type: ignore[misc]
    """A transformers cache of a converted model: windows, sinks and latents, of a fixed size.

    generate() makes one by itself. One that is passed to it, and kept, goes on with the sequence.

    Args:
        config: of the converted model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        if getattr(config, "latte", None) is None:
            raise ValueError(
                f"[LatteCache] config is a {type(config).__name__} without latents, expected that "
                "of a model that latte_ext.hf.convert returned"
            )
        super().__init__(layers=[LatteLayer() for _ in range(config.num_hidden_layers)])

    def to_bytes(self) -> bytes:
        """The past in a portable form, as `storage.to_bytes`; recorded calls are not kept.

        Raises:
            TypeError: see there.
        """
        return storage.to_bytes([_stored(layer.past) for layer in self.layers])

    @classmethod
    def from_bytes(
        cls, config: PreTrainedConfig, data: bytes | bytearray | memoryview
    ) -> LatteCache:
        """What `to_bytes` of a cache for a model of this `config` saved, bit for bit, on the CPU.

        Raises:
            TypeError: data is not bytes.
            ValueError: truncated, damaged, of another kind or version or number of layers.
        """
        cache, pasts = cls(config), storage.from_bytes(data)
        if not isinstance(pasts, list) or len(pasts) != len(cache.layers):
            raise ValueError(
                f"[LatteCache.from_bytes] data is not of {len(cache.layers)} layers, expected the "
                "cache of a model of this config"
            )
        for layer, stored in zip(cache.layers, pasts, strict=True):
            if stored is not None:
                layer.advance(_restored(stored), None)
        return cache

    @property
    def nbytes(self) -> int:
        """Memory of the past in bytes."""
        return sum(layer.past.nbytes for layer in self.layers if layer.past is not None)


def _stored(past: Past | None) -> list[Any] | None:
    if past is None:
        return None
    sinks = None if past.sinks is None else [*past.sinks]
    return [torch.tensor([past.tokens]), past.attention, sinks, past.mixer]


def _restored(stored: Any) -> Past:
    if not isinstance(stored, list) or len(stored) != 4:
        raise ValueError("[LatteCache.from_bytes] data has other parts than the past of a layer")
    tokens, attention, sinks, mixer = stored
    count = sinks is None or (isinstance(sinks, list) and len(sinks) == 3)
    if not (
        count
        and isinstance(tokens, Tensor)
        and tokens.shape == (1,)
        and tokens.dtype == torch.int64
        and isinstance(attention, MacchiatoState)
        and attention.window is not None
        and all(isinstance(x, Tensor) for x in sinks or [])
        and (mixer is None or isinstance(mixer, (Tensor, RecurrentState)))
    ):
        raise ValueError("[LatteCache.from_bytes] data has other parts than the past of a layer")
    return Past(int(tokens), attention, None if sinks is None else Sinks(*sinks), mixer)


def _is_tensor(part: object) -> bool:
    return isinstance(part, Tensor)
