# SPDX-License-Identifier: Apache-2.0
"""The latent attention layer (Latte, arXiv 2402.17512).

Notation: B batch, T tokens, E model width, H query heads, Hk key/value heads, L latents per head,
D value channels per head, N sequences (B, or len(cu_seqlens) - 1 when packed).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_integers, check_number, check_type
from .._drafts import LatentDraft
from ..draft import latent_attention_draft
from ..functional import latent_attention_step
from ..state import LatentState
from .operators import WHOLE, Operators

# Standard deviation of a unit normal distribution cut off at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fill weight (out, in) in place with the authors' initialisation, and return it.

    A normal distribution of variance 1 / in, cut off at two standard deviations (Flax's default).
    """
    std = math.sqrt(1 / weight.shape[1]) / _TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def check_sizes(
    op: str, embed_dim: int, num_heads: int, head_dim: int | None, **groups: int
) -> None:
    """Sizes of a layer are positive, E is a multiple of H or D is given, `groups` divide H."""
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, **groups}
    if head_dim is not None:
        sizes["head_dim"] = head_dim
    check_integers(op.strip("[]"), **sizes)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{op} {name} is {size}, expected a positive number")
    if head_dim is None and embed_dim % num_heads:
        raise ValueError(
            f"{op} embed_dim is {embed_dim}, expected a multiple of num_heads = {num_heads}, "
            "or head_dim given"
        )
    for name, size in groups.items():
        if num_heads % size:
            raise ValueError(
                f"{op} {name} is {size}, expected a divisor of num_heads = {num_heads}"
            )


def check_rates(op: str, **rates: float) -> None:
    """Dropout rates are in [0, 1)."""
    for name, rate in rates.items():
        check_number(op.strip("[]"), name, rate)
        if not 0 <= rate < 1:
            raise ValueError(f"{op} {name} is {rate}, expected a rate in [0, 1)")


def check_input(op: str, name: str, x: Tensor, rank: int, embed_dim: int) -> None:
    """x is (B,T,E), or (N,E) where rank is 2."""
    check_type(op.strip("[]"), name, x, Tensor)
    if x.dim() != rank or x.shape[-1] != embed_dim:
        axes = "(B, T, E)" if rank == 3 else "(N, E)"
        raise ValueError(
            f"{op} {name} has shape {tuple(x.shape)}, expected {axes} with E = {embed_dim}"
        )


def drop_latents(q: Tensor, rate: float, scale: float) -> tuple[Tensor, Tensor]:
    """q (B,H,T,L) with dropped latents at -inf, and the factor (B,H,T,1) that undoes the softmax.

    With keep in {0, 1} per token and latent, softmax over the kept ones is
    keep p / sum(keep p), so the attention's output times sum(keep p) / (1 - rate) is exactly
    sum over l of (keep_l p(l|t) / (1 - rate)) mean_l, also for the gradients.
    """
    keep = torch.empty(q.shape, dtype=torch.bool, device=q.device).bernoulli_(1 - rate)
    p = torch.softmax(q.to(torch.promote_types(q.dtype, torch.float32)) * scale, dim=-1)
    kept = torch.where(keep, p, 0).sum(dim=-1, keepdim=True) / (1 - rate)
    return q.masked_fill(~keep, -torch.inf), kept


class LatentAttention(nn.Module):
    """Multi-head latent attention of a sequence over itself (arXiv 2402.17512).

    q = x Wq and k = x Wk are logits over L latents per head, v = x Wv are values; a latent is a
    column of Wq and a column of Wk, there is no further embedding of it. Then y = out(attention).

    Args:
        embed_dim: E.
        num_heads: H.
        num_latents: L, the number of latents of each head.
        head_dim: D; None: E / H, which must be a whole number.
        kv_heads: Hk, a divisor of H; None: H.
        causal: whether token t sees the tokens s <= t only.
        dropout: rate on the layer's output, in training.
        latent_dropout: rate on p(l|t), in training; what is left is not renormalised but divided
            by 1 - rate, as the authors do.
        scale: positive factor on the logits q and k.
        bias: add a bias to q, v and the output. k never has one: p(s|l) does not depend on it.

    Raises:
        ValueError: sizes that are not positive or do not divide, rates outside [0, 1), a scale
            that is not positive.
    """

    operators: Operators = WHOLE

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_latents: int,
        *,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        latent_dropout: float = 0.0,
        scale: float = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        op = "[LatentAttention]"
        check_sizes(op, embed_dim, num_heads, head_dim, kv_heads=kv_heads)
        check_integers("LatentAttention", num_latents=num_latents)
        if num_latents < 1:
            raise ValueError(f"{op} num_latents is {num_latents}, expected a positive number")
        check_rates(op, dropout=dropout, latent_dropout=latent_dropout)
        check_number("LatentAttention", "scale", scale)
        if not 0 < scale < math.inf:
            raise ValueError(f"{op} scale is {scale}, expected a positive number")

        self.embed_dim, self.num_heads, self.num_latents = embed_dim, num_heads, num_latents
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.kv_heads, self.causal, self.scale = kv_heads, causal, scale
        self.dropout, self.latent_dropout = dropout, latent_dropout

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim, num_heads * num_latents, bias)
        self.k_proj = linear(embed_dim, kv_heads * num_latents, False)
        self.v_proj = linear(embed_dim, kv_heads * self.head_dim, bias)
        self.out_proj = linear(num_heads * self.head_dim, embed_dim, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors do: lecun_normal weights, zero biases."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            lecun_normal_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_latents={self.num_latents}, head_dim={self.head_dim}, "
            f"kv_heads={self.kv_heads}, causal={self.causal}"
        )

    def empty_state(self, batch: int) -> LatentState:
        """The state of `batch` sequences without tokens, on the parameters' device."""
        weight = self.v_proj.weight
        return LatentState.empty(
            batch,
            self.kv_heads,
            self.num_latents,
            self.head_dim,
            device=weight.device,
            dtype=torch.promote_types(weight.dtype, torch.float32),
        )

    def forward(
        self,
        x: Tensor,
        *,
        x_qk: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: LatentState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LatentState]:
        """The layer's output (B,T,E) for x (B,T,E), and the state after it if `return_state`.

        Args:
            x: the sequence, or N of them packed along T with B == 1.
            x_qk: what q and k are projected from (B,T,E), such as a convolution of x; None: x.
            key_mask: (B,T) bool, true for a real token; the others are seen by no token.
            cu_seqlens: (N+1,) borders of the packed sequences.
            state: the tokens before these, N sequences (causal only).
            return_state: also return the `LatentState` of N sequences after the last token.

        Raises:
            ValueError: shapes or combinations; see `latte_ext.latent_attention` for the rest.
        """
        x_qk = x if x_qk is None else x_qk
        self._check("x", x, 3)
        self._check("x_qk", x_qk, 3)
        q, k, v = self._rows(x, x_qk)
        kept = None
        if self.training and self.latent_dropout > 0:
            q, kept = drop_latents(q, self.latent_dropout, self.scale)
        y = self.operators.latent_attention(
            q,
            k,
            v,
            causal=self.causal,
            scale=self.scale,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=return_state,
        )
        if return_state:
            y, final = y
        if kept is not None:
            y = y * kept.to(y.dtype)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        y = F.dropout(y, self.dropout, self.training)
        return (y, final) if return_state else y

    @torch.no_grad()
    def step(self, x: Tensor, state: LatentState, *, x_qk: Tensor | None = None) -> Tensor:
        """The output (N,E) for one more token x (N,E) per sequence; `state` is updated in place.

        Equals `forward` on a sequence of one token in evaluation mode: there is no dropout, and
        nothing is recorded for gradients.

        Raises:
            ValueError: shapes, or causal is false.
        """
        if not self.causal:
            raise ValueError("[LatentAttention] step got causal=False, expected causal=True")
        x_qk = x if x_qk is None else x_qk
        self._check("x", x, 2)
        self._check("x_qk", x_qk, 2)
        q = self.q_proj(x_qk).unflatten(1, (self.num_heads, -1))
        k = self.k_proj(x_qk).unflatten(1, (self.kv_heads, -1))
        v = self.v_proj(x).unflatten(1, (self.kv_heads, -1))
        y = latent_attention_step(q, k, v, state, scale=self.scale)
        projected: Tensor = self.out_proj(y.flatten(1))
        return projected

    @torch.no_grad()
    def draft(
        self, x: Tensor, state: LatentState, *, x_qk: Tensor | None = None
    ) -> tuple[Tensor, LatentDraft]:
        """The output (N,w,E) for w more tokens x (N,w,E); `state` is left as it is.

        `state.commit(draft, accepted)` goes on. No dropout, nothing recorded for gradients.

        Raises:
            ValueError: shapes, or causal is false.
        """
        if not self.causal:
            raise ValueError("[LatentAttention] draft got causal=False, expected causal=True")
        x_qk = x if x_qk is None else x_qk
        self._check("x", x, 3)
        self._check("x_qk", x_qk, 3)
        q, k, v = self._rows(x, x_qk)
        y, draft = latent_attention_draft(q, k, v, state, scale=self.scale)
        return self.out_proj(y.transpose(1, 2).flatten(2)), draft

    def _rows(self, x: Tensor, x_qk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,T,H,L) to (B,H,T,L) as views: the operator takes any strides."""
        q = self.q_proj(x_qk).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k = self.k_proj(x_qk).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        return q, k, v

    def _check(self, name: str, x: Tensor, rank: int) -> None:
        check_input("[LatentAttention]", name, x, rank, self.embed_dim)
