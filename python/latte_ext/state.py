# SPDX-License-Identifier: Apache-2.0
"""`LatentState`: everything a latent attention layer remembers about the tokens it has seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _ops, reference
from ._autograd import is_differentiated
from ._checks import check_dense, check_integers
from ._device import on_device
from ._drafts import Accepted, LatentDraft, check_draft, commit_latents, count_accepted
from ._select import Index, concat_states, scatter_states, select
from ._serialise import pack, unpack
from .reference import StateTensors

_FIELDS = ("max", "norm", "mean")


class LatentState:
    """The state of N sequences: a fixed number of values, whatever the number of tokens.

    For the tokens of one sequence and per key/value head and latent:

        max  (N,Hk,L)    the largest key logit         -inf if there is no token
        norm (N,Hk,L)    sum of exp(k - max)           0 if there is no token
        mean (N,Hk,L,D)  sum of p(s|l) v[s]            0 if there is no token

    (Source: the running softmax of arXiv 2402.17512, kept as a mean so that states can be merged.)
    Gradients flow through norm and mean; max is a constant reference point. A state is a pytree
    node: it passes through torch.compile, torch.export and torch.func, and unpacks into its
    tensors.

    Args:
        max: (N,Hk,L) float32 or float64, kept without a copy, as are the others. N >= 0; Hk, L and
            D >= 1.
        norm: (N,Hk,L), of the same dtype and device.
        mean: (N,Hk,L,D), of the same dtype and device.

    Raises:
        TypeError: not tensors, or dtypes other than float32 or float64 or not all the same.
        ValueError: shapes that do not fit together.
        RuntimeError: tensors on different devices.
    """

    max: Tensor
    norm: Tensor
    mean: Tensor

    def __init__(self, max: Tensor, norm: Tensor, mean: Tensor) -> None:
        self.max, self.norm, self.mean = max, norm, mean
        self._check("LatentState")

    def _check(self, op: str, prefix: str = "") -> None:
        """Raises as the constructor, in the name of `op`, for tensors that were replaced since."""
        _check(op, prefix, {"max": self.max, "norm": self.norm}, self.mean)

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        latents: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> LatentState:
        """The state of `batch` >= 0 sequences without tokens; the other sizes are >= 1."""
        check_integers("LatentState.empty", batch=batch, heads=heads, latents=latents, dim=dim)
        if batch < 0 or min(heads, latents, dim) < 1:
            raise ValueError(
                f"[LatentState.empty] sizes are {(batch, heads, latents, dim)}, "
                "expected batch >= 0 and heads, latents, dim >= 1"
            )
        target = None if device is None else torch.device(device)
        return cls(*reference.empty_state(batch, heads, latents, dim, device=target, dtype=dtype))

    @classmethod
    def from_lse(cls, lse: Tensor, mean: Tensor) -> LatentState:
        """The state with log-normalisers lse (N,Hk,L) and mean (N,Hk,L,D); differentiable.

        It has norm 1 and acts as one token with a value per latent; lse = -inf is an unused latent.
        """
        _check("LatentState.from_lse", "", {"lse": lse}, mean)
        # The clone keeps a later step, which updates max in place, away from lse.
        return cls(*reference.token_state(lse.clone(), mean))

    @property
    def lse(self) -> Tensor:
        """log of the sum of exp(k) per latent (N,Hk,L), -inf if there is no token."""
        unused = self.norm == 0
        lse = self.max.detach() + torch.where(unused, 1, self.norm).log()
        return torch.where(unused, -torch.inf, lse)

    @property
    def batch(self) -> int:
        """N, the number of sequences."""
        return self.mean.shape[0]

    @property
    def heads(self) -> int:
        """Hk, the number of key/value heads."""
        return self.mean.shape[1]

    @property
    def latents(self) -> int:
        """L, the number of latents per head."""
        return self.mean.shape[2]

    @property
    def dim(self) -> int:
        """D, the number of value channels per head."""
        return self.mean.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.mean.dtype

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def nbytes(self) -> int:
        """Memory of the three tensors in bytes, (2 + D) N Hk L values."""
        return sum(x.numel() * x.element_size() for x in self)

    def tensors(self) -> StateTensors:
        """(max, norm, mean), as `latte_ext.reference` takes them."""
        return self.max, self.norm, self.mean

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors())

    def merge(self, other: LatentState) -> LatentState:
        """The state of the tokens of both, in either order, in new tensors; differentiable.

        Raises:
            TypeError: other is not a LatentState, or has another dtype.
            ValueError: other has another shape.
            RuntimeError: other is on another device.
        """
        op = "[LatentState.merge]"
        if not isinstance(other, LatentState):
            raise TypeError(f"{op} other is a {type(other).__name__}, expected a LatentState")
        if other.mean.shape != self.mean.shape:
            got, expected = tuple(other.mean.shape), tuple(self.mean.shape)
            raise ValueError(f"{op} other.mean has shape {got}, expected {expected}")
        if other.dtype != self.dtype:
            raise TypeError(f"{op} other has dtype {other.dtype}, expected {self.dtype}")
        if other.device != self.device:
            raise RuntimeError(f"{op} other is on {other.device}, expected {self.device}")
        if _can_merge_by_kernel(self, other):
            return LatentState(*_ops.state_merge(*self, *other))
        return LatentState(*reference.merge(self.tensors(), other.tensors()))

    @torch.no_grad()
    def commit(self, draft: LatentDraft, accepted: Accepted) -> None:
        """The first tokens of a draft enter the state, in place; bit for bit as by steps (T6).

        Args:
            draft: of `latent_attention_draft` on this state or a copy of it.
            accepted: (N,) integers, how many of the w tokens each sequence keeps, from 0 to w.

        Raises:
            ValueError: a draft of other shapes, accepted out of range.
            TypeError: types.
        """
        op = "[LatentState.commit]"
        self.check_draft(op, draft)
        counts, most = count_accepted(op, accepted, self.batch, draft.k.shape[2], self.device)
        commit_latents(self.tensors(), draft, counts, most)

    def check_draft(self, op: str, draft: object) -> int:
        """w of a draft of this state; raises, in the name of `op`, for anything else."""
        return check_draft(op, draft, LatentDraft, self.mean, self.latents, self.dim)

    def select(self, index: Index) -> LatentState:
        """The states of some sequences, in new tensors, repeats allowed (beam search).

        Args:
            index: positions in [-N, N) as a sequence or a 1-D integer tensor, or an (N,) bool mask.

        Raises:
            TypeError: index is neither integer nor bool.
            ValueError: index is not 1-D, out of range, or a mask of another length. (Tensors on an
                accelerator are range-checked by the device, which reports it in its own way.)
        """
        return LatentState(*select("[LatentState.select]", self.tensors(), index))

    concat = classmethod(concat_states)
    scatter = scatter_states

    def clone(self) -> LatentState:
        """A copy with memory of its own; differentiable."""
        return LatentState(self.max.clone(), self.norm.clone(), self.mean.clone())

    def detach(self) -> LatentState:
        """The same memory, cut from the autograd graph."""
        return LatentState(self.max.detach(), self.norm.detach(), self.mean.detach())

    def to(self, device: torch.device | str) -> LatentState:
        """The state on device; shares memory if it is there already. Differentiable."""
        return LatentState(self.max.to(device), self.norm.to(device), self.mean.to(device))

    def to_bytes(self) -> bytes:
        """The state in a portable form: versioned, checksummed, the same bytes on every machine."""
        return pack("LatentState", self.tensors())

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> LatentState:
        """What `to_bytes` saved, bit for bit (T4), on the CPU.

        Runs no code of the data and takes no more memory than `data` does.

        Raises:
            TypeError: data is not bytes.
            ValueError: truncated, damaged, of another kind or version, or not a state's shapes.
        """
        op = "[LatentState.from_bytes]"
        tensors = unpack(op, "LatentState", data)
        if len(tensors) != 3:
            raise ValueError(f"{op} data holds {len(tensors)} tensors, expected 3")
        return cls(*tensors)

    def __repr__(self) -> str:
        return (
            f"LatentState(batch={self.batch}, heads={self.heads}, latents={self.latents}, "
            f"dim={self.dim}, dtype={self.dtype}, device='{self.device}')"
        )


def _can_merge_by_kernel(a: LatentState, b: LatentState) -> bool:
    """On a device, in one launch, where nothing is differentiated or transformed: torch's dozen
    operations can be, to any order."""
    return (
        on_device(a.mean)
        and not is_differentiated(*a, *b)
        and torch.autograd.forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def _check(op: str, prefix: str, logits: dict[str, Tensor], mean: Tensor) -> None:
    """Holds mean, and every named tensor of logits, to the shapes of a state."""
    for name, x in {**logits, "mean": mean}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"[{op}] {prefix}{name} is a {type(x).__name__}, expected a Tensor")
        check_dense(op, prefix + name, x)
    if mean.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"[{op}] {prefix}mean has dtype {mean.dtype}, expected float32 or float64")
    if mean.dim() != 4 or 0 in mean.shape[1:]:
        raise ValueError(
            f"[{op}] {prefix}mean has shape {tuple(mean.shape)}, expected (N, Hk, L, D) with "
            "Hk, L, D >= 1"
        )
    for name, x in logits.items():
        label = f"[{op}] {prefix}{name}"
        if x.dtype != mean.dtype:
            raise TypeError(f"{label} has dtype {x.dtype}, expected {mean.dtype} as mean")
        if x.shape != mean.shape[:3]:
            raise ValueError(
                f"{label} has shape {tuple(x.shape)}, expected {tuple(mean.shape[:3])}: (N, Hk, L)"
            )
        if x.device != mean.device:
            raise RuntimeError(f"{label} is on {x.device}, expected {mean.device} as mean")


def _flatten(state: LatentState) -> tuple[list[Any], None]:
    return [state.max, state.norm, state.mean], None


def _flatten_with_keys(state: LatentState) -> tuple[list[tuple[pytree.KeyEntry, Any]], None]:
    return [(pytree.GetAttrKey(name), getattr(state, name)) for name in _FIELDS], None


def unchecked_state(leaves: Iterable[Any], context: None = None) -> LatentState:
    """A state of what transformations put where tensors were (specs, None), or of an operator's
    results."""
    state = object.__new__(LatentState)
    state.max, state.norm, state.mean = leaves
    return state


pytree.register_pytree_node(
    LatentState,
    _flatten,
    unchecked_state,
    serialized_type_name="latte_ext.LatentState",
    flatten_with_keys_fn=_flatten_with_keys,
)
# Plain data: lets torch.load and torch.export.load read states without arbitrary unpickling.
torch.serialization.add_safe_globals([LatentState])
