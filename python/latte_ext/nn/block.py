# SPDX-License-Identifier: Apache-2.0
"""The block of the models: attention, its mixer, and an MLP.

Notation: B batch, T tokens, E model width, N sequences (B, or len(cu_seqlens) - 1 when packed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .._checks import check_type
from .._drafts import Accepted, MacchiatoDraft, same_width, short_conv_commit
from .._select import Index, concat_states, scatter_states, select
from ..storage import register_kind
from ..window_cache import MacchiatoState
from .attention import lecun_normal_
from .config import LatteConfig
from .macchiato import MacchiatoAttention
from .recurrent import RGLRU, ConvDraft, RecurrentDraft, RecurrentState, ShortConv

# Of the convolution, of the RG-LRU, of no mixer.
MixerState = Tensor | RecurrentState | None
MixerDraft = ConvDraft | RecurrentDraft | None


class LayerDraft(NamedTuple):
    """What w tokens leave in one block: their factors, not a state."""

    attention: MacchiatoDraft
    mixer: MixerDraft


class LayerCache(NamedTuple):
    """What one causal block remembers of N sequences: a fixed size, whatever their lengths.

    attention: latents and window; mixer: the convolution's last inputs (N,K-1,E), or the state of
    the RG-LRU, or None.
    """

    attention: MacchiatoState
    mixer: MixerState

    @property
    def nbytes(self) -> int:
        """Memory of the tensors in bytes."""
        return self.attention.nbytes + (0 if self.mixer is None else self.mixer.nbytes)

    def select(self, index: Index) -> LayerCache:
        """The caches of some sequences, in new tensors, repeats allowed (beam search).

        Args:
            index: positions in [-N, N) as a sequence or a 1-D integer tensor, or an (N,) bool mask.

        Raises:
            TypeError: index is neither integer nor bool.
            ValueError: it does not fit.
        """
        attention = self.attention.select(index)
        op = "[LayerCache.select]"
        return LayerCache(attention, _map(lambda x: select(op, [x], index)[0], self.mixer))

    @classmethod
    def concat(cls, states: Iterable[LayerCache]) -> LayerCache:
        """As `LatentState.concat`."""
        return concat_states(cls, states)

    def scatter(self, index: Index, source: LayerCache) -> None:
        """As `LatentState.scatter`."""
        scatter_states(self, index, source)

    def commit(self, draft: LayerDraft, accepted: Accepted) -> None:
        """The first tokens of a draft of `LatteBlock.draft` enter the cache, in place.

        Args:
            accepted: (N,) integers, how many of the w tokens each sequence keeps, from 0 to w.

        Raises:
            ValueError: a draft of other shapes, accepted out of range.
            TypeError: types.
        """
        # Nothing is written before all of it has been checked.
        self.check_draft("[LayerCache.commit]", draft)
        if isinstance(self.mixer, RecurrentState):
            self.mixer.commit(draft.mixer, accepted)  # type: ignore[arg-type]
        elif self.mixer is not None:
            short_conv_commit(self.mixer, draft.mixer.x, accepted)  # type: ignore[union-attr]
        self.attention.commit(draft.attention, accepted)

    def check_draft(self, op: str, draft: object) -> int:
        """w of a draft of this cache; raises, in the name of `op`, for anything else."""
        name = op.strip("[]")
        check_type(name, "draft", draft, LayerDraft)
        assert isinstance(draft, LayerDraft)
        check_type(name, "draft.mixer", draft.mixer, _DRAFT_KINDS[type(self.mixer)])
        widths = [self.attention.check_draft(op, draft.attention)]
        if draft.mixer is not None:
            widths.append(draft.mixer.x.shape[1])
        return same_width(op, widths)

    def clone(self) -> LayerCache:
        """A copy with memory of its own; differentiable."""
        return LayerCache(self.attention.clone(), _map(torch.clone, self.mixer))

    def detach(self) -> LayerCache:
        """The same memory, cut from the autograd graph."""
        return LayerCache(self.attention.detach(), _map(torch.detach, self.mixer))

    def to(self, device: torch.device | str) -> LayerCache:
        """The cache on device; shares memory if it is there already."""
        return LayerCache(self.attention.to(device), _map(lambda x: x.to(device), self.mixer))


_DRAFT_KINDS: dict[type, type] = {
    Tensor: ConvDraft,
    RecurrentState: RecurrentDraft,
    type(None): type(None),
}
_STATE_KINDS: dict[type, type] = {ShortConv: Tensor, RGLRU: RecurrentState, type(None): type(None)}

# As plain data: exported programs and torch.load may hold caches.
for _kind in (LayerCache, RecurrentState, MacchiatoState):
    pytree._register_namedtuple(_kind, serialized_type_name=f"latte_ext.{_kind.__name__}")
torch.serialization.add_safe_globals([LayerCache, RecurrentState])


def _recurrent(h: Tensor, fresh: Tensor) -> RecurrentState:
    if h.dim() != 2 or fresh.shape != h.shape[:1] or fresh.dtype != torch.bool:
        raise ValueError(
            f"[RecurrentState] h has shape {tuple(h.shape)} and fresh {tuple(fresh.shape)} of "
            f"{fresh.dtype}, expected (N, C) and (N,) of torch.bool"
        )
    return RecurrentState(h, fresh)


register_kind(RecurrentState, ("Tensor",), ("Tensor",), build=_recurrent)
register_kind(LayerCache, ("MacchiatoState",), ("Tensor", "RecurrentState", "None"))


def _map(function: Callable[[Tensor], Tensor], state: MixerState) -> MixerState:
    if isinstance(state, RecurrentState):
        return RecurrentState(*(function(x) for x in state))
    return None if state is None else function(state)


class LatteBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)).

    The latents' queries and keys are computed from the mixer's output, values and the window from
    norm(x) itself.

    Args:
        config: sizes and parts; its vocabulary and number of layers do not matter here.
        causal: whether token t sees the tokens s <= t only. If not, the convolution is centred, the
            RG-LRU runs both ways and the window is symmetric.

    Raises:
        ValueError: sizes that do not fit; see `MacchiatoAttention`, `ShortConv`, `RGLRU`.
    """

    def __init__(
        self,
        config: LatteConfig,
        *,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width, hidden = config.embed_dim, config.hidden_dim
        self.dropout, self.gated = config.dropout, config.mlp == "silu"
        self.attention_norm = norm(config, device=device, dtype=dtype)
        self.mixer: ShortConv | RGLRU | None = None
        if config.mixer == "conv":
            self.mixer = ShortConv(
                width, config.conv_width, causal=causal, device=device, dtype=dtype
            )
        elif config.mixer == "rglru":
            self.mixer = RGLRU(width, config.num_heads, causal=causal, device=device, dtype=dtype)
        self.attention = MacchiatoAttention(
            width,
            config.num_heads,
            config.num_latents,
            window=config.window,
            head_dim=config.head_dim,
            kv_heads=config.kv_heads,
            latent_heads=config.latent_heads,
            rotary_base=config.rotary_base,
            causal=causal,
            dropout=config.dropout,
            latent_dropout=config.latent_dropout,
            device=device,
            dtype=dtype,
        )
        self.mlp_norm = norm(config, device=device, dtype=dtype)

        def linear(inputs: int, outputs: int) -> nn.Linear:
            layer = nn.Linear(inputs, outputs, bias=config.bias, device=device, dtype=dtype)
            lecun_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            return layer

        self.mlp_in = linear(width, 2 * hidden if self.gated else hidden)
        self.mlp_out = linear(hidden, width)

    def empty_cache(self, batch: int) -> LayerCache:
        """The cache of `batch` sequences without tokens."""
        mixer = None if self.mixer is None else self.mixer.empty_state(batch)
        return LayerCache(self.attention.empty_state(batch), mixer)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: LayerCache | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, LayerCache]:
        """The block's output (B,T,E) for x (B,T,E), and the cache after it if `return_cache`.

        Args:
            key_mask: (B,T) bool, true for a real token. Padding before or behind a sequence has no
                influence on its tokens. Within it, latents and RG-LRU see a masked token as
                absent, while in window and convolution it keeps its place.
            cu_seqlens: (N+1,) borders of N sequences packed along T, with B == 1.
            cache: the tokens before these (causal only); it is left as it is.
            return_cache: also return the cache of N sequences after the last token (causal only).

        Raises:
            ValueError: shapes or combinations; and as `MacchiatoAttention`.
        """
        if cache is not None:
            check_type("LatteBlock", "cache", cache, LayerCache)
        normed = x_qk = self.attention_norm(x)
        rows = {"key_mask": key_mask, "cu_seqlens": cu_seqlens}
        mixer: MixerState = None
        if self.mixer is not None:
            x_qk = self.mixer(
                normed,
                **rows,
                state=None if cache is None else cache.mixer,
                return_state=return_cache,
            )
            if return_cache:
                x_qk, mixer = x_qk
        mixed = self.attention(
            normed,
            x_qk=x_qk,
            **rows,
            state=None if cache is None else cache.attention,
            return_state=return_cache,
        )
        if not return_cache:
            return self._mlp(x + mixed)
        mixed, attention = mixed
        return self._mlp(x + mixed), LayerCache(attention, mixer)

    def _check_cache(self, cache: LayerCache, batch: int) -> None:
        """Raises TypeError or ValueError for what is not a cache of `batch` sequences of this."""
        check_type("LatteBlock", "cache", cache, LayerCache)
        kind = _STATE_KINDS[type(self.mixer)]
        check_type("LatteBlock", "cache.mixer", cache.mixer, kind)
        self.attention._check_state(cache.attention, batch)

    @torch.no_grad()
    def step(self, x: Tensor, cache: LayerCache) -> Tensor:
        """The output (N,E) for one more token x (N,E); `cache` is updated in place, no dropout."""
        self._check_cache(cache, x.shape[0])
        return self._step(x, cache)

    def _step(self, x: Tensor, cache: LayerCache) -> Tensor:
        """`step` after `_check_cache`."""
        normed = x_qk = self.attention_norm(x)
        if self.mixer is not None:
            x_qk = self.mixer.step(normed, cache.mixer)  # type: ignore[arg-type]
        return self._mlp(x + self.attention.step(normed, cache.attention, x_qk=x_qk))

    @torch.no_grad()
    def draft(self, x: Tensor, cache: LayerCache) -> tuple[Tensor, LayerDraft]:
        """The output (N,w,E) for w more tokens x (N,w,E); `cache` is left as it is.

        `cache.commit(draft, accepted)` goes on. Call eval() first if there is dropout.
        """
        self._check_cache(cache, x.shape[0])
        normed = x_qk = self.attention_norm(x)
        mixer: MixerDraft = None
        if self.mixer is not None:
            x_qk, mixer = self.mixer.draft(normed, cache.mixer)  # type: ignore[arg-type]
        mixed, attention = self.attention.draft(normed, cache.attention, x_qk=x_qk)
        return self._mlp(x + mixed), LayerDraft(attention, mixer)

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = self.mlp_in(self.mlp_norm(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return x + F.dropout(self.mlp_out(hidden), self.dropout, self.training)


def norm(
    config: LatteConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The configuration's norm over E."""
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    # 1e-6: RMSNorm's default in torch is the smallest number of the dtype.
    eps = 1e-5 if config.norm == "layer" else 1e-6
    return kind(config.embed_dim, eps=eps, device=device, dtype=dtype)
