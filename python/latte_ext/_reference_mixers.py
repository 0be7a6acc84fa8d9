# SPDX-License-Identifier: Apache-2.0
"""Linear recurrences and short convolutions in plain torch: part of `latte_ext.reference`.

Any device, float32 or float64, differentiable to any order, no tuning. Arguments are taken as
valid; `latte_ext.linear_recurrence`, `rg_lru` and `short_conv` check.

Notation: B batch, T tokens, C channels, K convolution width, N sequences (B, or
len(cu_seqlens) - 1 when packed). Arithmetic is float64 if an input is, else float32; a state has
that type.
"""

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

# log a = -RG_LRU_POWER r softplus(log_lambda), and the largest derivative of the square root (the
# constants of the public Griffin code).
RG_LRU_POWER = 8.0
MAX_SQRT_GRADIENT = 1000.0

Scan = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    h0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """h[t] = a[t] h[t-1] + b[t], channel by channel.

    Args:
        a: (B,T,C).
        b: (B,T,C).
        h0: (N,C), h before the first token; None: zero.
        cu_seqlens: (N+1,) integer borders of N sequences packed along T, with B == 1.
        reverse: from the last token to the first, h[t] = a[t] h[t+1] + b[t].

    Returns:
        h (B,T,C) in the dtype of b, and the last h of each sequence (N,C).
    """
    dtype = _compute_dtype(a, b, h0)
    h, final = each_sequence(
        _scan,
        (a.to(dtype), b.to(dtype)),
        (_initial(b, dtype, h0, cu_seqlens),),
        cu_seqlens,
        reverse,
    )
    return h.to(b.dtype), final


def rg_lru(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    *,
    h0: Tensor | None = None,
    fresh: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    scan: Scan | None = None,
) -> tuple[Tensor, Tensor]:
    """The real-gated linear recurrent unit of Griffin (arXiv 2402.19427, section 2.4).

        r, i  = sigmoid(gate_a), sigmoid(gate_x)
        log a = -8 r softplus(log_lambda)              a = (1 + lambda)^(-8 r)
        h[t]  = a[t] h[t-1] + sqrt(1 - a[t]^2) i[t] x[t]

    The square root is 1 at the first token of a sequence, and its derivative is at most 1000.

    Args:
        x: (B,T,C).
        gate_a: (B,T,C), before the sigmoid.
        gate_x: (B,T,C), before the sigmoid.
        log_lambda: (C,).
        h0: (N,C), the state of sequences that go on; None: every sequence starts here.
        fresh: (N,) bool with h0, true = h0 holds no token yet: the sequence starts here.
        key_mask: (B,T) bool, false = the token is absent and h stays as it is.
        cu_seqlens: (N+1,) integer borders of N sequences packed along T, with B == 1.
        reverse: from the last token to the first.
        scan: computes (h, last h) of h[t] = a[t] h[t-1] + b[t] from (a, b, h0); None: token by
            token.

    Returns:
        h (B,T,C) in the dtype of x, and the last h of each sequence (N,C).
    """
    dtype = _compute_dtype(x, gate_a, gate_x, log_lambda, h0)
    carry = _initial(x, dtype, h0, cu_seqlens)
    if fresh is None:
        fresh = torch.full((carry.shape[0],), h0 is None, device=x.device)
    mask = x.new_ones(x.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
    decay = RG_LRU_POWER * F.softplus(log_lambda.to(dtype))

    def gated(
        x: Tensor, gate_a: Tensor, gate_x: Tensor, mask: Tensor, h0: Tensor, fresh: Tensor
    ) -> tuple[Tensor, Tensor]:
        log_a = -torch.sigmoid(gate_a) * decay
        multiplier = _bounded_sqrt(-torch.expm1(2 * log_a))
        first = fresh[:, None] & mask & (mask.cumsum(1) == 1)
        multiplier = torch.where(first[..., None], 1, multiplier)
        b = multiplier * torch.sigmoid(gate_x) * x
        present = mask[..., None]
        a = torch.where(present, log_a.exp(), 1)
        return (scan or _scan)(a, torch.where(present, b, 0), h0)

    inputs = (x.to(dtype), gate_a.to(dtype), gate_x.to(dtype), mask)
    h, final = each_sequence(gated, inputs, (carry, fresh), cu_seqlens, reverse)
    return h.to(x.dtype), final


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = True,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y[t] = bias + sum over j < K of weight[:, j] x[t - left + j], channel by channel.

    left = K - 1 if causal, else (K - 1) // 2. Inputs outside of the sequence count as zero.

    Args:
        x: (B,T,C).
        weight: (C,K).
        bias: (C,).
        causal: a token sees itself and the K - 1 before it; False: K tokens around it.
        state: (N,K-1,C), the inputs before the first token, oldest first (causal only).
        cu_seqlens: (N+1,) integer borders of N sequences packed along T, with B == 1.

    Returns:
        y (B,T,C) and the last K - 1 inputs of each sequence (N,K-1,C), in the dtype of x.
    """
    dtype = _compute_dtype(x, weight, bias, state)
    width = weight.shape[1]
    left = width - 1 if causal else (width - 1) // 2
    if state is None:
        sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        state = x.new_zeros(sequences, width - 1, x.shape[2])

    def convolve(x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        before = tail if causal else x.new_zeros(x.shape[0], left, x.shape[2])
        padded = F.pad(torch.cat([before, x], 1), (0, 0, 0, width - 1 - left))
        y = x.new_zeros(x.shape) if bias is None else bias.to(dtype).expand_as(x)
        for j, row in enumerate(weight.to(dtype).unbind(1)):
            y = y + row * padded[:, j : j + x.shape[1]]
        return y, torch.cat([tail, x], 1)[:, x.shape[1] :]

    y, final = each_sequence(convolve, (x.to(dtype),), (state.to(dtype),), cu_seqlens, False)
    return y.to(x.dtype), final.to(x.dtype)


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    present = [tensor.dtype for tensor in tensors if tensor is not None]
    return reduce(torch.promote_types, present, torch.float32)


def _initial(x: Tensor, dtype: torch.dtype, h0: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    if h0 is not None:
        return h0.to(dtype)
    sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return x.new_zeros(sequences, x.shape[2], dtype=dtype)


def _scan(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    rows = [b[:, :0]]
    # unbind, because T slices would each have a gradient of the size of their T tokens.
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        rows.append(h.unsqueeze(1))
    return torch.cat(rows, 1), h


def _bounded_sqrt(x: Tensor) -> Tensor:
    """sqrt(x) with a derivative of at most MAX_SQRT_GRADIENT."""
    steep = 4 * x * MAX_SQRT_GRADIENT**2 < 1
    line = x.detach().sqrt() + MAX_SQRT_GRADIENT * (x - x.detach())
    return torch.where(steep, line, torch.where(steep, 1, x).sqrt())


def each_sequence(
    function: Callable[..., tuple[Tensor, Tensor]],
    tokens: tuple[Tensor, ...],
    carried: tuple[Tensor, ...],
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """`function` on tensors (B,T,...) and (N,...), for packed sequences one by one."""
    if reverse:
        forward = function

        def function(*args: Tensor) -> tuple[Tensor, Tensor]:
            flipped = (x.flip(1) for x in args[: len(tokens)])
            y, final = forward(*flipped, *args[len(tokens) :])
            return y.flip(1), final

    if cu_seqlens is None:
        return function(*tokens, *carried)
    lengths = cu_seqlens.diff().tolist()
    rows, finals = [tokens[0][:, :0]], [carried[0][:0]]
    pieces = zip(*(x.split_with_sizes(lengths, 1) for x in tokens), strict=True)
    for n, piece in enumerate(pieces):
        y, final = function(*piece, *(x[n : n + 1] for x in carried))
        rows.append(y)
        finals.append(final)
    return torch.cat(rows, 1), torch.cat(finals)
