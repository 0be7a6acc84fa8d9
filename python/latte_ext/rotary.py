# SPDX-License-Identifier: Apache-2.0
"""Rotations by position: rotary embeddings of queries and keys (arXiv 2104.09864), and VAPOR, the
rotation of values before a scan and back after it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _core, _rotary_ops
from . import _reference_rotary as reference
from ._checks import (
    Backend,
    check_backend,
    check_by_core,
    check_flags,
    check_rank,
    check_tensors,
    check_type,
)


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
    base: float | None = None,
    rates: Tensor | None = None,
    dim: int | None = None,
    interleaved: bool = False,
    inverse: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Rotates pair i of the last dimension by the angle position * rates[i].

    The rotary embedding of queries and keys (arXiv 2104.09864, section 3.2.2). A rotation of values
    before a scan and its inverse afterwards (VAPOR) is y_t = R^-t sum_s p(s|t) R^s v_s.

    Args:
        x: (B,H,T,D). float32, bfloat16, float16 or float64. Any strides are accepted.
        position: (T,) or (B,T) int64, negative ones too.
        base: rates[i] = base^(-2i/dim), wave lengths from 2 pi to 2 pi base; None: 10,000.
        rates: (dim/2,) float32 or float64 instead of a base, for scaled frequencies.
        dim: how many of the D channels are rotated, an even number; None: all.
        interleaved: whether a pair is two neighbours, (2i, 2i+1), or (i, i + dim/2).
        inverse: rotate back.
        backend: None chooses by device; "cpu", "cuda", or "reference" (plain torch).

    Returns:
        (B,H,T,D) in x's dtype and order of memory, computed in float32 (float64 for float64
        inputs) by angles in float64. Gradients reach x.

    Raises:
        ValueError: shapes, values or combinations.
        TypeError: dtypes.
        RuntimeError: devices, or rates that require grad while grad mode is on.
    """
    if backend is None and (base is None or rates is None):
        y: Tensor | None = _rotary_ops.rotate_direct(
            x, position, rates, 10000.0 if base is None else base, dim, interleaved, inverse
        )
        if y is not None:
            return y
    op = "rotate"
    check_tensors(op, {"x": x, "position": position}, rates=rates, pointwise=True)
    check_flags(op, interleaved=interleaved, inverse=inverse)
    check_backend(op, "x", x, backend)
    if base is None:
        base = 10000.0
    elif rates is not None:
        raise ValueError(f"[{op}] got base and rates, expected one of them")
    elif not isinstance(base, (int, float)):
        raise TypeError(f"[{op}] base is a {type(base).__name__}, expected a float")
    if dim is not None:
        check_type(op, "dim", dim, int)
    if backend == "reference":
        check_rank(op, 4, x=x)
        whole = x.shape[3] if dim is None else dim
        check_by_core(lambda _: _core.rotate_check(x, position, rates, base, whole), None)
        return reference.rotate(
            x, position, base=base, rates=rates, dim=dim, interleaved=interleaved, inverse=inverse
        )
    return _rotary_ops.rotate(  # type: ignore[no-any-return]
        x, position, rates, base, dim, interleaved, inverse
    )
