# SPDX-License-Identifier: Apache-2.0
"""The block of the models: latent attention, q and k optionally from a convolution, and an MLP.

Notation: B batch, T tokens, E model width, K convolution width, N sequences.
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


class LayerCache(NamedTuple):
    """What one causal block remembers of the tokens so far: a fixed size, whatever their number.

    state: of N sequences; tail (N,K-1,E): the convolution's last inputs, (N,0,E) without one.
    """

    state: LatentState
    tail: Tensor


class CausalConv(nn.Module):
    """Depthwise causal convolution, y[t] = bias + sum over j < K of weight[j] x[t - K + 1 + j].

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
        self.weight = nn.Parameter(torch.empty(width, channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        bound = 1 / math.sqrt(width)
        nn.init.uniform_(self.weight, -bound, bound)

    def empty_tail(self, batch: int) -> Tensor:
        """The tail (N,K-1,E) of sequences without tokens."""
        width, channels = self.weight.shape
        return self.weight.new_zeros(batch, width - 1, channels)

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution (B,T,E) of x (B,T,E) after tail (B,K-1,E), and the new tail."""
        padded = torch.cat([tail.to(x.dtype), x], dim=1)
        # Shifted sums: twice as fast on CPUs, forward and backward, as F.conv1d with groups.
        y = self.bias.expand_as(x)
        for shift, weight in enumerate(self.weight.unbind()):
            y = torch.addcmul(y, padded[:, shift : shift + x.shape[1]], weight)
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
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)))
        return x + F.dropout(self.mlp_out(hidden), self.dropout, self.training)
