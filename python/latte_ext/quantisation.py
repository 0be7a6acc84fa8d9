# SPDX-License-Identifier: Apache-2.0
"""Idle states in a quarter or half of their memory, and what that costs in the output.

Storage only: a state is restored to its own dtype before anything is computed with it. max and norm
stay as they are, for they weigh tokens and are 2 of the 2 + D values; mean is scaled per latent.
Notation as in `functional`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import storage
from ._checks import check_scale, check_type
from .state import LatentState

Format = Literal["int8", "float16"]
_LARGEST_CODE = 127


class QuantisedState(NamedTuple):
    """A `LatentState` with mean = code scale: L (D + 12) bytes per head as int8, L (2 D + 12) as
    float16, instead of L (4 D + 8).

    Attributes:
        max: (N,Hk,L) float32 (float64 of a float64 state), as are norm and scale.
        norm: (N,Hk,L).
        code: (N,Hk,L,D) int8 or float16.
        scale: (N,Hk,L), what multiplies code.
    """

    max: Tensor
    norm: Tensor
    code: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of the tensors in bytes."""
        return sum(x.nbytes for x in self)

    def dequantise(self) -> LatentState:
        """The state in the dtype that it had."""
        mean = self.code.to(self.scale.dtype) * self.scale[..., None]
        # Rounded up, the dtype's largest number would be infinity.
        mean.clamp_(-torch.finfo(mean.dtype).max, torch.finfo(mean.dtype).max)
        return LatentState(self.max.clone(), self.norm.clone(), mean)


class QuantisationError(NamedTuple):
    """Of the outputs y: the largest error, its root mean square, and that over the one of y."""

    largest: float
    rms: float
    relative: float


def quantise(state: Any, format: Format = "int8") -> Any:
    """The state with its means rounded, or a tree of states with those of all `LatentState`s.

    "int8": a mean errs by at most max over D of |mean| / 254 per latent (symmetric, nearest).
    "float16": by at most 2^-11 of its own size, and never overflows: scales are powers of two.

    Args:
        state: a `LatentState`, or a pytree with some, such as the cache of `nn.LatteLM`; the
            rest of it is kept as it is, without a copy.

    Raises:
        ValueError: another format, or a mean that is not finite.
    """
    op = "[quantise]"
    if format not in get_args(Format):
        raise ValueError(f"{op} format is {format!r}, expected one of {get_args(Format)}")
    return _map(LatentState, lambda x: _quantised(op, x, format), state)


def dequantise(state: Any) -> Any:
    """The same tree with a `LatentState` for every `QuantisedState`."""
    return _map(QuantisedState, QuantisedState.dequantise, state)


@torch.no_grad()
def quantisation_error(
    state: LatentState, q: Tensor, format: Format = "int8", *, scale: float = 1.0
) -> QuantisationError:
    """What y = sum over l of p(l) mean_l errs by for queries q when the state is quantised.

    Args:
        state: N sequences, Hk heads.
        q: (N,H,T,L) logits of p(l), H a multiple of Hk.
        scale: multiplies q.

    Raises:
        ValueError: shapes, another format, or a mean that is not finite.
        TypeError: types.
    """
    op = "quantisation_error"
    check_type(op, "state", state, LatentState)
    check_type(op, "q", q, Tensor)
    check_scale(op, scale)
    n, heads, latents = state.max.shape
    if q.dim() != 4 or q.shape[0] != n or q.shape[3] != latents or q.shape[1] % heads:
        raise ValueError(
            f"[{op}] q has shape {tuple(q.shape)}, expected {(n, 'H', 'T', latents)} with H a "
            f"multiple of {heads}"
        )
    p = (q.double() * scale).softmax(3).unflatten(1, (heads, -1))
    rounded = quantise(state, format).dequantise().mean
    y, error = (
        torch.einsum("nhgtl,nhld->nhgtd", p, x)
        for x in (state.mean.double(), rounded.double() - state.mean.double())
    )
    rms, size = (x.square().mean().sqrt().item() if x.numel() else 0.0 for x in (error, y))
    largest = error.abs().max().item() if error.numel() else 0.0
    return QuantisationError(largest, rms, rms / size if size else 0.0)


def _quantised(op: str, state: LatentState, format: Format) -> QuantisedState:
    mean = state.mean.detach()
    largest = mean.abs().amax(3)
    if not bool(largest.isfinite().all()):
        raise ValueError(f"{op} state.mean holds infinity or NaN, expected finite numbers")
    if format == "int8":
        # Where the quotient underflows the codes are 0: less than the smallest normal number.
        scale = largest / _LARGEST_CODE
        code = (mean / torch.where(scale > 0, scale, 1)[..., None]).round()
        code = code.clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
    else:
        # The largest code is in [1, 2): 2^-14, the smallest normal number, is below its rounding.
        scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
        code = (mean / scale[..., None]).to(torch.float16)
    return QuantisedState(state.max.detach().clone(), state.norm.detach().clone(), code, scale)


def _map(kind: type, function: Any, state: Any) -> Any:
    return pytree.tree_map(
        lambda x: function(x) if isinstance(x, kind) else x,
        state,
        is_leaf=lambda x: isinstance(x, kind),
    )


def _checked(max: Tensor, norm: Tensor, code: Tensor, scale: Tensor) -> QuantisedState:
    """Of stored parts; `LatentState` checks the rest."""
    if code.dtype not in (torch.int8, torch.float16):
        raise TypeError(f"[QuantisedState] code has dtype {code.dtype}, expected int8 or float16")
    if scale.shape != code.shape[:3] or scale.dtype != max.dtype:
        raise ValueError(
            f"[QuantisedState] scale has shape {tuple(scale.shape)} and dtype {scale.dtype}, "
            f"expected {tuple(code.shape[:3])} and {max.dtype}"
        )
    state = QuantisedState(max, norm, code, scale)
    state.dequantise()
    return state


pytree._register_namedtuple(QuantisedState, serialized_type_name="latte_ext.QuantisedState")
torch.serialization.add_safe_globals([QuantisedState])
storage.register_kind(QuantisedState, *[("Tensor",)] * 4, build=_checked)
