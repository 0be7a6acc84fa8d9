# SPDX-License-Identifier: Apache-2.0
"""Rotations by position: rotary embeddings of queries and keys (arXiv 2104.09864), and VAPOR, the
rotation of values before a scan and back after it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_flags, check_rank


def positions(
    tokens: int,
    *,
    offset: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The position of every token in its own sequence, int64.

    Args:
        tokens: T.
        offset: position of the first token, or (N,) of the first token of each sequence.
        cu_seqlens: (N+1,) borders of N sequences packed along T.

    Returns:
        (T,), or (N,T) where offset is a tensor and the sequences are not packed.
    """
    index = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        return index + (offset.unsqueeze(1) if isinstance(offset, Tensor) else offset)
    sequence = torch.searchsorted(cu_seqlens[1:].to(index), index, right=True)
    starts = cu_seqlens[:-1].to(index)[sequence]
    first = offset[sequence] if isinstance(offset, Tensor) else offset
    return index - starts + first


def rotate(
    x: Tensor,
    position: Tensor,
    *,
    base: float = 10000.0,
    rates: Tensor | None = None,
    dim: int | None = None,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    """Rotates pair i of the last dimension by the angle position / base^(2 i / dim).

    A rotation of values before a scan and its inverse afterwards (VAPOR) is
    y_t = R^-t sum_s p(s|t) R^s v_s.

    Args:
        x: (B,H,T,D).
        position: (T,), or (B,T).
        base: of the wave lengths, from 2 pi to 2 pi base.
        dim: how many of the D channels are rotated, an even number; None: all.
        interleaved: whether a pair is two neighbours, (2i, 2i+1), or (i, i + dim/2).
        inverse: rotate back.

    Returns:
        (B,H,T,D) in x's dtype, computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes; TypeError: flags.
    """
    op = "rotate"
    check_flags(op, interleaved=interleaved, inverse=inverse)
    check_rank(op, 4, x=x)
    dim = x.shape[3] if dim is None else dim
    if dim % 2 or not 0 <= dim <= x.shape[3]:
        raise ValueError(
            f"[{op}] dim is {dim}, expected an even number of at most {x.shape[3]} channels"
        )
    if position.shape not in (x.shape[2:3], (x.shape[0], x.shape[2])):
        raise ValueError(
            f"[{op}] position has shape {tuple(position.shape)}, "
            f"expected {tuple(x.shape[2:3])} or {(x.shape[0], x.shape[2])}"
        )
    if dim == 0:
        return x
    # Angles in float64: at position 1,000,000 a float32 angle is off by 0.03.
    if rates is None:
        rates = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim)
    angle = position.to(torch.float64).unsqueeze(-1) * rates
    angle = angle if angle.dim() == 2 else angle.unsqueeze(1)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    if inverse:
        sin = -sin
    turned, rest = x[..., :dim].to(wide), x[..., dim:]
    if interleaved:
        first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
    else:
        first, second = turned.chunk(2, -1)
    pair = (first * cos - second * sin, first * sin + second * cos)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([rotated.to(x.dtype), rest], -1) if rest.shape[-1] else rotated.to(x.dtype)
