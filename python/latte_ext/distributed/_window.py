# SPDX-License-Identifier: Apache-2.0
"""Windows over sequences that are sharded over ranks: a halo of window - 1 keys and values, from
one neighbour or, where the window is longer than its shard, from several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from .._checks import Backend, check_backend, check_scale, check_tensors
from .._register import compute_dtype
from .._window_inputs import Seen, check_softcap, check_window, check_window_by_core
from ..macchiato import check_latents, match_heads
from ..window import attend_seen
from ..window_cache import MacchiatoState, WindowCache, WindowSinks
from ._exchange import Ranks
from ._halo import exchange_halos
from ._latent import latent_attention
from ._layout import make_layout, refuse_states


def sliding_window_attention(
    ranks: Ranks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache: WindowCache | None = None,
    return_cache: bool = False,
    sinks: WindowSinks | None = None,
    softcap: float | None = None,
    backend: Backend | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """`latte_ext.sliding_window_attention` of this rank's tokens; see `context_parallel`."""
    op = "sliding_window_attention"
    check_tensors(op, {"q": q, "k": k, "v": v}, key_mask=key_mask)
    scale = check_window(op, q, window, scale, causal, minimum=1)
    cap = check_softcap(op, softcap)
    check_backend(op, "q", q, backend)
    check_window_by_core(
        q, k, v, key_mask, None, None, None, None, None, None, window, 0, causal, scale, cap
    )
    refuse_states(op, cache=cache, return_cache=return_cache, sinks=sinks)
    layout = make_layout(op, ranks, q, q.shape[2], cu_seqlens, lengths)
    tensors, dims = [k, v], [2, 2]
    if key_mask is not None:
        tensors, dims = [*tensors, key_mask], [*dims, 1]
    halos = exchange_halos(
        op, ranks, layout, tensors, dims, left=window - 1, right=0 if causal else window - 1
    )
    y = []
    for part in layout.sharing().parts(first=True, last=not causal):
        own = [halo.of(part) for halo in halos]
        behind = own[0].behind.shape[2]
        # Others' tokens behind these count as tokens here; the rows of their queries are dropped.
        rows = F.pad(q[:, :, part.tokens], (0, 0, 0, behind))
        keys, values, *masks = (
            torch.cat([h.before, x.narrow(h.dim, s.start, s.stop - s.start), h.behind], h.dim)
            for x, h, s in ((x, h, part.tokens) for x, h in zip(tensors, own, strict=True))
        )
        seen = Seen(keys, values, masks[0] if masks else None, past=own[0].before.shape[2])
        whole = attend_seen(
            rows, seen, window=window, causal=causal, scale=scale, sinks=None, softcap=softcap,
            cu_seqlens=None if part.borders is None else part.borders.to(q.device),
            backend=backend,
        )  # fmt: skip
        y.append(whole[:, :, : whole.shape[2] - behind])
    return torch.cat(y, 2)


def macchiato_attention(
    ranks: Ranks,
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
    state: MacchiatoState | None = None,
    return_state: bool = False,
    sinks: WindowSinks | None = None,
    v_latent: Tensor | None = None,
    softcap: float | None = None,
    backend: Backend | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """`latte_ext.macchiato_attention` of this rank's tokens; see `context_parallel`.

    With p the softmax over window and latents, y = p_0 window + (1 - p_0) latents, each by its own
    operator.
    """
    op = "macchiato_attention"
    check_tensors(op, {"q": q, "k": k, "v": v}, key_mask=key_mask)
    check_latents(op, q, k, v, q_latent, k_latent, v_latent)
    scale = check_window(op, q, window, scale, causal, minimum=0)
    check_scale(op, latent_scale)
    refuse_states(op, state=state, return_state=return_state, sinks=sinks)
    dtype, wide = v.dtype, compute_dtype(q, k, v)
    # Read twice: the gradients are summed before they are rounded.
    q_latent, v = q_latent.to(wide), v.to(wide)
    layout = make_layout(op, ranks, q, q.shape[2], cu_seqlens, lengths)

    def local() -> Tensor:
        return sliding_window_attention(
            ranks, q, k, v, window=window, causal=causal, scale=scale, key_mask=key_mask,
            cu_seqlens=cu_seqlens, softcap=softcap, backend=backend, lengths=layout.lengths,
        )  # fmt: skip

    def latents() -> Tensor:
        keys, values = match_heads(k_latent, v, v_latent)
        return latent_attention(
            ranks, q_latent[..., 1:], keys, v if values is None else values, causal=causal,
            scale=latent_scale, key_mask=key_mask, cu_seqlens=cu_seqlens, backend=backend,
            lengths=layout.lengths,
        )  # type: ignore[return-value]  # fmt: skip

    if window == 0:
        return latents().to(dtype)
    p = reference.softmax(q_latent * latent_scale, dim=-1)
    y = p[..., :1] * local()
    if k_latent.shape[3]:
        y = y + p[..., 1:].sum(-1, keepdim=True) * latents()
    return y.to(dtype)
