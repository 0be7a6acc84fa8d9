# SPDX-License-Identifier: Apache-2.0
"""Rotations by position in plain torch: part of `latte_ext.reference`.

Any device, differentiable to any order, no tuning. Arguments are taken as valid;
`latte_ext.rotary.rotate` checks. Notation: B batch, H heads, T tokens, D channels per head.
"""

import torch
from torch import Tensor


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
    """Pair i of the first `dim` channels, turned by the angle a = position * rates[i].

        y1 = x1 cos a - x2 sin a
        y2 = x1 sin a + x2 cos a

    Angles are float64; the rest is float64 if x is, else float32. (arXiv 2104.09864, section 3.2.2)

    Args:
        x: (B,H,T,D).
        position: (T,) or (B,T), integers.
        base: rates[i] = base^(-2i/dim) where no rates are given.
        rates: (dim/2,), the angle per position of each pair.
        dim: an even number of at most D, None for D; the other channels stay.
        interleaved: the pairs are channels (2i, 2i + 1), not (i, i + dim/2).
        inverse: by the negative angle.

    Returns:
        (B,H,T,D) in x's dtype.
    """
    dim = x.shape[3] if dim is None else dim
    if rates is None:
        rates = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim)
    angle = position.to(torch.float64)[..., None, :, None] * rates.to(torch.float64)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    if inverse:
        sin = -sin
    turned, rest = x[..., :dim].to(wide), x[..., dim:]
    pairs, axis = ((dim // 2, 2), -1) if interleaved else ((2, dim // 2), -2)
    first, second = turned.unflatten(-1, pairs).unbind(axis)
    pair = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat([torch.stack(pair, axis).flatten(-2).to(x.dtype), rest], -1)
