# SPDX-License-Identifier: Apache-2.0
"""Latent attention in plain torch: the executable specification (arXiv 2402.17512).

Every other backend is tested against this file, so it is written to be read: any device, float32
or float64, differentiable to any order and in forward mode, no tuning. It is also what
``backend="reference"`` runs. Arguments are taken as valid; `latte_ext.latent_attention` checks.

Notation: B batch, T tokens, H query heads, Hk key/value heads (query head h reads key/value head
h // (H // Hk)), L latents per head, D value channels per head, N sequences (B, or
len(cu_seqlens) - 1 when packed)::

    p(l|t)   = softmax over latents of q[t, :]
    p(s|l,t) = exp k[s,l] / sum over s' of exp k[s',l]     s, s' <= t if causal, else all positions
    y[t]     = sum over l of p(l|t) * (sum over s of p(s|l,t) v[s])

The inner sum is the mean of a *state* ``(max, norm, mean)`` of shapes (N,Hk,L), (N,Hk,L) and
(N,Hk,L,D), which summarises a set of tokens per latent::

    max = max of k      norm = sum of exp(k - max)      mean = sum of p(s|l) v[s]

and ``(-inf, 0, 0)`` for the empty set. ``max`` is a reference point that y does not depend on while
``max + log(norm)`` is fixed: it is constant under differentiation, norm and mean carry gradients.

Conventions: a -inf key, and a latent that no token has used, contribute exact zeros and p(l|t) is
not renormalised over the others; a row of q that is all -inf gives y = 0; a NaN or +inf key gives
NaN from there on in its latent. `scale` multiplies the logits q and k, so that states are in scaled
logits. `key_mask` (True = a real token) removes keys and values, whatever they hold; y is computed
at every position. Arithmetic is float64 if an input is, else float32, under autocast too (run the
backward pass outside of it, as torch asks); y has the dtype of v.
"""

import contextlib
import math
from functools import reduce

import torch
from torch import Tensor

from ._reference_mixers import linear_recurrence as linear_recurrence
from ._reference_mixers import rg_lru as rg_lru
from ._reference_mixers import short_conv as short_conv
from ._reference_rotary import rotate as rotate

StateTensors = tuple[Tensor, Tensor, Tensor]


def empty_state(
    batch: int,
    heads: int,
    latents: int,
    dim: int,
    *,
    device: torch.device | None,
    dtype: torch.dtype,
) -> StateTensors:
    """The state of no tokens: max (N,Hk,L) = -inf, norm (N,Hk,L) = 0, mean (N,Hk,L,D) = 0."""
    shape = (batch, heads, latents)
    return (
        torch.full(shape, -torch.inf, device=device, dtype=dtype),
        torch.zeros(shape, device=device, dtype=dtype),
        torch.zeros((*shape, dim), device=device, dtype=dtype),
    )


def token_state(k: Tensor, values: Tensor) -> StateTensors:
    """The state of one token with logits k (N,Hk,L) and, per latent, values (N,Hk,L,D).

    norm is 1, written so that the gradient of k flows through it; a -inf logit gives the empty
    state.
    """
    norm = torch.exp(k - finite(k.detach()))
    mean = torch.where(norm.unsqueeze(-1) == 0, 0, values)
    return k.detach(), norm, mean


def merge(a: StateTensors, b: StateTensors) -> StateTensors:
    """The state of the union of two disjoint sets of tokens, in new tensors.

    Associative and commutative, with the empty state as identity: exact in values, and no gradient
    reaches an empty latent.
    """
    a_max, a_norm, a_mean = a[0].detach(), a[1], a[2]
    b_max, b_norm, b_mean = b[0].detach(), b[1], b[2]
    max_ = torch.maximum(a_max, b_max)
    a_weight = a_norm * torch.exp(a_max - finite(max_))
    b_weight = b_norm * torch.exp(b_max - finite(max_))
    norm = a_weight + b_weight
    empty = norm == 0
    b_share = (b_weight / torch.where(empty, 1, norm)).unsqueeze(-1)
    # The mask also cuts the gradient of a_mean, which the formula would let through.
    mean = torch.where(empty.unsqueeze(-1), 0, a_mean + b_share * (b_mean - a_mean))
    return max_, norm, mean


def merge_all(max: Tensor, norm: Tensor, mean: Tensor) -> StateTensors:
    """The states of S >= 1 disjoint sets, (S,N,Hk,L) and (S,N,Hk,L,D), merged in one step."""
    max = max.detach()
    top = max.amax(dim=0)
    weight = norm * torch.exp(max - finite(top))
    total = weight.sum(dim=0)
    share = weight / torch.where(total == 0, 1, total)
    # As in `merge`: no gradient reaches the mean of an empty latent.
    means = torch.where(share.unsqueeze(-1) == 0, 0, mean)
    return top, total, (share.unsqueeze(-1) * means).sum(dim=0)


def summary(k: Tensor, v: Tensor, *, scale: float, key_mask: Tensor | None) -> StateTensors:
    """The state that `latent_attention` leaves of k (B,Hk,T,L) and v (B,Hk,T,D), T >= 0."""
    with autocast_disabled(k.device):
        _, k, v = prepare(k[:, :, :0], k, v, scale, key_mask)
        return _summary(k, v)


def read(q: Tensor, mean: Tensor, *, scale: float) -> Tensor:
    """sum over l of p(l|t) mean[l] (B,H,T,D) for logits q (B,H,T,L) and mean (B,Hk,L,D)."""
    with autocast_disabled(q.device):
        return _read(softmax(q.to(mean.dtype) * scale, dim=-1), mean)


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: StateTensors | None = None,
) -> tuple[Tensor, StateTensors]:
    """Latent attention of whole sequences; the causal form is a fold of `merge` over the tokens.

    Args:
        q: latent-assignment logits (B,H,T,L).
        k: token-selection logits (B,Hk,T,L).
        v: values (B,Hk,T,D).
        causal: a token sees itself and its past; False: its whole sequence.
        scale: multiplies q and k.
        key_mask: (B,T) bool, True = a real token.
        cu_seqlens: (N+1,) integer offsets of N sequences packed along T, with B == 1.
        state: state of N sequences to continue from, causal only.

    Returns:
        y (B,H,T,D) in the dtype of v, and the state of each sequence after its last token.

    Raises:
        ValueError: a state together with causal=False.
    """
    if state is not None and not causal:
        raise ValueError("[latent_attention] got state with causal=False, expected causal=True")
    with autocast_disabled(q.device):
        p, k, values = prepare(q, k, v, scale, key_mask)
        carry = _initial_state(k, values, cu_seqlens)
        if state is not None:
            carry = merge(carry, state)
        if cu_seqlens is None:
            y, carry = _attend(p, k, values, carry, causal)
        else:
            y, carry = _attend_packed(p, k, values, carry, causal, cu_seqlens.diff().tolist())
    return y.to(v.dtype), carry


def latent_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: StateTensors, *, scale: float = 1.0
) -> tuple[Tensor, StateTensors]:
    """One causal token per sequence, in time and memory that do not depend on the position.

    Args:
        q: (N,H,L).
        k: (N,Hk,L).
        v: (N,Hk,D).
        state: state of the tokens so far; left untouched.
        scale: multiplies q and k.

    Returns:
        y (N,H,D) in the dtype of v, and the state that includes the token.
    """
    y, state = latent_attention(
        q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), scale=scale, state=state
    )
    return y.squeeze(2), state


def latent_attention_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: StateTensors | None = None,
) -> tuple[Tensor, StateTensors]:
    """The same function as `latent_attention`, from the definition: an independent oracle.

    Builds p(s|l,t) for all pairs of tokens, O(T^2 L) memory, and never merges states. An initial
    state is position 0 of every sequence, with logits max + log(norm) and one value per latent.
    """
    with autocast_disabled(q.device):
        p, k, values = prepare(q, k, v, scale, key_mask)
        tokens = k.shape[2]
        packed = cu_seqlens is not None
        offsets = torch.tensor([0, tokens]) if cu_seqlens is None else cu_seqlens
        lengths = offsets.diff().to(k.device)

        # One row of p(s|l,t) per token, then one per sequence for its final state.
        sequences = torch.arange(len(lengths), device=k.device)
        sequence_of_token = sequences.repeat_interleave(lengths)
        sequence_of_row = torch.cat([sequence_of_token, sequences])
        visible = sequence_of_row[:, None] == sequence_of_token
        if causal:
            visible &= torch.ones_like(visible).tril()

        # States as (B,Hk,S,...): packed sequences lie along the time axis of one batch entry.
        state = _initial_state(k, values, cu_seqlens) if state is None else state
        max0, norm0, mean0 = (
            (x.transpose(0, 1)[None] if packed else x.unsqueeze(2))[:, :, sequence_of_row]
            for x in state
        )
        lse0 = max0.detach() + torch.where(norm0 == 0, 1, norm0).log()

        logits = torch.where(visible[..., None], k.unsqueeze(2), -torch.inf)
        max_ = torch.cat([max0.unsqueeze(3), logits], dim=3).amax(dim=3).detach()
        logits = torch.cat([lse0.unsqueeze(3), logits], dim=3)
        norm = torch.exp(logits - finite(max_).unsqueeze(3)).sum(dim=3)
        p_position = softmax(logits, dim=3)
        mean = torch.einsum("bhrsl,bhsd->bhrld", p_position[:, :, :, 1:], values)
        mean = mean + p_position[:, :, :, 0, :, None] * mean0

        group = q.shape[1] // k.shape[1]
        mean_of_token = mean[:, :, :tokens].repeat_interleave(group, dim=1)
        y = torch.einsum("bhtl,bhtld->bhtd", p, mean_of_token)
    final = (x[:, :, tokens:] for x in (max_, norm, mean))
    max_, norm, mean = (x[0].transpose(0, 1) if packed else x.squeeze(2) for x in final)
    return y.to(v.dtype), (max_, norm, mean)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    past: int = 0,
    sinks: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
    start: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention to the tokens closer than `window`, from the definition: O(T S) memory.

    Every sequence of T query tokens has S = past + T keys: query t stands at key past + t. A row
    that sees no key gives y = 0; `key_mask` removes keys and values, whatever they hold.

    Args:
        q: queries (B,H,T,Dk).
        k: keys (B,Hk,S,Dk).
        v: values (B,Hk,S,D).
        window: token t sees the keys s with t - window < s <= t, or |t - s| < window.
        causal: which of the two.
        scale: multiplies q . k; None is 1/sqrt(Dk).
        key_mask: (B,S) bool, True = a real token.
        cu_seqlens: (N+1,) integer offsets of the queries of N sequences packed along T, B == 1. The
            keys of sequence n then begin at cu_seqlens[n] + n * past.
        past: keys of each sequence before its first query.
        sinks: queries (B,H,T,Dk), keys (N,Hk,n,Dk), values (N,Hk,n,D) and either None, every token
            sees them all, or positions (N,n): a token sees those that its window does not hold.
        start: (N,) position of the first query in its sequence, 0 if None; matters to sinks only.
        softcap: logits, those of sinks too, become softcap tanh(logit / softcap).

    Returns:
        y (B,H,T,D) in the dtype of v.
    """
    with autocast_disabled(q.device):
        dtype = reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype, torch.float32))
        scale = q.shape[3] ** -0.5 if scale is None else scale
        queries, keys, values = q.to(dtype) * scale, k.to(dtype), v.to(dtype)
        if key_mask is None:
            key_mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        lengths = None if cu_seqlens is None else cu_seqlens.diff().tolist()
        sequences = q.shape[0] if lengths is None else len(lengths)
        if start is None:
            start = torch.zeros(sequences, dtype=torch.int64, device=q.device)
        if sinks is not None:
            q_sink, k_sink, v_sink, position = sinks
            sinks = q_sink.to(dtype) * scale, k_sink.to(dtype), v_sink.to(dtype), position
        if lengths is None:
            y = _window(queries, keys, values, key_mask, window, causal, softcap, sinks, start)
        else:
            rows = [values.new_empty(1, q.shape[1], 0, v.shape[3])]
            longer = [past + n for n in lengths]
            pieces = (
                queries.split_with_sizes(lengths, dim=2),
                keys.split_with_sizes(longer, dim=2),
                values.split_with_sizes(longer, dim=2),
                key_mask.split_with_sizes(longer, dim=1),
            )
            for n, (q_n, k_n, v_n, mask_n) in enumerate(zip(*pieces, strict=True)):
                sinks_n = None
                if sinks is not None:
                    first = sum(lengths[:n])
                    sinks_n = (
                        sinks[0][:, :, first : first + lengths[n]],
                        sinks[1][n : n + 1],
                        sinks[2][n : n + 1],
                        None if sinks[3] is None else sinks[3][n : n + 1],
                    )
                rows.append(
                    _window(
                        q_n, k_n, v_n, mask_n, window, causal, softcap, sinks_n, start[n : n + 1]
                    )
                )
            y = torch.cat(rows, dim=2)
    return y.to(v.dtype)


def macchiato_attention(
    q_latent: Tensor,
    k_latent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = True,
    scale: float | None = None,
    latent_scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: StateTensors | None = None,
    past: int = 0,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    past_mask: Tensor | None = None,
    sinks: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
    start: Tensor | None = None,
    v_latent: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, StateTensors]:
    """Window and latents in one probability: p(l|t) = softmax over l = 0..L of q_latent[t].

        y[t] = p(0|t) * sliding_window_attention(q, k, v)[t] + sum over l >= 1 of p(l|t) mean[t,l]

    with mean[t,l] as in `latent_attention`, over *all* tokens s <= t (all if not causal). With
    window=0 there is no column 0: the softmax runs over the latents alone.

    Args:
        q_latent: (B,H,T,1+L) logits, column 0 for the window.
        k_latent: (B,Hl,T,L) logits of p(s|l), H a multiple of Hl.
        q: (B,H,T,Dk).
        k: (B,Hk,T,Dk).
        v: (B,Hk,T,D).
        window: as in `sliding_window_attention`; 0: none.
        causal: as in `sliding_window_attention`.
        scale: multiplies q . k; None is 1/sqrt(Dk).
        key_mask: (B,T) bool, True = a real token.
        cu_seqlens: (N+1,) integer borders of N sequences packed along T, B == 1.
        latent_scale: multiplies q_latent and k_latent.
        state: of N sequences to continue from, causal only; its heads are the least common multiple
            of Hl and Hk.
        past: keys of each sequence before its first query.
        past_k: (B,Hk,past+T,Dk) keys that the window sees instead of k, if past > 0.
        past_v: (B,Hk,past+T,D), in the same way.
        past_mask: (B,past+T), in the same way.
        sinks: of the window, as is `start`; see `sliding_window_attention`.
        start: (N,) position of the first query in its sequence, 0 if None.
        softcap: of the window's logits.
        v_latent: (B,Hk,T,D) values of the latents, v if None.

    Returns:
        y (B,H,T,D) in the dtype of v, and the latents' state after the last token.
    """
    if state is not None and not causal:
        raise ValueError("[macchiato_attention] got state with causal=False, expected causal=True")
    with autocast_disabled(q.device):
        v_latent = v if v_latent is None else v_latent
        heads = math.lcm(k_latent.shape[1], v.shape[1])
        p, keys, values = prepare(
            q_latent if window else q_latent[..., 1:],
            k_latent.repeat_interleave(heads // k_latent.shape[1], dim=1),
            v_latent.repeat_interleave(heads // v.shape[1], dim=1),
            latent_scale,
            key_mask,
        )
        carry = _initial_state(keys, values, cu_seqlens)
        if state is not None:
            carry = merge(carry, state)
        latents = p[..., 1:] if window else p
        if cu_seqlens is None:
            y, carry = _attend(latents, keys, values, carry, causal)
        else:
            lengths = cu_seqlens.diff().tolist()
            y, carry = _attend_packed(latents, keys, values, carry, causal, lengths)
        if window:
            local = sliding_window_attention(
                q,
                k if past_k is None else past_k,
                (v if past_v is None else past_v).to(p.dtype),
                window=window,
                causal=causal,
                scale=scale,
                key_mask=key_mask if past_mask is None else past_mask,
                cu_seqlens=cu_seqlens,
                past=past,
                sinks=sinks,
                start=start,
                softcap=softcap,
            )
            y = y + p[..., :1] * local
    return y.to(v.dtype), carry


def _window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor,
    window: int,
    causal: bool,
    softcap: float | None,
    sinks: tuple[Tensor, Tensor, Tensor, Tensor | None] | None,
    start: Tensor,
) -> Tensor:
    """One window per token, of B sequences of T queries (already scaled) and S >= T keys."""
    tokens, group = q.shape[2], q.shape[1] // k.shape[1]
    at = torch.arange(k.shape[2] - tokens, k.shape[2], device=q.device)
    distance = at[:, None] - torch.arange(k.shape[2], device=q.device)
    near = (distance < window) & (distance >= 0 if causal else distance > -window)
    visible = near & key_mask[:, None, None, :]
    values = torch.where(key_mask[:, None, :, None], v, 0)
    keys = k.repeat_interleave(group, dim=1)
    logits = torch.where(visible, _capped(q @ keys.transpose(2, 3), softcap), -torch.inf)
    values = values.repeat_interleave(group, dim=1)
    if sinks is not None:
        q_sink, k_sink, v_sink, position = sinks
        keys = k_sink.repeat_interleave(group, dim=1)
        sink_logits = _capped(q_sink @ keys.transpose(2, 3), softcap)
        if position is not None:
            own = start[:, None] + torch.arange(tokens, device=q.device)
            distance = own[:, :, None] - position[:, None, :]
            outside = distance >= window if causal else distance.abs() >= window
            sink_logits = torch.where(outside[:, None], sink_logits, -torch.inf)
        logits = torch.cat([sink_logits, logits], dim=3)
        values = torch.cat([v_sink.repeat_interleave(group, dim=1), values], dim=2)
    return softmax(logits, dim=-1) @ values


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """p(l|t) (B,H,T,L), and k and v scaled and masked, in the dtype of the arithmetic."""
    dtype = reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype, torch.float32))
    q, k, v = q.to(dtype) * scale, k.to(dtype) * scale, v.to(dtype)
    if key_mask is not None:
        real = key_mask[:, None, :, None]
        k = torch.where(real, k, -torch.inf)
        v = torch.where(real, v, 0)
    return softmax(q, dim=-1), k, v


def _initial_state(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> StateTensors:
    """The empty state of the N sequences in prepared k (B,Hk,T,L) and v (B,Hk,T,D)."""
    batch, heads, _, latents = k.shape
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    return empty_state(sequences, heads, latents, v.shape[3], device=k.device, dtype=k.dtype)


def _attend(
    p: Tensor, k: Tensor, v: Tensor, carry: StateTensors, causal: bool
) -> tuple[Tensor, StateTensors]:
    """Outputs and final state of B sequences, from p(l|t), prepared k and v, and a state."""
    if not causal:
        carry = merge(carry, _summary(k, v))
        return _read(p, carry[2]), carry
    rows = [v.new_empty(p.shape[0], p.shape[1], 0, v.shape[3])]
    # unbind, because T slices would each have a gradient of the size of their T tokens.
    for p_t, k_t, v_t in zip(p.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        carry = merge(carry, token_state(k_t, v_t.unsqueeze(2)))
        rows.append(_read(p_t.unsqueeze(2), carry[2]))
    return torch.cat(rows, dim=2), carry


def _attend_packed(
    p: Tensor, k: Tensor, v: Tensor, carry: StateTensors, causal: bool, lengths: list[int]
) -> tuple[Tensor, StateTensors]:
    """`_attend` for each of the N sequences packed along T."""
    rows = [v.new_empty(1, p.shape[1], 0, v.shape[3])]
    states = [(carry[0][:0], carry[1][:0], carry[2][:0])]
    pieces = (x.split_with_sizes(lengths, dim=2) for x in (p, k, v))
    for n, (p_n, k_n, v_n) in enumerate(zip(*pieces, strict=True)):
        carry_n = (carry[0][n : n + 1], carry[1][n : n + 1], carry[2][n : n + 1])
        y_n, carry_n = _attend(p_n, k_n, v_n, carry_n, causal)
        rows.append(y_n)
        states.append(carry_n)
    max_, norm, mean = (torch.cat(parts) for parts in zip(*states, strict=True))
    return torch.cat(rows, dim=2), (max_, norm, mean)


def _summary(k: Tensor, v: Tensor) -> StateTensors:
    """The state of all T >= 0 tokens of k (B,Hk,T,L) and v (B,Hk,T,D)."""
    keys = k.detach()
    # Without tokens nothing but the formulas below ties the state to k and v, for gradients.
    max_ = keys.amax(dim=2) if k.shape[2] else keys.sum(dim=2) - torch.inf
    weight = torch.exp(k - finite(max_).unsqueeze(2))
    norm = weight.sum(dim=2)
    share = weight / torch.where(norm == 0, 1, norm).unsqueeze(2)
    return max_, norm, share.transpose(2, 3) @ v


def _read(p: Tensor, mean: Tensor) -> Tensor:
    """sum over l of p(l|t) mean[l]: p (B,H,T,L), mean (B,Hk,L,D) -> (B,H,T,D)."""
    batch, heads, tokens, latents = p.shape
    rows = heads // mean.shape[1] * tokens
    y = p.reshape(batch, mean.shape[1], rows, latents) @ mean
    return y.reshape(batch, heads, tokens, mean.shape[3])


def softmax(logits: Tensor, dim: int) -> Tensor:
    """Softmax in which a row of nothing but -inf gives zeros, in values and in gradients."""
    empty = (logits == -torch.inf).all(dim=dim, keepdim=True)
    return torch.where(empty, 0, torch.softmax(torch.where(empty, 0, logits), dim=dim))


def finite(max_: Tensor) -> Tensor:
    """max_ with -inf as 0, so that -inf - max_ is -inf rather than NaN where nothing was seen."""
    return torch.where(max_ == -torch.inf, 0, max_)


def autocast_disabled(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
