# SPDX-License-Identifier: Apache-2.0
"""Latent attention to sequences that are sharded over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._checks import Backend, check_device, check_type
from .._register import compute_dtype
from ..functional import check_latent_attention
from ..functional import latent_attention as of_whole_sequences
from ..reference import StateTensors
from ..state import LatentState
from ._exchange import Ranks
from ._layout import Part, make_layout, one_sequence
from ._states import border_states, incoming

_OP = "latent_attention"


def latent_attention(
    ranks: Ranks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: LatentState | None = None,
    return_state: bool = False,
    backend: Backend | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, LatentState]:
    """`latte_ext.latent_attention` of this rank's tokens; see `context_parallel`."""
    # Before any collective, so that what is wrong on all ranks raises on all of them at once.
    check_latent_attention(
        q, k, v, causal=causal, scale=scale, key_mask=key_mask, cu_seqlens=None, state=None,
        backend=backend, shapes=True,
    )  # fmt: skip
    if return_state and cu_seqlens is not None:
        raise ValueError(
            f"[{_OP}] got return_state with cu_seqlens on sharded sequences, expected one of the "
            "two: no rank has the last tokens of all sequences"
        )
    if cu_seqlens is None and lengths is None:
        sharing, sequences = one_sequence(ranks, q.shape[2]), q.shape[0]
    else:
        layout = make_layout(_OP, ranks, q, q.shape[2], cu_seqlens, lengths)
        sharing = layout.sharing()
        sequences = q.shape[0] if cu_seqlens is None else len(layout.borders) - 1
    initial = _initial(k, v, sequences, state, causal)
    dtype = v.dtype
    # Read twice, by the state and by the scan, whose gradients are summed before they are rounded.
    k, v = k.to(compute_dtype(k, v)), v.to(compute_dtype(k, v))

    def attend(part: Part, **options: Any) -> Tensor:
        piece = part.tokens
        y: Tensor = of_whole_sequences(
            q[:, :, piece], k[:, :, piece], v[:, :, piece], causal=causal, scale=scale,
            key_mask=None if key_mask is None else key_mask[:, piece],
            cu_seqlens=None if part.borders is None else part.borders.to(k.device),
            backend=backend, **options,
        )  # fmt: skip
        return y

    final: StateTensors | None
    packed = cu_seqlens is not None
    if causal:
        head, *rest = sharing.parts(first=True, last=False)
        start = select(initial, head.sequences) if packed else initial
        before, final = incoming(
            _OP, ranks, sharing, k, v, start, scale=scale, key_mask=key_mask, total=return_state
        )
        rows = [attend(head, state=LatentState(*before))]
        rows += [attend(part, state=LatentState(*select(initial, part.sequences))) for part in rest]
    else:
        states = border_states(
            _OP, ranks, sharing, k, v, scale=scale, key_mask=key_mask, packed=packed
        )
        final = states[0]
        rows = []
        for part in sharing.parts(first=True, last=True):
            if part.first or part.last:
                mean = states[0 if part.first else -1][2]
                rows.append(reference.read(q[:, :, part.tokens], mean, scale=scale))
            else:
                rows.append(attend(part))
    y = torch.cat(rows, dim=2).to(dtype)
    if not return_state:
        return y
    assert final is not None
    return y, LatentState(*final)


def select(state: StateTensors, sequences: Sequence[int]) -> StateTensors:
    """The states of some sequences; that of none as an empty one, for a rank without tokens."""
    if not sequences:
        sizes = state[2].shape[1:]
        return reference.empty_state(1, *sizes, device=state[2].device, dtype=state[2].dtype)
    max_, norm, mean = (x[list(sequences)] for x in state)
    return max_, norm, mean


def _initial(
    k: Tensor, v: Tensor, sequences: int, state: LatentState | None, causal: bool
) -> StateTensors:
    """The state of the sequences before their first tokens."""
    sizes, dtype = (sequences, k.shape[1], k.shape[3], v.shape[3]), compute_dtype(k, v)
    if state is None:
        return reference.empty_state(*sizes, device=k.device, dtype=dtype)
    check_type(_OP, "state", state, LatentState)
    if not causal:
        raise ValueError(f"[{_OP}] got state with causal=False, expected causal=True")
    check_device(_OP, "state", state.device, k, "k")
    if tuple(state.mean.shape) != sizes or state.dtype != dtype:
        raise ValueError(
            f"[{_OP}] state.mean has shape {tuple(state.mean.shape)} and dtype {state.dtype}, "
            f"expected {sizes} and {dtype}"
        )
    return state.tensors()
