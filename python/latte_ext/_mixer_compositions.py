# SPDX-License-Identifier: Apache-2.0
"""Derivatives of recurrences and convolutions by recurrences, convolutions and torch's operators.

All take O(T) time and memory, and can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _reference_mixers as reference
from . import _register


def neighbours(x: Tensor, edge: Tensor, cu_seqlens: Tensor | None, *, reverse: bool) -> Tensor:
    """x of the token before (behind, if reverse), `edge` (N,C) where a sequence begins (ends).

    Args:
        x: (B,T,C).
        cu_seqlens: (N+1,) borders of N sequences packed along T.
    """
    tokens = x.shape[1]
    if cu_seqlens is None:
        outer = edge.unsqueeze(1)
        return torch.cat([x, outer], 1)[:, 1:] if reverse else torch.cat([outer, x], 1)[:, :tokens]
    index = torch.arange(tokens, device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].to(index), index, right=True)
    border = cu_seqlens.to(index)[sequence + 1] - 1 if reverse else cu_seqlens.to(index)[sequence]
    inner = index + 1 if reverse else index - 1
    row = torch.where(index == border, tokens + sequence, inner)
    return torch.cat([x[0], edge]).index_select(0, row).unsqueeze(0)


def recur(
    a: Tensor, b: Tensor, cu_seqlens: Tensor | None, h0: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The operator `linear_recurrence`."""
    return torch.ops.latte_ext.linear_recurrence.default(  # type: ignore[no-any-return]
        a, b, cu_seqlens, h0, reverse
    )


def _or_zeros(
    h0: Tensor | None, x: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if h0 is not None:
        return h0
    return x.new_zeros((_register.count_sequences(x, cu_seqlens), x.shape[2]), dtype=dtype)


def linear_recurrence_tangents(
    primals: Sequence[Any], tangents: Sequence[Any], outputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """dh[t] = a[t] dh[t-1] + (da[t] h[t-1] + db[t]): the same recurrence."""
    a, b, cu_seqlens, h0, reverse = primals
    da, db, _, dh0, _ = tangents
    dtype = _register.compute_dtype(b)
    a = a.to(dtype)
    added = torch.zeros_like(b, dtype=dtype) if db is None else db.to(dtype)
    if da is not None:
        h = outputs[0]
        if h.dtype != dtype:
            h, _ = recur(a, b.to(dtype), cu_seqlens, h0, reverse)
        first = _or_zeros(h0, b, cu_seqlens, dtype)
        added = added + da.to(dtype) * neighbours(h, first, cu_seqlens, reverse=reverse)
    dh, d_final = recur(a, added, cu_seqlens, dh0, reverse)
    return dh.to(b.dtype), d_final


def linear_recurrence_backward(
    a: Tensor,
    b: Tensor | None,
    h: Tensor | None,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    dh: Tensor,
    d_final: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of this name: g[t] = dh[t] + a[t+1] g[t+1] is a recurrence the other way."""
    dtype = d_final.dtype
    wide = a.to(dtype)
    if h is None:
        assert b is not None
        h, _ = recur(wide, b.to(dtype), cu_seqlens, h0, reverse)
    behind = neighbours(wide, torch.ones_like(d_final), cu_seqlens, reverse=not reverse)
    db, first = recur(behind, dh.to(dtype), cu_seqlens, d_final, not reverse)
    da = db * neighbours(h, _or_zeros(h0, dh, cu_seqlens, dtype), cu_seqlens, reverse=reverse)
    if h0 is None:
        return da.to(a.dtype), db.to(dh.dtype), d_final.new_empty(0)
    return (
        da.to(a.dtype),
        db.to(dh.dtype),
        _first_factor(wide, cu_seqlens, d_final, reverse) * first,
    )


def _first_factor(a: Tensor, cu_seqlens: Tensor | None, like: Tensor, reverse: bool) -> Tensor:
    """a at the token where the recurrence begins, (N,C); 1 for a sequence without one."""
    if a.shape[1] == 0:
        return torch.ones_like(like)
    if cu_seqlens is None:
        return a[:, -1 if reverse else 0]
    index = (cu_seqlens[1:] - 1 if reverse else cu_seqlens[:-1]).clamp(0, a.shape[1] - 1)
    empty = cu_seqlens[1:] == cu_seqlens[:-1]
    return torch.where(empty.unsqueeze(1), 1, a[0].index_select(0, index))


def rg_lru(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    fresh: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The operator of this name: the reference's gates around the operator of recurrences."""
    return reference.rg_lru(
        x, gate_a, gate_x, log_lambda, h0=h0, fresh=fresh, key_mask=key_mask,
        cu_seqlens=cu_seqlens, reverse=reverse, scan=lambda a, b, h: recur(a, b, None, h, False),
    )  # fmt: skip


def rg_lru_backward(*args: Any) -> tuple[Tensor, ...]:
    """The operator of this name, in the engine's context only: it nests torch.func.vjp."""
    *inputs, _, dy, d_final, reverse = args
    wanted = [i for i, x in enumerate(inputs) if i < 4 or (i == 6 and x is not None)]

    def forward(*values: Tensor) -> tuple[Tensor, Tensor]:
        changed = dict(zip(wanted, values, strict=True))
        return rg_lru(*[changed.get(i, x) for i, x in enumerate((*inputs, reverse))])

    pull_back = torch.func.vjp(forward, *(inputs[i] for i in wanted))[1]
    gradients: tuple[Tensor, ...] = pull_back((dy, d_final))
    return gradients if len(wanted) == 5 else (*gradients, d_final.new_empty(0))


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The operator of this name, which the reference computes by K products of whole tensors."""
    y, final = reference.short_conv(
        x, weight, bias, causal=causal, state=state, cu_seqlens=cu_seqlens
    )
    return y, final if causal else final[:, :0]


def short_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    dy: Tensor,
    d_final: Tensor,
    causal: bool,
) -> tuple[Tensor, ...]:
    """The operator of this name: K products of whole tensors, as forward."""
    dtype, width = _register.compute_dtype(x), weight.shape[1]
    left = width - 1 if causal else (width - 1) // 2
    tail = torch.zeros_like(d_final) if state is None else state
    if not causal:
        tail = d_final = x.new_zeros(d_final.shape[0], left, x.shape[2])
    columns = weight.to(dtype).unbind(1)
    of_columns = []

    def transpose(dy: Tensor, x: Tensor, tail: Tensor, d_final: Tensor) -> tuple[Tensor, Tensor]:
        right = width - 1 - left
        padded = F.pad(torch.cat([tail, x], 1), (0, 0, 0, right))
        d_padded = F.pad(d_final, (0, 0, x.shape[1], right))
        for j, column in enumerate(columns):
            d_padded = d_padded + F.pad(column * dy, (0, 0, j, width - 1 - j))
            of_columns.append((dy * padded[:, j : j + x.shape[1]]).sum((0, 1)))
        return d_padded[:, left : left + x.shape[1]], d_padded[:, :left]

    wide = [t.to(dtype) for t in (dy, x, tail, d_final)]
    dx, d_tail = reference.each_sequence(
        transpose, tuple(wide[:2]), tuple(wide[2:]), cu_seqlens, False
    )
    d_weight = torch.zeros_like(weight, dtype=dtype)
    if of_columns:
        d_weight = torch.stack(of_columns).unflatten(0, (-1, width)).sum(0).T
    nothing = x.new_empty(0)
    return (
        dx.to(x.dtype), d_weight.to(weight.dtype),
        nothing if bias is None else wide[0].sum((0, 1)).to(bias.dtype),
        nothing if state is None else d_tail.to(state.dtype),
    )  # fmt: skip
