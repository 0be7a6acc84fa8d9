# SPDX-License-Identifier: Apache-2.0
"""Small plain models of latent attention: a block, a causal language model, an encoder.

Notation: B batch, T tokens, E model width, V vocabulary size, K convolution width, N sequences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..state import LatentState
from .attention import LatentAttention, lecun_normal_

# Hidden width of the MLP over E (the authors' models).
MLP_RATIO = 4
# Longest wavelength of the sinusoidal positions over 2 pi (arXiv 1706.03762, section 3.5).
POSITION_PERIOD = 10_000.0


class LayerCache(NamedTuple):
    """What one causal block remembers of the tokens so far: a fixed size, whatever their number.

    state: of N sequences; tail (N,K-1,E): the convolution's last inputs, (N,0,E) without one.
    """

    state: LatentState
    tail: Tensor


class CausalConv(nn.Module):
    """Depthwise causal convolution, y[t] = bias + sum over j < K of weight[:, j] x[t - K + 1 + j].

    Tokens before the first count as zero. Stands in front of q and k (the -Conv variants of the
    paper; width 4 and the bias are this library's choice).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        bound = 1 / math.sqrt(width)
        nn.init.uniform_(self.weight, -bound, bound)

    def empty_tail(self, batch: int) -> Tensor:
        """The tail (N,K-1,E) of sequences without tokens."""
        channels, width = self.weight.shape
        return self.weight.new_zeros(batch, width - 1, channels)

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution (B,T,E) of x (B,T,E) after tail (B,K-1,E), and the new tail."""
        padded = torch.cat([tail.to(x.dtype), x], dim=1)
        channels = self.weight.shape[0]
        y = F.conv1d(padded.mT, self.weight.unsqueeze(1), self.bias, groups=channels).mT
        # A copy: a view would keep every activation of the sequence alive.
        return y, padded[:, x.shape[1] :].clone()


class LatteBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)) with a GELU MLP of width 4E.

    Args:
        embed_dim, num_heads, num_latents, head_dim, kv_heads, causal, dropout, latent_dropout:
            as in `LatentAttention`; dropout also acts on the MLP's output.
        conv_width: K, width of a causal depthwise convolution that q and k are projected from
            (values come from the block's input itself); 0: none.

    Raises:
        ValueError: a negative conv_width, or one with causal=False; and as `LatentAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_latents: int,
        *,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        causal: bool = True,
        conv_width: int = 0,
        dropout: float = 0.0,
        latent_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if conv_width < 0 or (conv_width and not causal):
            raise ValueError(
                f"[LatteBlock] conv_width is {conv_width} with causal={causal}, "
                "expected 0, or a positive width with causal=True"
            )
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.attention = LatentAttention(
            embed_dim,
            num_heads,
            num_latents,
            head_dim=head_dim,
            kv_heads=kv_heads,
            causal=causal,
            dropout=dropout,
            latent_dropout=latent_dropout,
            device=device,
            dtype=dtype,
        )
        self.conv = None
        if conv_width:
            self.conv = CausalConv(embed_dim, conv_width, device=device, dtype=dtype)
        self.mlp_norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        hidden = MLP_RATIO * embed_dim
        self.mlp_in = nn.Linear(embed_dim, hidden, device=device, dtype=dtype)
        self.mlp_out = nn.Linear(hidden, embed_dim, device=device, dtype=dtype)
        for layer in (self.mlp_in, self.mlp_out):
            lecun_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def empty_cache(self, batch: int) -> LayerCache:
        """The cache of `batch` sequences without tokens."""
        state = self.attention.empty_state(batch)
        if self.conv is None:
            return LayerCache(
                state, self.mlp_in.weight.new_zeros(batch, 0, self.mlp_in.in_features)
            )
        return LayerCache(state, self.conv.empty_tail(batch))

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
            key_mask, cu_seqlens: as in `LatentAttention`, for a block without convolution.
            cache: the tokens before these (causal only); it is left as it is.
            return_cache: also return the cache after the last token.

        Raises:
            ValueError: key_mask or cu_seqlens with a convolution; and as `LatentAttention`.
        """
        normed = self.attention_norm(x)
        x_qk, tail = normed, normed[:, :0]
        if self.conv is not None:
            if key_mask is not None or cu_seqlens is not None:
                raise ValueError(
                    "[LatteBlock] got key_mask or cu_seqlens with a convolution, expected neither: "
                    "it would mix real tokens with masked ones or with another sequence"
                )
            x_qk, tail = self.conv(
                normed, self.conv.empty_tail(x.shape[0]) if cache is None else cache.tail
            )
        mixed, state = self.attention(
            normed,
            x_qk=x_qk,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=None if cache is None else cache.state,
            return_state=True,
        )
        x = self._mlp(x + mixed)
        return (x, LayerCache(state, tail)) if return_cache else x

    @torch.no_grad()
    def step(self, x: Tensor, cache: LayerCache) -> Tensor:
        """The output (N,E) for one more token x (N,E); `cache` is updated in place, no dropout."""
        normed = x_qk = self.attention_norm(x)
        if self.conv is not None:
            x_qk, tail = self.conv(normed.unsqueeze(1), cache.tail)
            x_qk = x_qk.squeeze(1)
            cache.tail.copy_(tail)
        return self._mlp(x + self.attention.step(normed, cache.state, x_qk=x_qk))

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + F.dropout(self.mlp_out(hidden), self.dropout, self.training)


class LatteLM(nn.Module):
    """Causal language model: embedding, blocks, norm, linear head.

    There are no positions: order enters through causality and the convolution, so the model runs
    on sequences of any length, in memory that does not grow with the number of tokens.

    Args:
        vocab_size: V.
        embed_dim: E.
        num_layers: number of `LatteBlock`s.
        num_heads, num_latents, head_dim, kv_heads, conv_width, dropout, latent_dropout: of each
            block; dropout also acts on the embedding.
        tie_head: the head uses the embedding's weight (V,E).
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        num_latents: int,
        *,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        conv_width: int = 4,
        dropout: float = 0.0,
        latent_dropout: float = 0.0,
        tie_head: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.embedding = nn.Embedding(vocab_size, embed_dim, device=device, dtype=dtype)
        # Logits of a tied head start with variance 1.
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(embed_dim))
        self.blocks = nn.ModuleList(
            LatteBlock(
                embed_dim,
                num_heads,
                num_latents,
                head_dim=head_dim,
                kv_heads=kv_heads,
                conv_width=conv_width,
                dropout=dropout,
                latent_dropout=latent_dropout,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False, device=device, dtype=dtype)
        if tie_head:
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
        cache: list[LayerCache] | None = None,
        return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, list[LayerCache]]:
        """Logits (B,T,V) of each next token for tokens (B,T), and the cache if `return_cache`.

        A sequence may be given whole, in pieces (pass each piece's cache on) or token by token
        (`step`): the results agree to rounding. `cache` is left as it is.
        """
        x, cache = self._features(tokens, cache)
        logits: Tensor = self.head(x)
        return (logits, cache) if return_cache else logits

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, cache: list[LayerCache] | None = None
    ) -> tuple[Tensor, list[LayerCache]]:
        """Read tokens (B,T), T >= 1: logits (B,V) of the token after the last, and the cache.

        Raises:
            ValueError: no tokens.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"[LatteLM] tokens has shape {tuple(tokens.shape)}, expected (B, T) with T >= 1"
            )
        x, cache = self._features(tokens, cache)
        logits: Tensor = self.head(x[:, -1])
        return logits, cache

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: list[LayerCache]) -> Tensor:
        """Logits (N,V) after one more token (N,) per sequence; `cache` is updated in place.

        Constant time and memory; no dropout, nothing recorded for gradients.
        """
        x: Tensor = self.embedding(tokens)
        for block, layer_cache in zip(self._blocks(), cache, strict=True):
            x = block.step(x, layer_cache)
        logits: Tensor = self.head(self.norm(x))
        return logits

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

    def _blocks(self) -> list[LatteBlock]:
        return [block for block in self.blocks if isinstance(block, LatteBlock)]

    def _features(
        self, tokens: Tensor, cache: list[LayerCache] | None
    ) -> tuple[Tensor, list[LayerCache]]:
        """What the head reads (B,T,E), and the cache after the last token."""
        x = F.dropout(self.embedding(tokens), self.dropout, self.training)
        caches = [None] * len(self.blocks) if cache is None else cache
        after = []
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            x, layer_cache = block(x, cache=layer_cache, return_cache=True)
            after.append(layer_cache)
        return self.norm(x), after


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
    """Bidirectional classifier: embedding, sinusoidal positions, blocks, mean over real tokens, head.

    Args:
        vocab_size: V.
        num_classes: number of outputs.
        embed_dim: E, even.
        num_layers: number of `LatteBlock`s.
        num_heads, num_latents, head_dim, kv_heads, dropout, latent_dropout: of each block; dropout
            also acts on the embedding.

    Raises:
        ValueError: an odd embed_dim; and as `LatentAttention`.
    """

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        num_latents: int,
        *,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        dropout: float = 0.0,
        latent_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % 2:
            raise ValueError(f"[LatteEncoder] embed_dim is {embed_dim}, expected an even number")
        self.dropout = dropout
        self.embedding = nn.Embedding(vocab_size, embed_dim, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(
            LatteBlock(
                embed_dim,
                num_heads,
                num_latents,
                head_dim=head_dim,
                kv_heads=kv_heads,
                causal=False,
                dropout=dropout,
                latent_dropout=latent_dropout,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.head = nn.Linear(embed_dim, num_classes, device=device, dtype=dtype)
        lecun_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Class logits (B,num_classes) for tokens (B,T); key_mask (B,T) is true for a real token.

        A masked token has no influence, wherever it stands: positions count real tokens only. A
        sequence without real tokens pools to zero.
        """
        mask = torch.ones_like(tokens, dtype=torch.bool) if key_mask is None else key_mask
        x = self.embedding(tokens)
        x = x + sinusoidal_positions(mask.cumsum(1) - 1, x.shape[-1]).to(x.dtype)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x, key_mask=key_mask)
        weight = mask.unsqueeze(2).to(x.dtype)
        pooled = (self.norm(x) * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits: Tensor = self.head(pooled)
        return logits


def sinusoidal_positions(positions: Tensor, dim: int) -> Tensor:
    """Sines and cosines (..., dim) of integer positions (...): arXiv 1706.03762, section 3.5."""
    half = dim // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / half
    angles = positions.unsqueeze(-1) * POSITION_PERIOD**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
