# SPDX-License-Identifier: Apache-2.0
"""What latent attention is compared with: the same function in plain torch, written for speed, and
softmax attention.

Notation: B batch, T tokens, H heads, L latents per head, D value channels per head, C tokens of a
chunk. Weights are taken relative to the largest key of a latent up to the end of a chunk, so a key
that rises by more than 80 within a chunk costs the tokens before it their digits.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
State = tuple[Tensor, Tensor, Tensor]

# Fastest of 32, 64, 128 and 256 tokens, and of 8, 16 and 32 chunks, for 8 heads of 64 latents.
CHUNK, GROUP = 64, 16
# Key maximum of a latent without tokens: finite, since -inf - -inf is NaN.
_NOTHING = -1e30


def chunk_step(
    p: Tensor, k: Tensor, v: Tensor, max_: Tensor, norm: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One chunk: p(l|t) and k (B,H,C,L), v (B,H,C,D), and the state of the tokens before it.

    The state is the largest key and the sum of weights, both (B,H,1,L), and the weighted sum of
    values (B,H,L,D). Returns y (B,H,C,D) and the new state.
    """
    new_max = torch.maximum(max_, k.detach().amax(2, keepdim=True))
    decay = torch.exp(max_ - new_max)
    weight = torch.exp(k - new_max)
    total = total * decay.transpose(2, 3)
    norms = weight.cumsum(2) + norm * decay
    share = p / norms
    y = share @ total + (share @ weight.transpose(2, 3)).tril() @ v
    return y, new_max, norms[:, :, -1:], total + weight.transpose(2, 3) @ v


def looped(
    q: Tensor, k: Tensor, v: Tensor, *, chunk: int = CHUNK, step: Callable[..., Any] = chunk_step
) -> Tensor:
    """Causal latent attention, chunk after chunk: what is worked on stays in the cache."""
    batch, heads, _, latents = q.shape
    p = torch.softmax(q, -1)
    max_ = q.new_full((batch, heads, 1, latents), _NOTHING)
    norm, total = torch.zeros_like(max_), q.new_zeros(batch, heads, latents, v.shape[3])
    rows = []
    for p_c, k_c, v_c in zip(p.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True):
        y, max_, norm, total = step(p_c, k_c, v_c, max_, norm, total)
        rows.append(y)
    return torch.cat(rows, 2)


def batched(q: Tensor, k: Tensor, v: Tensor, *, chunk: int = CHUNK, group: int = GROUP) -> Tensor:
    """Causal latent attention with all chunks at once, in a few large batched matrix products.

    The states of the chunks are prefix sums with a decay per latent: a matrix product within each
    group of chunks, a short loop over the groups.
    """
    batch, heads, tokens, latents = q.shape
    dim = v.shape[3]
    chunks = -(-tokens // chunk)
    group = min(group, chunks)
    groups = -(-chunks // group)
    chunks = groups * group
    padding = (0, 0, 0, chunks * chunk - tokens)
    by_chunk = (batch, heads, chunks, chunk)
    p = F.pad(torch.softmax(q, -1), padding).view(*by_chunk, latents)
    k = F.pad(k, padding, value=-torch.inf).reshape(*by_chunk, latents)
    v = F.pad(v, padding).reshape(*by_chunk, dim)

    max_ = k.detach().amax(3).cummax(2).values
    weight = torch.exp(k - max_.unsqueeze(3))
    norms = weight.cumsum(3)

    # Sums up to and with each chunk of its group, relative to the chunk's own maximum: (...,L,G,.).
    top = max_.view(batch, heads, groups, group, latents).transpose(3, 4)
    later = torch.ones(group, group, dtype=torch.bool, device=q.device).triu(1)
    decay = torch.exp((top.unsqueeze(4) - top.unsqueeze(5)).masked_fill(later, -torch.inf))
    sums = torch.cat([weight.transpose(3, 4) @ v, norms[:, :, :, -1].unsqueeze(4)], 4)
    prefix = decay @ sums.view(batch, heads, groups, group, latents, dim + 1).transpose(3, 4)

    # And those of the groups before.
    end = top[..., -1]
    start = torch.cat([end[:, :, :1], end[:, :, :-1]], 2)
    carry = [torch.zeros_like(prefix[:, :, 0, :, 0])]
    for g in range(groups - 1):
        kept = torch.exp(start[:, :, g] - end[:, :, g]).unsqueeze(3)
        carry.append(carry[-1] * kept + prefix[:, :, g, :, -1])
    kept = torch.exp((start.unsqueeze(4) - top).clamp(max=0)).unsqueeze(5)
    prefix = prefix + kept * torch.stack(carry, 2).unsqueeze(4)
    prefix = prefix.transpose(3, 4).reshape(batch, heads, chunks, latents, dim + 1)

    before = torch.cat([max_[:, :, :1], max_[:, :, :-1]], 2)
    initial = F.pad(prefix[:, :, :-1], (0, 0, 0, 0, 1, 0))
    initial = initial * torch.exp(before - max_).unsqueeze(4)
    share = p / (norms + initial[..., dim].unsqueeze(3))
    y = share @ initial[..., :dim] + (share @ weight.transpose(3, 4)).tril() @ v
    return y.reshape(batch, heads, chunks * chunk, dim)[:, :, :tokens]


def step_in_place(q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
    """One token in plain torch: q, k (N,H,L), v (N,H,D); updates max, norm and mean in place."""
    max_, norm, mean = state
    new_max = torch.maximum(max_, k)
    kept, weight = norm * torch.exp(max_ - new_max), torch.exp(k - new_max)
    max_.copy_(new_max)
    torch.add(kept, weight, out=norm)
    mean.lerp_(v.unsqueeze(2), (weight / norm).unsqueeze(3))
    return (torch.softmax(q, -1).unsqueeze(2) @ mean).squeeze(2)


def softmax_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def softmax_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def compiled_looped() -> Attention:
    """`looped` with its step compiled."""
    step = torch.compile(chunk_step, dynamic=False)
    return lambda q, k, v: looped(q, k, v, step=step)


def compiled_batched() -> Attention:
    compiled: Attention = torch.compile(batched, dynamic=False)
    return compiled


def band_mask(tokens: int, window: int) -> Tensor:
    """(T,T) bool, true in the causal band."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (distance >= 0) & (distance < window)


def blockwise(q: Tensor, k: Tensor, v: Tensor, *, window: int) -> Tensor:
    """Blocks of `window` queries, each against its own block of keys and the one before."""
    batch, heads, tokens, dim = q.shape
    blocks = -(-tokens // window)
    padding = (0, 0, 0, blocks * window - tokens)
    q, k, v = (
        F.pad(x, padding).reshape(batch, heads, blocks, window, x.shape[3]) for x in (q, k, v)
    )
    k, v = (
        torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3).flatten(1, 2) for x in (k, v)
    )
    distance = torch.arange(window)[:, None] + window - torch.arange(2 * window)
    mask = ((distance >= 0) & (distance < window)).expand(blocks, -1, -1).clone()
    mask[0, :, :window] = False
    y = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, attn_mask=mask.repeat(heads, 1, 1))
    return y.reshape(batch, heads, blocks * window, dim)[:, :, :tokens]


def flex_causal(tokens: int, window: int | None = None) -> Attention:
    """FlexAttention, compiled, for `tokens` tokens: causal, all or the last `window` of them.

    On CPUs it has a forward pass only.
    """
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    reach = tokens if window is None else window

    def visible(b: Any, h: Any, row: Any, column: Any) -> Any:
        return (row >= column) & (row - column < reach)

    mask = flex.create_block_mask(visible, None, None, tokens, tokens, device="cpu")
    compiled: Any = torch.compile(flex.flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=mask)


def fla_linear() -> Attention:
    """flash-linear-attention's plain torch form of linear attention, which has no normaliser: less
    work than latent attention."""
    naive = importlib.import_module("fla.ops.linear_attn.naive")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = naive.naive_chunk_linear_attn(*(x.transpose(1, 2) for x in (q, k, v)))
        return y

    return call


def jax_scan(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """A call of `looped` in JAX, jitted, on copies of these inputs of whole chunks."""
    jax = importlib.import_module("jax")
    np = importlib.import_module("jax.numpy")

    def step(state: Any, inputs: Any) -> Any:
        max_, norm, total = state
        p, k, v = inputs
        new_max = np.maximum(max_, k.max(2, keepdims=True))
        decay, weight = np.exp(max_ - new_max), np.exp(k - new_max)
        total = total * decay.swapaxes(2, 3)
        norms = np.cumsum(weight, 2) + norm * decay
        share = p / norms
        y = share @ total + np.tril(share @ weight.swapaxes(2, 3)) @ v
        return (new_max, norms[:, :, -1:], total + weight.swapaxes(2, 3) @ v), y

    def attention(q: Any, k: Any, v: Any) -> Any:
        batch, heads, tokens, latents = q.shape
        state = (
            np.full((batch, heads, 1, latents), _NOTHING),
            np.zeros((batch, heads, 1, latents)),
            np.zeros((batch, heads, latents, v.shape[3])),
        )
        chunks = [
            x.reshape(batch, heads, tokens // CHUNK, CHUNK, x.shape[3]).transpose(2, 0, 1, 3, 4)
            for x in (jax.nn.softmax(q, -1), k, v)
        ]
        y = jax.lax.scan(step, state, chunks)[1]
        return y.transpose(1, 2, 0, 3, 4).reshape(batch, heads, tokens, v.shape[3])

    inputs = [np.asarray(x.numpy()) for x in (q, k, v)]
    compiled = jax.jit(attention)
    return lambda: compiled(*inputs).block_until_ready()
