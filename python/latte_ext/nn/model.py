# SPDX-License-Identifier: Apache-2.0
"""Small plain models of latent attention: a causal language model and a bidirectional classifier.

Notation: B batch, T tokens, E model width, V vocabulary size, N sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_type
from .._drafts import Accepted, same_width
from .attention import lecun_normal_
from .block import LatteBlock, LayerCache, LayerDraft, norm
from .config import LatteConfig
from .operators import WHOLE, Operators

# Longest wavelength of the sinusoidal positions over 2 pi (arXiv 1706.03762, section 3.5).
POSITION_PERIOD = 10_000.0


class LatteLM(nn.Module):
    """Causal language model: embedding, blocks, norm, linear head.

    There are no positions but the window's rotations: order enters through causality, mixer and
    window, so the model runs on sequences of any length, in memory that does not grow with the
    number of tokens.

    Args:
        config: sizes and parts.
    """

    def __init__(
        self,
        config: LatteConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, width = config, config.embed_dim
        self.embedding = nn.Embedding(config.vocab_size, width, device=device, dtype=dtype)
        # Logits of a tied head start with variance 1.
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(width))
        self.blocks = _blocks(config, True, device, dtype)
        self.norm = norm(config, device=device, dtype=dtype)
        self.head = nn.Linear(width, config.vocab_size, bias=False, device=device, dtype=dtype)
        if config.tie_head:
            self.head.weight = self.embedding.weight
        else:
            lecun_normal_(self.head.weight)

    def empty_cache(self, batch: int) -> list[LayerCache]:
        """The cache of `batch` sequences without tokens, one entry per block."""
        return [block.empty_cache(batch) for block in self._blocks()]

    def forward(
        self,
        tokens: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: list[LayerCache] | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, list[LayerCache]]:
        """Logits (B,T,V) of each next token for tokens (B,T), and the cache if `return_cache`.

        A sequence may be given whole, in pieces (pass each piece's cache on) or token by token
        (`step`): the results agree to rounding.

        Args:
            tokens: the sequences, or N of them packed along T with B == 1.
            key_mask: (B,T) bool, true for a real token; see `LatteBlock` for what masking means.
            cu_seqlens: (N+1,) borders of the packed sequences.
            cache: the tokens before these, one entry per block; it is left as it is.
            return_cache: also return the cache of N sequences after the last token.
        """
        self._check("forward", tokens, 2, cache, key_mask=key_mask, cu_seqlens=cu_seqlens)
        x, cache = self._features(tokens, key_mask, cu_seqlens, cache, return_cache)
        logits: Tensor = self.head(x)
        return (logits, cache) if return_cache else logits

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,
        cache: list[LayerCache] | None = None,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerCache]]:
        """Read tokens (B,T): logits (N,V) of the token after each last one, and the cache.

        Sequences of different lengths are packed (`cu_seqlens`) or padded on the left
        (`key_mask`); the cache can step on from either.

        Raises:
            ValueError: a sequence of no tokens.
        """
        self._check("prefill", tokens, 2, cache, key_mask=key_mask, cu_seqlens=cu_seqlens)
        if tokens.shape[1] == 0:
            raise ValueError(
                f"[LatteLM] tokens has shape {tuple(tokens.shape)}, expected (B, T) with T >= 1"
            )
        if cu_seqlens is not None and bool((cu_seqlens.diff() < 1).any()):
            raise ValueError(
                f"[LatteLM] cu_seqlens has lengths {cu_seqlens.diff().tolist()}, expected at least "
                "one token in each sequence"
            )
        x, cache = self._features(tokens, key_mask, cu_seqlens, cache, True)
        last = x[:, -1] if cu_seqlens is None else x[0, cu_seqlens[1:].long() - 1]
        logits: Tensor = self.head(last)
        return logits, cache

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: list[LayerCache]) -> Tensor:
        """Logits (N,V) after one more token (N,) per sequence; `cache` is updated in place.

        Constant time and memory; no dropout, nothing recorded for gradients.
        """
        self._check("step", tokens, 1, cache)
        # All of them before the first is updated.
        for block, layer_cache in zip(self._blocks(), cache, strict=True):
            block._check_cache(layer_cache, tokens.shape[0])
        x: Tensor = self.embedding(tokens)
        for block, layer_cache in zip(self._blocks(), cache, strict=True):
            x = block._step(x, layer_cache)
        logits: Tensor = self.head(self.norm(x))
        return logits

    @torch.no_grad()
    def draft(self, tokens: Tensor, cache: list[LayerCache]) -> tuple[Tensor, list[LayerDraft]]:
        """Logits (N,w,V) after each of w more tokens (N,w) per sequence; `cache` stays as it is.

        One pass over the weights for all w tokens, which is what speculative decoding gains by;
        `commit` then lets some of them enter the cache. The logits equal those of w steps up to
        the rounding of the matrix products. Call eval() first if the model has dropout.

        Raises:
            ValueError: shapes.
        """
        self._check("draft", tokens, 2, cache)
        x: Tensor = self.embedding(tokens)
        drafts = []
        for block, layer_cache in zip(self._blocks(), cache, strict=True):
            x, draft = block.draft(x, layer_cache)
            drafts.append(draft)
        return self.head(self.norm(x)), drafts

    @staticmethod
    def commit(cache: list[LayerCache], draft: list[LayerDraft], accepted: Accepted) -> None:
        """The first tokens of a draft enter the cache, in place.

        Args:
            cache: the one that `draft` was made with, or a copy of it.
            accepted: (N,) integers, how many of the w tokens each sequence keeps, from 0 to w.

        Raises:
            ValueError: a draft of other shapes, accepted out of range.
            TypeError: types.
        """
        op = "[LatteLM.commit]"
        if len(draft) != len(cache):
            raise ValueError(f"{op} draft has {len(draft)} layers, expected {len(cache)} as cache")
        # All of them before the first is updated.
        same_width(
            op, (layer.check_draft(op, part) for layer, part in zip(cache, draft, strict=True))
        )
        for layer_cache, layer_draft in zip(cache, draft, strict=True):
            layer_cache.commit(layer_draft, accepted)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """prompt (B,T), T >= 1, followed by `max_new_tokens` sampled tokens: (B,T+max_new_tokens).

        Call eval() first if the model has dropout. temperature, top_k, generator: see
        `sample_token`.
        """
        logits, cache = self.prefill(prompt)
        tokens = [prompt]
        for i in range(max_new_tokens):
            if i:
                logits = self.step(tokens[-1].squeeze(1), cache)
            token = sample_token(logits, temperature=temperature, top_k=top_k, generator=generator)
            tokens.append(token.unsqueeze(1))
        return torch.cat(tokens, dim=1)

    def _check(
        self,
        name: str,
        tokens: Tensor,
        rank: int,
        cache: list[LayerCache] | None,
        **rows: Tensor | None,
    ) -> None:
        """Types, the rank of tokens, and that every block has a cache if there is one."""
        op = "LatteLM"
        check_type(op, "tokens", tokens, Tensor)
        for label, x in rows.items():
            if x is not None:
                check_type(op, label, x, Tensor)
        if tokens.dim() != rank:
            raise ValueError(
                f"[{op}] tokens has shape {tuple(tokens.shape)}, expected {rank} dimensions"
            )
        if cache is None and name in ("forward", "prefill"):
            return
        if not isinstance(cache, (list, tuple)):
            raise TypeError(f"[{op}] cache is a {type(cache).__name__}, expected a list")
        if len(cache) != len(self.blocks):
            raise ValueError(f"[{op}] cache has {len(cache)} layers, expected {len(self.blocks)}")

    def _blocks(self) -> list[LatteBlock]:
        return [block for block in self.blocks if isinstance(block, LatteBlock)]

    def _features(
        self,
        tokens: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: list[LayerCache] | None,
        return_cache: bool,
    ) -> tuple[Tensor, list[LayerCache]]:
        """What the head reads (B,T,E), and the cache after the last token if asked for."""
        x = F.dropout(self.embedding(tokens), self.config.dropout, self.training)
        caches = [None] * len(self.blocks) if cache is None else cache
        after = []
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            x = block(
                x,
                key_mask=key_mask,
                cu_seqlens=cu_seqlens,
                cache=layer_cache,
                return_cache=return_cache,
            )
            if return_cache:
                x, layer_cache = x
                after.append(layer_cache)
        return self.norm(x), after


def _blocks(
    config: LatteConfig,
    causal: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.ModuleList:
    return nn.ModuleList(
        LatteBlock(config, causal=causal, device=device, dtype=dtype)
        for _ in range(config.num_layers)
    )


def sample_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token ids (N,) drawn from softmax(logits / temperature), logits (N,V).

    Args:
        temperature: 0 takes the most likely token.
        top_k: draw among the k most likely tokens only.
        generator: source of randomness.

    Raises:
        ValueError: a negative temperature, or top_k outside [1, V].
    """
    if temperature < 0:
        raise ValueError(f"[sample_token] temperature is {temperature}, expected >= 0")
    if top_k is not None and not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"[sample_token] top_k is {top_k}, expected 1 to {logits.shape[-1]}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


class LatteEncoder(nn.Module):
    """Bidirectional classifier: embedding, sinusoidal positions, blocks, mean over tokens, head.

    Args:
        config: sizes and parts; E is even.
        num_classes: number of outputs.

    Raises:
        ValueError: an odd embed_dim; and as `LatteBlock`.
    """

    operators: Operators = WHOLE

    def __init__(
        self,
        config: LatteConfig,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = config.embed_dim
        if width % 2:
            raise ValueError(f"[LatteEncoder] embed_dim is {width}, expected an even number")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, width, device=device, dtype=dtype)
        self.blocks = _blocks(config, False, device, dtype)
        self.norm = norm(config, device=device, dtype=dtype)
        self.head = nn.Linear(width, num_classes, device=device, dtype=dtype)
        lecun_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Class logits (B,num_classes) for tokens (B,T); key_mask (B,T) is true for a real token.

        Positions count real tokens only, so that padding has no influence, nor has a masked token
        within a sequence unless the model has a window or a convolution, in which it keeps its
        place. A sequence without real tokens pools to zero.
        """
        mask = torch.ones_like(tokens, dtype=torch.bool) if key_mask is None else key_mask
        x = self.embedding(tokens)
        before = self.operators.sum_before(mask.sum(1, keepdim=True))
        x = x + sinusoidal_positions(mask.cumsum(1) - 1 + before, x.shape[-1]).to(x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, key_mask=key_mask)
        weight = mask.unsqueeze(2).to(x.dtype)
        total = self.operators.sum_of_parts
        pooled = total((self.norm(x) * weight).sum(1)) / total(weight.sum(1)).clamp(min=1)
        logits: Tensor = self.head(pooled)
        return logits


def sinusoidal_positions(positions: Tensor, dim: int) -> Tensor:
    """Sines and cosines (..., dim) of integer positions (...): arXiv 1706.03762, section 3.5."""
    half = dim // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / half
    angles = positions.unsqueeze(-1) * POSITION_PERIOD**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
