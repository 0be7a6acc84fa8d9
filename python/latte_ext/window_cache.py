# SPDX-License-Identifier: Apache-2.0
"""`WindowCache`, `MacchiatoState`: what a layer with a window remembers. `WindowSinks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import storage
from ._checks import check_dense, check_integers, check_type
from ._drafts import (
    Accepted,
    MacchiatoDraft,
    WindowDraft,
    check_draft,
    commit_window,
    count_accepted,
    same_width,
)
from ._select import Index, concat_states, scatter_states, select
from ._serialise import pack, unpack
from .state import LatentState

_FIELDS = ("key", "value", "valid", "position")


class WindowSinks(NamedTuple):
    """Keys and values that tokens see beyond their window, with queries of their own.

    A rotary model can thus keep its first tokens at a bounded distance: rotate `q` by
    min(t, window) and `k` by the token's own position.

    Attributes:
        q: (B,H,T,Dk) queries to the sinks, (N,H,Dk) in a step.
        k: (N,Hk,n,Dk) keys of n sinks.
        v: (N,Hk,n,D) their values.
        position: (N,n) int64, the sinks' positions in their sequence: a token sees those that have
            left its window (and those after it if not causal), so that no token counts twice. None:
            every token sees them all.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    position: Tensor | None = None


class WindowCache:
    """The last `window` keys and values of N sequences, in ring buffers: a fixed size.

    The token at position s of a sequence lies in slot s % window. Sequences may stand at different
    positions. A cache is a pytree node: it passes through torch.compile and torch.export.

    Args:
        key (N,Hk,window,Dk), value (N,Hk,window,D): floating point, kept without a copy.
        valid: (N,window) bool, whether the slot holds a token that may be seen.
        position: (N,) int64, the tokens that each sequence has had.

    Raises:
        TypeError: not tensors, or other dtypes.
        ValueError: shapes that do not fit together.
        RuntimeError: tensors on different devices.
    """

    key: Tensor
    value: Tensor
    valid: Tensor
    position: Tensor

    def __init__(self, key: Tensor, value: Tensor, valid: Tensor, position: Tensor) -> None:
        self.key, self.value, self.valid, self.position = key, value, valid, position
        self._check("WindowCache")

    def _check(self, op: str, prefix: str = "") -> None:
        """Raises as the constructor, in the name of `op`, for tensors that were replaced since."""
        _check(op, prefix, self)

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        window: int,
        key_dim: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> WindowCache:
        """The cache of `batch` >= 0 sequences without tokens; the other sizes are >= 1."""
        check_integers(
            "WindowCache.empty", batch=batch, heads=heads, window=window, key_dim=key_dim, dim=dim
        )
        if batch < 0 or min(heads, window, key_dim, dim) < 1:
            raise ValueError(
                f"[WindowCache.empty] sizes are {(batch, heads, window, key_dim, dim)}, "
                "expected batch >= 0 and heads, window, key_dim, dim >= 1"
            )
        return cls(
            torch.zeros(batch, heads, window, key_dim, device=device, dtype=dtype),
            torch.zeros(batch, heads, window, dim, device=device, dtype=dtype),
            torch.zeros(batch, window, device=device, dtype=torch.bool),
            torch.zeros(batch, device=device, dtype=torch.int64),
        )

    @property
    def batch(self) -> int:
        """N, the number of sequences."""
        return self.key.shape[0]

    @property
    def window(self) -> int:
        """The tokens that each sequence keeps."""
        return self.key.shape[2]

    @property
    def device(self) -> torch.device:
        return self.key.device

    @property
    def nbytes(self) -> int:
        """Memory of the four tensors in bytes."""
        return sum(x.numel() * x.element_size() for x in self)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(key, value, valid, position)."""
        return self.key, self.value, self.valid, self.position

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors())

    def select(self, index: Index) -> WindowCache:
        """The caches of some sequences, in new tensors, repeats allowed (beam search).

        Args:
            index: positions in [-N, N) as a sequence or a 1-D integer tensor, or an (N,) bool mask.

        Raises:
            TypeError: index is neither integer nor bool.
            ValueError: it does not fit.
        """
        return WindowCache(*select("[WindowCache.select]", self.tensors(), index))

    concat = classmethod(concat_states)
    scatter = scatter_states

    @torch.no_grad()
    def commit(self, draft: WindowDraft, accepted: Accepted) -> None:
        """The first tokens of a draft enter the cache, in place; bit for bit as by steps (T6).

        Args:
            draft: of `sliding_window_attention_draft` on this cache or a copy of it.
            accepted: (N,) integers, how many of the w tokens each sequence keeps, from 0 to w.

        Raises:
            ValueError: a draft of other shapes, accepted out of range.
            TypeError: types.
        """
        op = "[WindowCache.commit]"
        self.check_draft(op, draft)
        counts, _ = count_accepted(op, accepted, self.batch, draft.k.shape[2], self.device)
        commit_window(self.tensors(), draft, counts)

    def check_draft(self, op: str, draft: object) -> int:
        """w of a draft of this cache; raises, in the name of `op`, for anything else."""
        return check_draft(op, draft, WindowDraft, self.key, self.key.shape[3], self.value.shape[3])

    def clone(self) -> WindowCache:
        """A copy with memory of its own; differentiable."""
        return WindowCache(*(x.clone() for x in self))

    def detach(self) -> WindowCache:
        """The same memory, cut from the autograd graph."""
        return WindowCache(*(x.detach() for x in self))

    def to(self, device: torch.device | str) -> WindowCache:
        """The cache on device; shares memory if it is there already. Differentiable."""
        return WindowCache(*(x.to(device) for x in self))

    def to_bytes(self) -> bytes:
        """The cache in a portable form, as `LatentState.to_bytes`."""
        return pack("WindowCache", self.tensors())

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> WindowCache:
        """What `to_bytes` saved, bit for bit, on the CPU.

        Raises:
            TypeError: data is not bytes.
            ValueError: truncated, damaged, of another kind or version, or not a cache's shapes.
        """
        op = "[WindowCache.from_bytes]"
        tensors = unpack(op, "WindowCache", data)
        if len(tensors) != 4:
            raise ValueError(f"{op} data holds {len(tensors)} tensors, expected 4")
        return cls(*tensors)

    def __repr__(self) -> str:
        return (
            f"WindowCache(batch={self.batch}, heads={self.key.shape[1]}, window={self.window}, "
            f"key_dim={self.key.shape[3]}, dim={self.value.shape[3]}, dtype={self.key.dtype}, "
            f"device='{self.device}')"
        )

    def before(
        self, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and mask with `window` cached ones in front of every sequence's tokens.

        k (B,Hk,T,Dk), v (B,Hk,T,D) and key_mask (B,T) become (B,Hk,S,Dk), (B,Hk,S,D) and (B,S):
        S = window + T, or N window + T for packed sequences, each behind its own past.
        """
        window, device = self.window, k.device
        # Token position - window + i stands in slot (position + i) % window.
        slots = (self.position[:, None] + torch.arange(window, device=device)) % window
        columns = slots[:, None, :, None]
        past_k = self.key.gather(2, columns.expand_as(self.key)).to(k.dtype)
        past_v = self.value.gather(2, columns.expand_as(self.value)).to(v.dtype)
        past_mask = self.valid.gather(1, slots)
        if key_mask is None:
            key_mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=device)
        if cu_seqlens is None:
            return (
                torch.cat([past_k, k], dim=2),
                torch.cat([past_v, v], dim=2),
                torch.cat([past_mask, key_mask], dim=1),
            )
        order = self._packed_order(k.shape[2], cu_seqlens)
        return (
            torch.cat([past_k.transpose(0, 1).flatten(1, 2)[None], k], 2).index_select(2, order),
            torch.cat([past_v.transpose(0, 1).flatten(1, 2)[None], v], 2).index_select(2, order),
            torch.cat([past_mask.flatten()[None], key_mask], 1).index_select(1, order),
        )

    def after(self, k: Tensor, v: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> WindowCache:
        """The cache after the tokens, from what `before` returned."""
        window = self.window
        if cu_seqlens is None:
            lengths = torch.full_like(self.position, k.shape[2] - window)
            first = torch.zeros_like(self.position)
        else:
            borders = cu_seqlens.to(torch.int64)
            lengths = borders.diff()
            first = borders[:-1] + window * torch.arange(self.batch, device=k.device)
        position = self.position + lengths
        # Slot j holds the last token s with s % window == j.
        age = (position[:, None] - 1 - torch.arange(window, device=k.device)) % window
        index = first[:, None] + window + lengths[:, None] - 1 - age
        if cu_seqlens is None:
            columns = index[:, None, :, None]
            key = k.gather(2, columns.expand_as(self.key))
            value = v.gather(2, columns.expand_as(self.value))
            valid = mask.gather(1, index)
        else:
            key = k[0][:, index].transpose(0, 1)
            value = v[0][:, index].transpose(0, 1)
            valid = mask[0][index]
        return WindowCache(key.to(self.key.dtype), value.to(self.value.dtype), valid, position)

    def _packed_order(self, tokens: int, cu_seqlens: Tensor) -> Tensor:
        """For N window cached tokens followed by `tokens` new ones: each past before its tokens."""
        window, device = self.window, cu_seqlens.device
        borders = cu_seqlens.to(torch.int64)
        sequences = torch.arange(self.batch, device=device)
        past = (borders[:-1] + window * sequences)[:, None] + torch.arange(window, device=device)
        sequence = torch.searchsorted(borders[1:], torch.arange(tokens, device=device), right=True)
        new = torch.arange(tokens, device=device) + window * (sequence + 1)
        order = torch.empty(past.numel() + tokens, dtype=torch.int64, device=device)
        source = torch.arange(past.numel() + tokens, device=device)
        return order.scatter(0, torch.cat([past.flatten(), new]), source)


class MacchiatoState(NamedTuple):
    """The past of N sequences in `macchiato_attention`: latents and window, a fixed size.

    Attributes:
        latent: None if the layer has no latents (L = 0).
        window: None if it has no window (window = 0).
    """

    latent: LatentState | None
    window: WindowCache | None

    def _map(self, function: Callable[[Any], Any]) -> MacchiatoState:
        return MacchiatoState(*(None if part is None else function(part) for part in self))

    @property
    def nbytes(self) -> int:
        """Memory of the tensors in bytes."""
        return sum(part.nbytes for part in self if part is not None)

    def select(self, index: Index) -> MacchiatoState:
        """The states of some sequences, as `WindowCache.select`."""
        return self._map(lambda part: part.select(index))

    @classmethod
    def concat(cls, states: Iterable[MacchiatoState]) -> MacchiatoState:
        """As `LatentState.concat`."""
        return concat_states(cls, states)

    def scatter(self, index: Index, source: MacchiatoState) -> None:
        """As `LatentState.scatter`."""
        scatter_states(self, index, source)

    def commit(self, draft: MacchiatoDraft, accepted: Accepted) -> None:
        """The first tokens of a draft enter the state, in place; bit for bit as by steps (T6).

        Args:
            draft: of `macchiato_attention_draft` on this state or a copy of it.
            accepted: (N,) integers, how many of the w tokens each sequence keeps, from 0 to w.

        Raises:
            ValueError: a draft of other shapes, accepted out of range.
            TypeError: types.
        """
        self.check_draft("[MacchiatoState.commit]", draft)
        if self.latent is not None:
            self.latent.commit(draft.latent, accepted)  # type: ignore[arg-type]
        if self.window is not None:
            self.window.commit(draft.window, accepted)  # type: ignore[arg-type]

    def check_draft(self, op: str, draft: object) -> int:
        """w of a draft of this state; raises, in the name of `op`, for anything else."""
        check_type(op.strip("[]"), "draft", draft, MacchiatoDraft)
        assert isinstance(draft, MacchiatoDraft)
        widths = []
        for name, part, drafted in zip(self._fields, self, draft, strict=True):
            if (part is None) != (drafted is None):
                raise TypeError(
                    f"{op} draft.{name} is a {type(drafted).__name__} for a "
                    f"{type(part).__name__}, expected a draft of this state"
                )
            if part is not None:
                widths.append(part.check_draft(op, drafted))
        return same_width(op, widths)

    def to_bytes(self) -> bytes:
        """The state in a portable form, as `latte_ext.storage.to_bytes`."""
        return storage.to_bytes(self)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> MacchiatoState:
        """What `to_bytes` saved, bit for bit, on the CPU.

        Raises:
            TypeError: data is not bytes.
            ValueError: truncated, damaged, of another kind or version, or not a state's shapes.
        """
        state = storage.from_bytes(data)
        if not isinstance(state, cls):
            raise ValueError(
                f"[MacchiatoState.from_bytes] data holds a {type(state).__name__}, expected a "
                "MacchiatoState"
            )
        return state

    def clone(self) -> MacchiatoState:
        """A copy with memory of its own; differentiable."""
        return self._map(lambda part: part.clone())

    def detach(self) -> MacchiatoState:
        """The same memory, cut from the autograd graph."""
        return self._map(lambda part: part.detach())

    def to(self, device: torch.device | str) -> MacchiatoState:
        """The state on device; shares memory if it is there already."""
        return self._map(lambda part: part.to(device))


storage.register_kind(WindowCache, *[("Tensor",)] * 4)
storage.register_kind(
    MacchiatoState, ("LatentState", "QuantisedState", "None"), ("WindowCache", "None")
)


def _check(op: str, prefix: str, cache: WindowCache) -> None:
    floating = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    dtypes = {
        "key": floating,
        "value": floating,
        "valid": (torch.bool,),
        "position": (torch.int64,),
    }
    for field, x in zip(_FIELDS, cache, strict=True):
        name = prefix + field
        if not isinstance(x, Tensor):
            raise TypeError(f"[{op}] {name} is a {type(x).__name__}, expected a Tensor")
        check_dense(op, name, x)
        if x.dtype not in dtypes[field]:
            expected = " or ".join(str(dtype) for dtype in dtypes[field])
            raise TypeError(f"[{op}] {name} has dtype {x.dtype}, expected {expected}")
        if x.device != cache.key.device:
            raise RuntimeError(
                f"[{op}] {name} is on {x.device}, expected {cache.key.device} as key"
            )
    key = cache.key
    if key.dim() != 4 or 0 in key.shape[1:]:
        raise ValueError(
            f"[{op}] {prefix}key has shape {tuple(key.shape)}, expected (N, Hk, window, Dk) with "
            "Hk, window, Dk >= 1"
        )
    if cache.value.dim() != 4 or cache.value.shape[:3] != key.shape[:3] or not cache.value.shape[3]:
        raise ValueError(
            f"[{op}] {prefix}value has shape {tuple(cache.value.shape)}, expected "
            f"{(*key.shape[:3], 'D')}: (N, Hk, window, D) with D >= 1"
        )
    for name, x, shape in (
        ("valid", cache.valid, (key.shape[0], key.shape[2])),
        ("position", cache.position, (key.shape[0],)),
    ):
        if tuple(x.shape) != shape:
            raise ValueError(f"[{op}] {prefix}{name} has shape {tuple(x.shape)}, expected {shape}")


def _flatten(cache: WindowCache) -> tuple[list[Any], None]:
    return list(cache.tensors()), None


def _flatten_with_keys(cache: WindowCache) -> tuple[list[tuple[pytree.KeyEntry, Any]], None]:
    return [(pytree.GetAttrKey(name), getattr(cache, name)) for name in _FIELDS], None


def _unflatten(leaves: Iterable[Any], context: None) -> WindowCache:
    # No validation: transformations put specs, None and other placeholders where tensors were.
    cache = object.__new__(WindowCache)
    cache.key, cache.value, cache.valid, cache.position = leaves
    return cache


pytree.register_pytree_node(
    WindowCache,
    _flatten,
    _unflatten,
    serialized_type_name="latte_ext.WindowCache",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([WindowCache, MacchiatoState])
