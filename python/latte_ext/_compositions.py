# SPDX-License-Identifier: Apache-2.0
"""Latent attention and its gradient by torch's own operators: what higher derivatives come from.

Exact for any logits, in O(T) time and memory. In chunks of C tokens, with m[t,l] the running
maximum of the keys (a constant: nothing depends on it), E[t,s,l] = exp(k[s,l] - m[t,l]) for s <= t,
W = p / Z and the state S = (N, Z), the sums of e v and of e, as it is at the chunk's start::

    y[t] = sum_s (sum_l W[t,l] E[t,s,l]) v[s] + sum_l W[t,l] exp(m_in[l] - m[t,l]) N_in[l]

Every exponent is <= 0. From chunk to chunk S is a `linear_recurrence`, which has derivatives of its
own. Per token and head that is C L exponentials, C (L + D) + 4 L D operations and, kept for the
derivative, some C L + L D / C values.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._mixer_compositions import neighbours, recur
from .reference import finite, prepare

# C L + L D / C is least at C = sqrt(D), flat around it.
CHUNK = 16


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """The operator of this name: y, and the state after the last token."""
    if not causal:
        y, final = reference.latent_attention(
            q, k, v, causal=False, scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens
        )
        return y, *final
    with reference.autocast_disabled(q.device):
        walk = _Walk(q, k, v, key_mask, cu_seqlens, max, norm, mean, scale)
        inside = torch.einsum("bhgctl,bhctsl->bhgcts", walk.weights, walk.pairs)
        y = torch.einsum("bhgcts,bhcsd->bhgctd", inside, walk.values[..., :-1])
        y = y + torch.einsum(
            "bhgctl,bhctl,bhcld->bhgctd", walk.weights, walk.decay, walk.start[..., :-1]
        )
        total = walk.final[..., -1]
        average = walk.final[..., :-1] / _nonzero(total).unsqueeze(-1)
        return walk.rows(y).to(v.dtype), walk.final_max, total, average


def latent_attention_backward(*args: Any) -> tuple[Tensor, ...]:
    """The operator of this name: the gradients of q, k, v, norm and mean."""
    q, k, v, key_mask, cu_seqlens, max, norm, mean, *cotangents, causal, scale = args
    dy, d_final_norm, d_final_mean = cotangents
    with reference.autocast_disabled(q.device):
        if causal:
            walk = _Walk(q, k, v, key_mask, cu_seqlens, max, norm, mean, scale)
            dp, dk, dv, d_state = _causal(walk, dy, d_final_norm, d_final_mean)
        else:
            p, keys, values = prepare(q, k, v, scale, key_mask)
            lengths = [k.shape[2]] if cu_seqlens is None else cu_seqlens.diff().tolist()
            dp, dk, dv = _bidirectional(
                p, keys, values, dy.to(p.dtype), d_final_norm, d_final_mean, lengths
            )
        p, _, _ = prepare(q, k, v, scale, None)
        dq = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        dk = scale * dk
        d_norm = d_mean = q.new_empty(0)
        if norm is not None and mean is not None:
            d_norm = (d_state[..., :-1] * mean).sum(-1) + d_state[..., -1]
            d_mean = norm.unsqueeze(-1) * d_state[..., :-1]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_norm, d_mean


class _Walk:
    """What a causal pass knows, by chunks: B batch, h heads of k, g queries per head, c chunks."""

    pairs: Tensor  # E (B,h,c,t,s,L)
    decay: Tensor  # exp(m_in - m) (B,h,c,t,L)
    total: Tensor  # Z (B,h,c,t,L), not zero
    weights: Tensor  # W (B,h,g,c,t,L)
    values: Tensor  # v and a one (B,h,c,s,D+1)
    last: Tensor  # exp(k - m_out) (B,h,c,s,L)
    across: Tensor  # exp(m_in - m_out) (B,h,c,L)
    start: Tensor  # S before each chunk (B,h,c,L,D+1)
    final: Tensor  # S after the last (N,h,L,D+1)
    final_max: Tensor  # (N,h,L)

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        max: Tensor | None,
        norm: Tensor | None,
        mean: Tensor | None,
        scale: float,
    ) -> None:
        p, k, v = prepare(q, k, v, scale, key_mask)
        sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if max is None or norm is None or mean is None:
            max, norm, mean = reference.empty_state(
                sequences, k.shape[1], k.shape[3], v.shape[3], device=k.device, dtype=k.dtype
            )
        self.layout = _Layout(k.shape[2], cu_seqlens, k.device)
        self.group = q.shape[1] // k.shape[1]
        keys = self.layout.chunks(k, -torch.inf)
        self.values = F.pad(self.layout.chunks(v, 0), (0, 1), value=1)
        m, m_in, m_out, self.final_max = _frames(keys.detach(), max.detach(), self.layout)
        earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=k.device).tril()[..., None]
        difference = keys.unsqueeze(3) - m.unsqueeze(4)
        self.pairs = torch.where(earlier, difference, -torch.inf).exp()
        self.decay = (m_in.unsqueeze(3) - m).exp()
        self.across = (m_in - m_out).exp()
        self.last = (keys - m_out.unsqueeze(3)).exp()
        initial = norm.unsqueeze(-1) * F.pad(mean, (0, 1), value=1)
        added = torch.einsum("bhcsl,bhcsd->bhcld", self.last, self.values)
        states, self.final = self.recur(added, initial, reverse=False)
        self.start = self.neighbour(states, initial, reverse=False)
        total = self.pairs.sum(4) + self.decay * self.start[..., -1].unsqueeze(3)
        self.total = _nonzero(total)
        self.weights = self.by_chunk(p) / self.total.unsqueeze(2)

    def by_chunk(self, x: Tensor) -> Tensor:
        """Rows of queries (B,H,T,.) as (B,h,g,c,t,.)."""
        rows: Tensor = self.layout.chunks(x, 0).unflatten(1, (-1, self.group))
        return rows

    def rows(self, x: Tensor) -> Tensor:
        """(B,h,g,c,t,.) as (B,H,T,.)."""
        return self.layout.tokens(x.flatten(1, 2))

    def recur(self, added: Tensor, edge: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """x[c] = across[c] x[c-1] + added[c] of states, and the last of each sequence."""
        across = self.across.unsqueeze(-1).expand(added.shape)
        states, last = recur(
            _flat(across), _flat(added), self.layout.borders, edge.flatten(1), reverse
        )
        return _unflat(states, added.shape), last.reshape(edge.shape)

    def neighbour(self, states: Tensor, edge: Tensor, *, reverse: bool) -> Tensor:
        """The state of the chunk before (behind, if reverse); `edge` at a sequence's border."""
        found = neighbours(_flat(states), edge.flatten(1), self.layout.borders, reverse=reverse)
        return _unflat(found, states.shape)


@dataclasses.dataclass
class _Layout:
    """Tokens (.,.,T,.) in chunks of their own sequence (.,.,c,C,.), the rest filled."""

    source: Tensor  # (c C,) a token, T where there is none
    position: Tensor  # (T,) where it is
    counts: list[int]  # chunks per sequence, of the whole batch where nothing is packed
    borders: Tensor | None  # cu_seqlens of chunks

    def __init__(self, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> None:
        lengths = [tokens] if cu_seqlens is None else cu_seqlens.diff().tolist()
        self.counts = [-(-length // CHUNK) for length in lengths]
        start = [CHUNK * sum(self.counts[:n]) for n in range(len(lengths))]
        ranges = [torch.arange(s, s + n) for s, n in zip(start, lengths, strict=True)]
        self.position = torch.cat([torch.arange(0), *ranges]).to(device)
        self.source = torch.full((CHUNK * sum(self.counts),), tokens, device=device)
        self.source[self.position] = torch.arange(tokens, device=device)
        self.borders = None
        if cu_seqlens is not None:
            self.borders = torch.tensor([0, *self.counts], device=device).cumsum(0)

    def chunks(self, x: Tensor, fill: float) -> Tensor:
        rows = F.pad(x, (0, 0, 0, 1), value=fill).index_select(2, self.source)
        return rows.reshape(*x.shape[:2], sum(self.counts), CHUNK, x.shape[3])

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2, 3).index_select(2, self.position)


def _causal(
    walk: _Walk, dy: Tensor, d_norm: Tensor, d_mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of p, of scaled keys, of values and of the initial S.

    U and R are the adjoints of S at a token and behind a chunk; as S they have D + 1 columns.
    """
    dy = walk.by_chunk(dy.to(walk.values.dtype))
    values = walk.values[..., :-1]
    products = torch.einsum("bhgctd,bhcsd->bhgcts", dy, values)
    inside = torch.einsum("bhgcts,bhctsl->bhgctl", products, walk.pairs)
    carried = torch.einsum("bhgctd,bhcld->bhgctl", dy, walk.start[..., :-1])
    d_weights = inside + walk.decay.unsqueeze(2) * carried
    d_total = -(walk.weights * d_weights).sum(2) / walk.total

    # (B,h,c,t,s,L), the adjoint of a pair's e.
    d_pairs = torch.einsum("bhgctl,bhgcts->bhctsl", walk.weights, products) + d_total.unsqueeze(4)
    dk = (walk.pairs * d_pairs).sum(3)
    inside = torch.einsum("bhgctl,bhctsl->bhgcts", walk.weights, walk.pairs)
    dv = torch.einsum("bhgcts,bhgctd->bhcsd", inside, dy)

    d_start = torch.cat(
        [
            torch.einsum("bhctl,bhgctl,bhgctd->bhcld", walk.decay, walk.weights, dy),
            torch.einsum("bhctl,bhctl->bhcl", walk.decay, d_total).unsqueeze(-1),
        ],
        dim=-1,
    )
    total = _nonzero(walk.final[..., -1:])
    share = d_mean / total
    of_total = d_norm.unsqueeze(-1) - (share * walk.final[..., :-1]).sum(-1, True) / total
    edge = torch.cat([share, of_total], dim=-1)
    adjoints, d_initial = walk.recur(d_start, edge, reverse=True)
    behind = walk.neighbour(adjoints, edge, reverse=True)

    dv = dv + torch.einsum("bhcsl,bhcld->bhcsd", walk.last, behind[..., :-1])
    dk = dk + walk.last * torch.einsum("bhcld,bhcsd->bhcsl", behind, walk.values)
    dp = d_weights / walk.total.unsqueeze(2)
    return walk.rows(dp), walk.layout.tokens(dk), walk.layout.tokens(dv), d_initial


def _bidirectional(
    p: Tensor,
    k: Tensor,
    v: Tensor,
    dy: Tensor,
    d_norm: Tensor,
    d_mean: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of p, of scaled keys and of values; each sequence has one mean.

    Args:
        lengths: of packed sequences; of one, that is the whole batch.
    """
    group, rows = p.shape[1] // k.shape[1], []
    pieces = (x.split_with_sizes(lengths, 2) for x in (p, k, v, dy))
    of_final = (x.split(x.shape[0] if len(lengths) == 1 else 1) for x in (d_norm, d_mean))
    for p_n, k_n, v_n, dy_n, d_norm_n, d_mean_n in zip(*pieces, *of_final, strict=True):
        if k_n.shape[2] == 0:
            continue
        exponential = (k_n - finite(k_n.detach().amax(2, True))).exp()
        share = exponential / _nonzero(exponential.sum(2, True))
        mean = share.transpose(2, 3) @ v_n
        p_n, dy_n = (x.unflatten(1, (-1, group)) for x in (p_n, dy_n))
        adjoint = torch.einsum("bhgtl,bhgtd->bhld", p_n, dy_n) + d_mean_n
        centred = v_n @ adjoint.transpose(2, 3) - (adjoint * mean).sum(-1).unsqueeze(2)
        dk = share * centred + exponential * d_norm_n.unsqueeze(2)
        dp = (dy_n @ mean.unsqueeze(2).transpose(3, 4)).flatten(1, 2)
        rows.append((dp, dk, share @ adjoint))
    if not rows:
        return torch.zeros_like(p), torch.zeros_like(k), torch.zeros_like(v)
    dp, dk, dv = (torch.cat(parts, dim=2) for parts in zip(*rows, strict=True))
    return dp, dk, dv


def _frames(k: Tensor, max: Tensor, layout: _Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Running maxima: at a token, before its chunk, behind it, and of whole sequences.

    Those that are subtracted are finite, so that -inf less one of them stays -inf.

    Args:
        k: (B,h,c,s,L).
        max: (N,h,L), of the initial state.
    """
    inside = k.cummax(3).values
    ends = inside[..., -1, :].split_with_sizes(layout.counts, 2)
    initial = [max] if layout.borders is None else max.split(1)
    starts, finals = [inside[:, :, :0, -1]], [max[:0]]
    for end, first in zip(ends, initial, strict=len(ends) > 0):
        running = torch.cat([first.unsqueeze(2), end], 2).cummax(2).values
        starts.append(running[:, :, :-1])
        finals.append(running[:, :, -1])
    m_in, final = torch.cat(starts, 2), torch.cat(finals)
    m = torch.maximum(inside, m_in.unsqueeze(3))
    return finite(m), m_in, finite(m[..., -1, :]), final


def _nonzero(norm: Tensor) -> Tensor:
    """norm with 1 in the place of 0, where its numerator is 0 too."""
    return torch.where(norm == 0, 1, norm)


def _flat(x: Tensor) -> Tensor:
    """Chunks (B,h,c,L,.) in the layout of a recurrence (B,c,.)."""
    return x.movedim(2, 1).flatten(2)


def _unflat(x: Tensor, shape: torch.Size) -> Tensor:
    return x.reshape(shape[0], shape[2], shape[1], *shape[3:]).movedim(1, 2)
