# SPDX-License-Identifier: Apache-2.0
"""What may stand in front of the latents' queries and keys: a short convolution, an RG-LRU.

Notation: B batch, T tokens, C channels, K width, N sequences (B, or len(cu_seqlens) - 1 when
packed).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._reference_mixers import RG_LRU_POWER
from ..convolution import short_conv, short_conv_step
from ..recurrence import rg_lru, rg_lru_step
from .attention import lecun_normal_

# What a mixer remembers of N sequences, tensors (N,...): none if it remembers nothing.
MixerState = tuple[Tensor, ...]


class ShortConv(nn.Module):
    """Depthwise convolution over K tokens, `latte_ext.short_conv` (-Conv of arXiv 2402.17512).

    Args:
        channels: C.
        width: K, 1 to 8. (4, as the bias, is this library's choice.)
        causal: whether token t sees the K tokens up to itself, or K around it.
        bias: whether a learned value per channel is added.
    """

    def __init__(
        self,
        channels: int,
        width: int = 4,
        *,
        causal: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or not 1 <= width <= 8:
            raise ValueError(
                f"[ShortConv] channels is {channels} and width {width}, "
                "expected positive channels and a width from 1 to 8"
            )
        self.causal = causal
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights of variance 1 / (3 K), as torch's convolutions; no bias yet."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def empty_state(self, batch: int) -> MixerState:
        """The last inputs (N,K-1,C), of sequences without tokens."""
        channels, width = self.weight.shape
        return (self.weight.new_zeros(batch, width - 1, channels),)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """The convolution (B,T,C) of x (B,T,C), and the state after it if `return_state`.

        Args:
            key_mask: (B,T) bool, true for a real token; the others count as zero, but keep their
                place.
            cu_seqlens: (N+1,) borders of N sequences packed along T.
            state: the tokens before these (causal only).
            return_state: also return the state after the last token (causal only).
        """
        if key_mask is not None:
            x = torch.where(key_mask.unsqueeze(2), x, 0)
        tail = None if state is None else state[0].to(x.dtype)
        if not return_state:
            return short_conv(
                x, self.weight, self.bias, causal=self.causal, state=tail, cu_seqlens=cu_seqlens
            )
        y, tail = short_conv(
            x,
            self.weight,
            self.bias,
            causal=self.causal,
            state=tail,
            cu_seqlens=cu_seqlens,
            return_state=True,
        )
        return y, (tail,)

    @torch.no_grad()
    def step(self, x: Tensor, state: MixerState) -> Tensor:
        """One token (N,C) per sequence; `state` is updated in place."""
        return short_conv_step(x, self.weight, self.bias, state[0])


class RGLRU(nn.Module):
    """Real-gated linear recurrent unit, `latte_ext.rg_lru` (-RGLRU of arXiv 2402.17512).

    Gates are block-diagonal linear maps of x, decays start between 0.9 and 0.999 (Griffin, arXiv
    2402.19427, section 2.4). Not causal, it is the sum of a forward and a backward recurrence with
    parameters of their own (this library's choice).

    Args:
        channels: C.
        blocks: number of blocks of the gates, a divisor of C.
        causal: whether there is a forward recurrence only.
    """

    def __init__(
        self,
        channels: int,
        blocks: int,
        *,
        causal: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(channels, blocks) < 1 or channels % blocks:
            raise ValueError(
                f"[RGLRU] channels is {channels} and blocks {blocks}, "
                "expected positive numbers, channels a multiple of blocks"
            )
        self.causal = causal
        directions, width = (1 if causal else 2), channels // blocks

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(directions, *shape, device=device, dtype=dtype))

        # Both gates of a block side by side: one batched product.
        self.gate_weight = parameter(blocks, width, 2 * width)
        self.gate_bias = parameter(blocks, 2 * width)
        self.log_lambda = parameter(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates of variance 1 without bias; decays at r = 1 uniform in [0.9, 0.999]."""
        with torch.no_grad():
            for weight in self.gate_weight.flatten(0, 1):
                lecun_normal_(weight.T)
            self.gate_bias.zero_()
            decay = torch.empty_like(self.log_lambda, dtype=torch.float32).uniform_(0.9, 0.999)
            self.log_lambda.copy_((-decay.log() / RG_LRU_POWER).expm1().log())

    def empty_state(self, batch: int) -> MixerState:
        """h (N,C) of sequences without tokens, and that they have none (N,)."""
        weight = self.log_lambda
        dtype = torch.promote_types(weight.dtype, torch.float32)
        fresh = torch.ones(batch, dtype=torch.bool, device=weight.device)
        return weight.new_zeros(batch, weight.shape[1], dtype=dtype), fresh

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: MixerState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MixerState]:
        """The recurrence's h (B,T,C) for x (B,T,C), and the state after it if `return_state`.

        Args:
            key_mask: (B,T) bool, true for a real token; the others are absent.
            cu_seqlens: (N+1,) borders of N sequences packed along T.
            state: the tokens before these (causal only).
            return_state: also return the state after the last token (causal only).

        Raises:
            ValueError: state or return_state where not causal; and as `latte_ext.rg_lru`.
        """
        if not self.causal:
            if state is not None or return_state:
                raise ValueError("[RGLRU] got a state with causal=False, expected causal=True")
            ahead, back = (
                rg_lru(
                    x,
                    *self._gates(x, direction),
                    self.log_lambda[direction],
                    key_mask=key_mask,
                    cu_seqlens=cu_seqlens,
                    reverse=direction == 1,
                )
                for direction in range(2)
            )
            return ahead + back
        h0, fresh = (None, None) if state is None else state
        h, final = rg_lru(
            x,
            *self._gates(x, 0),
            self.log_lambda[0],
            h0=h0,
            fresh=fresh,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            return_state=True,
        )
        if not return_state:
            return h
        empty = _absent(x, key_mask, cu_seqlens)
        return h, (final, empty if fresh is None else empty & fresh)

    @torch.no_grad()
    def step(self, x: Tensor, state: MixerState) -> Tensor:
        """One token (N,C) per sequence; `state` is updated in place."""
        h, fresh = state
        y = rg_lru_step(x, *self._gates(x, 0), self.log_lambda[0], h, fresh=fresh)
        fresh.zero_()
        return y

    def _gates(self, x: Tensor, direction: int) -> tuple[Tensor, Tensor]:
        """Both gates (...,C) of x (...,C), before the sigmoid."""
        weight, bias = self.gate_weight[direction], self.gate_bias[direction]
        rows = x.reshape(-1, *weight.shape[:2]).transpose(0, 1)
        gates = torch.baddbmm(bias.unsqueeze(1), rows, weight).transpose(0, 1)
        gate_a, gate_x = (gate.reshape(x.shape) for gate in gates.chunk(2, dim=2))
        return gate_a, gate_x


def _absent(x: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Whether each of the N sequences has no real token (N,)."""
    if cu_seqlens is None:
        if key_mask is None:
            return x.new_full((x.shape[0],), x.shape[1] == 0, dtype=torch.bool)
        return ~key_mask.any(dim=1)
    if key_mask is None:
        return cu_seqlens.diff() == 0
    before = F.pad(key_mask[0].cumsum(0), (1, 0))[cu_seqlens.long()]
    return before.diff() == 0
