# SPDX-License-Identifier: Apache-2.0
"""Mixers in front of queries and keys: RG-LRU and short convolutions, with their decoding states.

Notation: B batch, T tokens, C channels, K convolution width, G blocks of gates, N sequences (B, or
len(cu_seqlens) - 1 when packed).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_integers, check_rank, check_shape, check_tensors, check_type
from .._drafts import Accepted, rg_lru_commit
from ..convolution import short_conv_step
from ..recurrence import rg_lru_step
from .operators import WHOLE, Operators

# log a = -8 r softplus(log_lambda), see `latte_ext.rg_lru`.
_POWER = 8


class RecurrentState(NamedTuple):
    """What RG-LRU remembers of N sequences: a fixed size, whatever their length.

    h (N,C): the last output, float32 (float64 for float64 parameters); fresh (N,) bool: no token
    yet, so that the next one is the first of its sequence.
    """

    h: Tensor
    fresh: Tensor

    def clone(self) -> RecurrentState:
        return RecurrentState(self.h.clone(), self.fresh.clone())

    def select(self, index: Tensor) -> RecurrentState:
        """The sequences at `index`, in new memory: for beam search and for batches that shrink."""
        return RecurrentState(self.h[index], self.fresh[index])

    @property
    def nbytes(self) -> int:
        return self.h.nbytes + self.fresh.nbytes

    @torch.no_grad()
    def commit(self, draft: RecurrentDraft, accepted: Accepted) -> None:
        """The first accepted (N,) tokens of a draft of `RGLRU.draft` enter the state, in place."""
        check_type("RecurrentState.commit", "draft", draft, RecurrentDraft)
        rg_lru_commit(self.h, *draft, accepted, fresh=self.fresh)
        self.fresh.logical_and_(torch.as_tensor(accepted, device=self.fresh.device) == 0)


class RecurrentDraft(NamedTuple):
    """The inputs of `rg_lru` for w tokens: x and its gates (N,w,C), log_lambda (C,)."""

    x: Tensor
    gate_a: Tensor
    gate_x: Tensor
    log_lambda: Tensor


class ConvDraft(NamedTuple):
    """The inputs (N,w,C) of `short_conv` for w tokens of N sequences."""

    x: Tensor


class RGLRU(nn.Module):
    """The real-gated linear recurrent unit of Griffin (arXiv 2402.19427, section 2.4).

    gate_a and gate_x are block-diagonal linear maps of x, h = `latte_ext.rg_lru`. Without
    `causal`, the sum of one unit over the tokens in order and another one in reverse.

    Args:
        channels: C.
        num_blocks: G, a divisor of C: each block of C/G channels has gates of its own.
        causal: whether token t sees the tokens s <= t only.
        min_decay: a at fully open gates (r = 1) is drawn between this and max_decay, its square
            uniformly.
        max_decay: the other end.

    Raises:
        ValueError: sizes that are not positive or do not divide, decays outside of (0, 1).
    """

    operators: Operators = WHOLE

    def __init__(
        self,
        channels: int,
        num_blocks: int = 1,
        *,
        causal: bool = True,
        min_decay: float = 0.9,
        max_decay: float = 0.999,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integers("RGLRU", channels=channels, num_blocks=num_blocks)
        if channels < 1 or num_blocks < 1 or channels % num_blocks:
            raise ValueError(
                f"[RGLRU] channels is {channels} with num_blocks = {num_blocks}, expected a "
                "positive multiple of it"
            )
        if not 0 < min_decay <= max_decay < 1:
            raise ValueError(
                f"[RGLRU] min_decay, max_decay are {min_decay}, {max_decay}, expected "
                "0 < min_decay <= max_decay < 1"
            )
        self.channels, self.num_blocks, self.causal = channels, num_blocks, causal
        self.min_decay, self.max_decay = min_decay, max_decay
        directions, width = 1 if causal else 2, channels // num_blocks

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(directions, *shape, device=device, dtype=dtype))

        # Of gate_a and gate_x, in this order.
        self.gate_weight = parameter(2, num_blocks, width, width)
        self.gate_bias = parameter(2, channels)
        self.log_lambda = parameter(channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance G/C, zero biases, decays between the bounds."""
        nn.init.normal_(self.gate_weight, std=math.sqrt(self.num_blocks / self.channels))
        nn.init.zeros_(self.gate_bias)
        with torch.no_grad():
            low, high = self.min_decay**2, self.max_decay**2
            square = torch.empty(self.log_lambda.shape, dtype=torch.float64).uniform_(low, high)
            softplus = -0.5 * square.log() / _POWER
            self.log_lambda.copy_(softplus.expm1().log())

    def extra_repr(self) -> str:
        return f"channels={self.channels}, num_blocks={self.num_blocks}, causal={self.causal}"

    def empty_state(self, batch: int) -> RecurrentState:
        """The state of `batch` sequences without tokens, on the parameters' device."""
        dtype = torch.promote_types(self.log_lambda.dtype, torch.float32)
        device = self.log_lambda.device
        return RecurrentState(
            torch.zeros(batch, self.channels, device=device, dtype=dtype),
            torch.ones(batch, device=device, dtype=torch.bool),
        )

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: RecurrentState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, RecurrentState]:
        """The recurrence (B,T,C) over x (B,T,C), and the state after it if `return_state`.

        Args:
            x: the sequences, or N of them packed along T with B == 1.
            key_mask: (B,T) bool, true for a real token; the others are absent.
            cu_seqlens: (N+1,) borders of the packed sequences.
            state: of the tokens before these, N sequences (causal only); left as it is.
            return_state: also return the state after the last token (causal only).

        Raises:
            ValueError: shapes or combinations; see `latte_ext.rg_lru` for the rest.
        """
        self._check(x, 3)
        if state is not None:
            check_type("RGLRU", "state", state, RecurrentState)
        if not self.causal and (state is not None or return_state):
            raise ValueError("[RGLRU] got a state with causal=False, expected causal=True")
        h0, fresh = (None, None) if state is None else state
        gate_a, gate_x = self._gates(x, 0)
        y = self.operators.rg_lru(
            x, gate_a, gate_x, self.log_lambda[0], h0=h0, fresh=fresh, key_mask=key_mask,
            cu_seqlens=cu_seqlens, return_state=return_state,
        )  # fmt: skip
        if return_state:
            y, final = y
        if not self.causal:
            gate_a, gate_x = self._gates(x, 1)
            y = y + self.operators.rg_lru(
                x, gate_a, gate_x, self.log_lambda[1], key_mask=key_mask, cu_seqlens=cu_seqlens,
                reverse=True,
            )  # fmt: skip
        if not return_state:
            return y  # type: ignore[no-any-return]
        started = self._any_token(x, key_mask, cu_seqlens)
        return y, RecurrentState(final, ~started if fresh is None else fresh & ~started)

    @torch.no_grad()
    def step(self, x: Tensor, state: RecurrentState) -> Tensor:
        """The output (N,C) for one more token x (N,C) per sequence; `state` is updated in place.

        Raises:
            ValueError: shapes, or causal is false.
        """
        if not self.causal:
            raise ValueError("[RGLRU] step got causal=False, expected causal=True")
        self._check(x, 2)
        check_type("RGLRU", "state", state, RecurrentState)
        gate_a, gate_x = (gate.squeeze(1) for gate in self._gates(x.unsqueeze(1), 0))
        y = rg_lru_step(x, gate_a, gate_x, self.log_lambda[0], state.h, fresh=state.fresh)
        state.fresh.zero_()
        return y

    @torch.no_grad()
    def draft(self, x: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentDraft]:
        """The output (N,w,C) for w more tokens x (N,w,C); `state` is left as it is.

        Raises:
            ValueError: shapes, or causal is false.
        """
        if not self.causal:
            raise ValueError("[RGLRU] draft got causal=False, expected causal=True")
        self._check(x, 3)
        check_type("RGLRU", "state", state, RecurrentState)
        draft = RecurrentDraft(x, *self._gates(x, 0), self.log_lambda[0])
        return self.operators.rg_lru(*draft, h0=state.h, fresh=state.fresh), draft

    def _check(self, x: Tensor, rank: int) -> None:
        check_type("RGLRU", "x", x, Tensor)
        if x.dim() != rank or x.shape[-1] != self.channels:
            axes = "(B, T, C)" if rank == 3 else "(N, C)"
            raise ValueError(
                f"[RGLRU] x has shape {tuple(x.shape)}, expected {axes} with C = {self.channels}"
            )

    def _gates(self, x: Tensor, direction: int) -> tuple[Tensor, Tensor]:
        blocks = x.unflatten(2, (self.num_blocks, -1))
        weight, bias = self.gate_weight[direction], self.gate_bias[direction]
        gate_a, gate_x = (
            torch.einsum("btgi,gij->btgj", blocks, w).flatten(2) + b
            for w, b in zip(weight.unbind(), bias.unbind(), strict=True)
        )
        return gate_a, gate_x

    @staticmethod
    def _any_token(x: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Whether each of the N sequences has a real token."""
        if cu_seqlens is None:
            if key_mask is not None:
                return key_mask.any(1)
            return torch.full((x.shape[0],), x.shape[1] > 0, device=x.device)
        if key_mask is None:
            return cu_seqlens.diff().to(x.device) > 0
        counts = torch.nn.functional.pad(key_mask[0].cumsum(0), (1, 0))
        return counts[cu_seqlens.to(x.device).long()].diff() > 0


class ShortConv(nn.Module):
    """Depthwise convolution over K tokens, `latte_ext.short_conv`: weight (C,K), bias (C,).

    Args:
        channels: C.
        width: K, from 1 to 8.
        causal: whether token t sees the tokens t-K+1..t, or K tokens around it.
        bias: add a bias.

    Raises:
        ValueError: sizes out of range.
    """

    operators: Operators = WHOLE

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
        check_integers("ShortConv", channels=channels, width=width)
        if channels < 1 or not 1 <= width <= 8:
            raise ValueError(
                f"[ShortConv] channels is {channels} and width is {width}, expected at least 1 "
                "and 1 to 8"
            )
        self.channels, self.width, self.causal = channels, width, causal
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype))
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights within 1 / sqrt(K), zero bias."""
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, width={self.width}, causal={self.causal}"

    def empty_state(self, batch: int, *, dtype: torch.dtype | None = None) -> Tensor:
        """The inputs (N,K-1,C) before `batch` sequences without tokens: zeros.

        dtype is that of the inputs to come; None: that of the parameters.
        """
        return self.weight.new_zeros(batch, self.width - 1, self.channels, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The convolution (B,T,C) of x (B,T,C), and the state after it if `return_state`.

        Args:
            x: the sequences, or N of them packed along T with B == 1.
            key_mask: (B,T) bool, true for a real token; the others count as zeros. They are as good
                as absent on the right of a sequence, and on the left without a state.
            cu_seqlens: (N+1,) borders of the packed sequences.
            state: (N,K-1,C) in x's dtype, the inputs before these (causal only); left as it is.
            return_state: also return the last K-1 real inputs (causal only).

        Raises:
            ValueError: shapes or combinations; see `latte_ext.short_conv` for the rest.
        """
        if return_state and key_mask is not None and cu_seqlens is not None:
            raise ValueError(
                "[ShortConv] got return_state with key_mask and cu_seqlens, expected one of the two"
            )
        if key_mask is not None:
            # Within a context-parallel model as well: the operator decides that.
            check_tensors("ShortConv", {"x": x}, key_mask=key_mask, pointwise=True)
            check_rank("ShortConv", 3, x=x)
            check_shape("ShortConv", "key_mask", key_mask, *x.shape[:2])
            x = torch.where(key_mask.unsqueeze(2), x, 0)
        result = self.operators.short_conv(
            x, self.weight, self.bias, causal=self.causal, state=state, cu_seqlens=cu_seqlens,
            return_state=return_state,
        )  # fmt: skip
        if not return_state or key_mask is None:
            return result  # type: ignore[no-any-return]
        before = self.empty_state(x.shape[0], dtype=x.dtype) if state is None else state
        return result[0], _last_real(before, x, key_mask)

    @torch.no_grad()
    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """The output (N,C) for one more token x (N,C) per sequence; `state` is updated in place.

        Raises:
            ValueError: shapes, or causal is false.
        """
        if not self.causal:
            raise ValueError("[ShortConv] step got causal=False, expected causal=True")
        return short_conv_step(x, self.weight, self.bias, state)

    @torch.no_grad()
    def draft(self, x: Tensor, state: Tensor) -> tuple[Tensor, ConvDraft]:
        """The output (N,w,C) for w more tokens x (N,w,C); `state` is left as it is.

        `latte_ext.short_conv_commit(state, draft.x, accepted)` goes on.

        Raises:
            ValueError: shapes, or causal is false.
        """
        if not self.causal:
            raise ValueError("[ShortConv] draft got causal=False, expected causal=True")
        y = self.operators.short_conv(x, self.weight, self.bias, state=state)
        return y, ConvDraft(x)


def _last_real(before: Tensor, x: Tensor, key_mask: Tensor) -> Tensor:
    """The last R rows that count of before (N,R,C), all, and x (N,T,C), those of the mask."""
    count = before.shape[1]
    rows = torch.cat([before, x], 1)
    counts = torch.cat([key_mask.new_ones(before.shape[:2]), key_mask], 1)
    order = torch.where(counts, torch.arange(rows.shape[1], device=x.device), -1)
    index = order.topk(count, 1).values.flip(1)
    return rows.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))
