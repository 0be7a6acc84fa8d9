# SPDX-License-Identifier: Apache-2.0
"""The attention layer of Latte Macchiato: a local window and global latents (arXiv 2402.17512).

Notation: B batch, T tokens, E model width, H query heads, Hk key/value heads, Hl latent heads,
L latents per head, D channels per head, N sequences (B, or len(cu_seqlens) - 1 when packed).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_integers, check_type
from .._drafts import MacchiatoDraft
from ..draft import latent_attention_draft, macchiato_attention_draft
from ..functional import latent_attention_step
from ..macchiato import macchiato_attention_step
from ..rotary import rotate
from ..state import LatentState
from ..window_cache import MacchiatoState, WindowCache
from .attention import check_input, check_rates, check_sizes, drop_latents, lecun_normal_
from .operators import WHOLE, Operators

_OP = "[MacchiatoAttention]"


class MacchiatoAttention(nn.Module):
    """A token attends to its window and to latents of the whole past, in one probability.

        y_t = p(0|t) local_t + sum_l p(l|t) E[v | l, s <= t]       p(l|t) = softmax over 0..L

    local_t is softmax attention to the last `window` tokens with rotary queries and keys. With
    window=0 there is no p(0|t) and the layer is `LatentAttention`, with num_latents=0 the window
    is all there is. (Which input the window's queries and keys are computed from, and the value
    that p(0|t) starts at, are this library's choice; that they are rotary is recalled from the
    paper.)

    Args:
        embed_dim: E.
        num_heads: H.
        num_latents: L of each head; 0: the window alone.
        window: tokens of the window, the token itself included; |t - s| < window if not causal.
        head_dim: D; None: E / H, which must be a whole number.
        kv_heads: Hk, a divisor of H; None: H.
        latent_heads: Hl, heads of the latents' keys, a divisor of H; None: Hk.
        rotary_base: of the rotary embedding of the window's queries and keys; None: no rotation.
        causal: whether token t sees the tokens s <= t only.
        dropout: rate on the layer's output, in training.
        latent_dropout: rate on p(l|t), l = 0 included, in training; see `LatentAttention`.

    Raises:
        ValueError: sizes that are not positive or do not divide, neither window nor latents, an
            odd D with a rotation, rates outside [0, 1).
    """

    operators: Operators = WHOLE

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_latents: int,
        *,
        window: int,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        latent_heads: int | None = None,
        rotary_base: float | None = 10_000.0,
        causal: bool = True,
        dropout: float = 0.0,
        latent_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        latent_heads = kv_heads if latent_heads is None else latent_heads
        check_sizes(
            _OP, embed_dim, num_heads, head_dim, kv_heads=kv_heads, latent_heads=latent_heads
        )
        check_rates(_OP, dropout=dropout, latent_dropout=latent_dropout)
        check_integers("MacchiatoAttention", window=window, num_latents=num_latents)
        if min(window, num_latents) < 0 or window == num_latents == 0:
            raise ValueError(
                f"{_OP} window is {window} and num_latents {num_latents}, "
                "expected no negative number and one that is positive"
            )
        self.embed_dim, self.num_heads, self.num_latents = embed_dim, num_heads, num_latents
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.kv_heads, self.latent_heads = kv_heads, latent_heads
        self.window, self.rotary_base, self.causal = window, rotary_base, causal
        self.dropout, self.latent_dropout = dropout, latent_dropout
        if window and rotary_base is not None and self.head_dim % 2:
            raise ValueError(
                f"{_OP} head_dim is {self.head_dim}, expected an even number to rotate"
            )

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        if window:
            self.q_proj = linear(embed_dim, num_heads * self.head_dim)
            self.k_proj = linear(embed_dim, kv_heads * self.head_dim)
        if num_latents:
            choices = num_latents + (window > 0)
            self.q_latent_proj = linear(embed_dim, num_heads * choices, bias=window > 0)
            self.k_latent_proj = linear(embed_dim, latent_heads * num_latents)
        self.v_proj = linear(embed_dim, kv_heads * self.head_dim)
        self.out_proj = linear(num_heads * self.head_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as `LatentAttention`; a bias lets p(0|t) start at one half."""
        for projection in self.children():
            assert isinstance(projection, nn.Linear)
            lecun_normal_(projection.weight)
        if self.window and self.num_latents:
            with torch.no_grad():
                bias = self.q_latent_proj.bias.zero_().unflatten(0, (self.num_heads, -1))
                bias[:, 0] = math.log(self.num_latents)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_latents={self.num_latents}, window={self.window}, head_dim={self.head_dim}, "
            f"kv_heads={self.kv_heads}, latent_heads={self.latent_heads}, causal={self.causal}"
        )

    def empty_state(self, batch: int) -> MacchiatoState:
        """The state of `batch` sequences without tokens, on the parameters' device."""
        weight = self.v_proj.weight
        latent = window = None
        if self.num_latents:
            latent = LatentState.empty(
                batch,
                math.lcm(self.latent_heads, self.kv_heads),
                self.num_latents,
                self.head_dim,
                device=weight.device,
                dtype=torch.promote_types(weight.dtype, torch.float32),
            )
        if self.window:
            window = WindowCache.empty(
                batch,
                self.kv_heads,
                self.window,
                self.head_dim,
                self.head_dim,
                device=weight.device,
                dtype=weight.dtype,
            )
        return MacchiatoState(latent, window)

    def forward(
        self,
        x: Tensor,
        *,
        x_qk: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: MacchiatoState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MacchiatoState]:
        """The layer's output (B,T,E) for x (B,T,E), and the state after it if `return_state`.

        Args:
            x: the sequence, or N of them packed along T with B == 1.
            x_qk: what the latents' queries and keys are projected from (B,T,E), such as a
                convolution of x; None: x. Values and the window see x.
            key_mask: (B,T) bool, true for a real token; the others are seen by no token, but keep
                their place in the window.
            cu_seqlens: (N+1,) borders of the packed sequences.
            state: the tokens before these, N sequences (causal only); left as it is.
            return_state: also return the state of N sequences after the last token (causal only).

        Raises:
            ValueError: shapes or combinations; see `latte_ext.macchiato_attention` for the rest.
        """
        x_qk = x if x_qk is None else x_qk
        check_input(_OP, "x", x, 3, self.embed_dim)
        check_input(_OP, "x_qk", x_qk, 3, self.embed_dim)
        if state is not None:
            check_type("MacchiatoAttention", "state", state, MacchiatoState)
        q_latent, k_latent = self._latent_logits(x_qk)
        v = _heads(self.v_proj(x), self.kv_heads)
        kept = None
        if self.training and self.latent_dropout > 0 and self.num_latents:
            q_latent, kept = drop_latents(q_latent, self.latent_dropout, 1.0)
        y, after = self._attend(q_latent, k_latent, x, v, key_mask, cu_seqlens, state, return_state)
        if kept is not None:
            y = y * kept.to(y.dtype)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        y = F.dropout(y, self.dropout, self.training)
        if not return_state:
            return y
        assert after is not None
        return y, after

    @torch.no_grad()
    def step(self, x: Tensor, state: MacchiatoState, *, x_qk: Tensor | None = None) -> Tensor:
        """The output (N,E) for one more token x (N,E) per sequence; `state` is updated in place.

        Equals `forward` on a sequence of one token in evaluation mode: there is no dropout, and
        nothing is recorded for gradients.

        Raises:
            ValueError: shapes, or causal is false.
        """
        if not self.causal:
            raise ValueError(f"{_OP} step got causal=False, expected causal=True")
        x_qk = x if x_qk is None else x_qk
        check_input(_OP, "x", x, 2, self.embed_dim)
        check_input(_OP, "x_qk", x_qk, 2, self.embed_dim)
        self._check_state(state, x.shape[0])
        x, x_qk = x.unsqueeze(1), x_qk.unsqueeze(1)
        q_latent, k_latent = self._latent_logits(x_qk)
        v = _heads(self.v_proj(x), self.kv_heads)
        if state.window is None:
            assert state.latent is not None
            k_latent, v = self._spread(k_latent, v)
            y = latent_attention_step(
                q_latent.squeeze(2), k_latent.squeeze(2), v.squeeze(2), state.latent
            )
        else:
            q, k = self._window_rows(x, state.window.position, None)
            y = macchiato_attention_step(
                q_latent.squeeze(2),
                k_latent.squeeze(2),
                q.squeeze(2),
                k.squeeze(2),
                v.squeeze(2),
                state,
            )
        projected: Tensor = self.out_proj(y.flatten(1))
        return projected

    @torch.no_grad()
    def draft(
        self, x: Tensor, state: MacchiatoState, *, x_qk: Tensor | None = None
    ) -> tuple[Tensor, MacchiatoDraft]:
        """The output (N,w,E) for w more tokens x (N,w,E); `state` is left as it is.

        `state.commit(draft, accepted)` goes on. No dropout, nothing recorded for gradients.

        Raises:
            ValueError: shapes, or causal is false.
        """
        if not self.causal:
            raise ValueError(f"{_OP} draft got causal=False, expected causal=True")
        x_qk = x if x_qk is None else x_qk
        check_input(_OP, "x", x, 3, self.embed_dim)
        check_input(_OP, "x_qk", x_qk, 3, self.embed_dim)
        self._check_state(state, x.shape[0])
        q_latent, k_latent = self._latent_logits(x_qk)
        v = _heads(self.v_proj(x), self.kv_heads)
        if state.window is None:
            assert state.latent is not None
            y, latent = latent_attention_draft(q_latent, *self._spread(k_latent, v), state.latent)
            draft = MacchiatoDraft(latent, None)
        else:
            q, k = self._window_rows(x, state.window.position, None)
            y, draft = macchiato_attention_draft(q_latent, k_latent, q, k, v, state)
        return self.out_proj(y.transpose(1, 2).flatten(2)), draft

    def _check_state(self, state: MacchiatoState, batch: int) -> None:
        """Raises TypeError or ValueError for what is not a state of `batch` sequences of this."""
        check_type("MacchiatoAttention", "state", state, MacchiatoState)
        sizes = [
            0 if state.window is None else state.window.window,
            0 if state.latent is None else state.latent.latents,
            *(part.batch for part in state if part is not None),
        ]
        expected = [self.window, self.num_latents] + [batch] * (len(sizes) - 2)
        if sizes != expected:
            raise ValueError(
                f"{_OP} state has window, latents and sequences {sizes}, expected {expected}"
            )

    def _attend(
        self,
        q_latent: Tensor,
        k_latent: Tensor,
        x: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: MacchiatoState | None,
        return_state: bool,
    ) -> tuple[Tensor, MacchiatoState | None]:
        if self.window == 0:
            k_latent, v = self._spread(k_latent, v)
            y = self.operators.latent_attention(
                q_latent,
                k_latent,
                v,
                causal=self.causal,
                key_mask=key_mask,
                cu_seqlens=cu_seqlens,
                state=None if state is None else state.latent,
                return_state=return_state,
            )
            return (y[0], MacchiatoState(y[1], None)) if return_state else (y, None)
        offset = 0 if state is None or state.window is None else state.window.position
        q, k = self._window_rows(x, offset, cu_seqlens)
        attend = partial(
            self.operators.macchiato_attention,
            q_latent,
            k_latent,
            q,
            k,
            v,
            window=self.window,
            causal=self.causal,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=state,
        )
        if return_state:
            return attend(return_state=True)  # type: ignore[no-any-return]
        return attend(), None

    def _latent_logits(self, x_qk: Tensor) -> tuple[Tensor, Tensor]:
        """(B,H,T,1+L), or (B,H,T,L) without a window, and (B,Hl,T,L)."""
        if self.num_latents == 0:
            rows = (x_qk.shape[0], self.num_heads, x_qk.shape[1], 1)
            return x_qk.new_zeros(rows), x_qk.new_zeros(*rows[:3], 0)
        return (
            _heads(self.q_latent_proj(x_qk), self.num_heads),
            _heads(self.k_latent_proj(x_qk), self.latent_heads),
        )

    def _window_rows(
        self, x: Tensor, offset: int | Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries (B,H,T,D) and keys (B,Hk,T,D); `offset` is the first token's position."""
        q, k = _heads(self.q_proj(x), self.num_heads), _heads(self.k_proj(x), self.kv_heads)
        if self.rotary_base is None:
            return q, k
        position = self.operators.positions(
            x.shape[1], offset=offset, cu_seqlens=cu_seqlens, device=x.device
        )
        rotated = rotate(torch.cat([q, k], dim=1), position, base=self.rotary_base)
        return rotated[:, : self.num_heads], rotated[:, self.num_heads :]

    def _spread(self, k_latent: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with as many heads as the state, of which each group has its own."""
        heads = math.lcm(self.latent_heads, self.kv_heads)
        if self.latent_heads != heads:
            k_latent = k_latent.repeat_interleave(heads // self.latent_heads, dim=1)
        if self.kv_heads != heads:
            v = v.repeat_interleave(heads // self.kv_heads, dim=1)
        return k_latent, v


def _heads(x: Tensor, count: int) -> Tensor:
    """(B,T,count C) as (B,count,T,C), a view: the operators take any strides."""
    rows: Tensor = x.unflatten(2, (count, -1))
    return rows.transpose(1, 2)
