# SPDX-License-Identifier: Apache-2.0
"""Short convolutions of sequences that are sharded over ranks: a halo of K - 1 inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import Backend
from ..convolution import check_short_conv
from ..convolution import short_conv as of_whole_sequences
from ._exchange import Ranks
from ._halo import exchange_halos
from ._layout import make_layout, refuse_states

_OP = "short_conv"


def short_conv(
    ranks: Ranks,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    causal: bool = True,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = False,
    backend: Backend | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """`latte_ext.short_conv` of this rank's tokens; see `context_parallel`."""
    check_short_conv(
        x, weight, bias, causal=causal, state=None, cu_seqlens=None, return_state=False,
        backend=backend, shapes=True,
    )  # fmt: skip
    refuse_states(_OP, state=state, return_state=return_state)
    layout = make_layout(_OP, ranks, x, x.shape[1], cu_seqlens, lengths)
    sharing, width = layout.sharing(), weight.shape[1]
    left = width - 1 if causal else (width - 1) // 2
    right = width - 1 - left
    (halo,) = exchange_halos(_OP, ranks, layout, [x], [1], left=left, right=right)

    y = []
    for part in sharing.parts(first=True, last=True):
        # The tokens of others count as tokens of the same sequence, and their outputs are dropped.
        edges = halo.of(part)
        rows = torch.cat([edges.before, x[:, part.tokens], edges.behind], 1)
        whole = of_whole_sequences(
            rows, weight, bias, causal=causal, backend=backend,
            cu_seqlens=None if part.borders is None else part.borders.to(x.device),
        )  # fmt: skip
        y.append(whole[:, edges.before.shape[1] : rows.shape[1] - edges.behind.shape[1]])
    return torch.cat(y, 1)
