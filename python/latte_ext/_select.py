# SPDX-License-Identifier: Apache-2.0
"""The sequences of a state or cache at an index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def select(
    op: str, tensors: Sequence[Tensor], index: Sequence[int] | Sequence[bool] | Tensor
) -> list[Tensor]:
    """The rows `index` of tensors (N,...): positions in [-N, N), or an (N,) mask.

    Raises:
        TypeError: index is neither integer nor bool.
        ValueError: index is not 1-D, out of range, or a mask of another length.
    """
    batch = tensors[0].shape[0]
    try:
        chosen = torch.as_tensor(index, device=tensors[0].device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{op} index is a {type(index).__name__}, expected integers or bools ({error})"
        ) from error
    if not isinstance(index, Tensor) and chosen.numel() == 0:
        chosen = chosen.long()
    # uint8 is left out: torch has taken it for a mask and for positions.
    if chosen.dtype not in (torch.bool, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{op} index has dtype {chosen.dtype}, expected signed integers or bool")
    if chosen.dim() != 1:
        raise ValueError(f"{op} index has shape {tuple(chosen.shape)}, expected one dimension")
    if chosen.dtype != torch.bool:
        chosen = chosen.long()
    try:
        return [x[chosen] for x in tensors]
    except IndexError as error:
        raise ValueError(
            f"{op} index does not fit: expected positions in [-{batch}, {batch}) "
            f"or a mask of length {batch} ({error})"
        ) from error
