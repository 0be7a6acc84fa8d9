# SPDX-License-Identifier: Apache-2.0
"""What keeps part of a sequence away from operators that would take it for the whole.

Without torch.distributed, which `latte_ext.distributed` alone imports.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import Tensor

# By thread, the tokens of every rank in the sharded region that the thread is in.
_REGIONS: dict[int, tuple[int, ...]] = {}


@contextlib.contextmanager
def sharded(lengths: tuple[int, ...]) -> Iterator[None]:
    """Within, `check_whole` raises in this thread: sequences are sharded over ranks.

    Args:
        lengths: tokens of every rank, or () where they are not known.
    """
    with _region(lengths):
        yield


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Within, `check_whole` does not raise in this thread."""
    with _region(None):
        yield


def known_lengths() -> tuple[int, ...] | None:
    """Tokens of every rank, if this thread is in a sharded region that knows them."""
    return _REGIONS.get(threading.get_ident()) or None


def in_region() -> bool:
    """Whether this thread is in a sharded region."""
    # torch.compile guards on the empty dictionary and never traces what is behind it.
    return bool(_REGIONS) and threading.get_ident() in _REGIONS


def check_whole(op: str) -> None:
    """Raises RuntimeError in a sharded region, where the operator would see a part."""
    if in_region():
        raise RuntimeError(
            f"[{op}] got a call within a context-parallel model, whose sequences are sharded over "
            f"ranks, expected latte_ext.distributed.context_parallel({op}, group)"
        )


def check_plain(op: str, name: str, tensor: Tensor) -> None:
    """Raises RuntimeError for a DTensor, of which the operator would see a part."""
    # By name: the class is not imported, and torch.compile traces this.
    if type(tensor).__name__ == "DTensor":
        placements = getattr(tensor, "placements", ())
        raise RuntimeError(
            f"[{op}] {name} is a DTensor with placements {tuple(placements)}, expected a plain "
            "tensor: for shards of a sequence, to_local() of it and "
            f"latte_ext.distributed.context_parallel({op}, group)"
        )


@contextlib.contextmanager
def _region(lengths: tuple[int, ...] | None) -> Iterator[None]:
    thread = threading.get_ident()
    outer = _REGIONS.pop(thread, None)
    if lengths is not None:
        _REGIONS[thread] = lengths
    try:
        yield
    finally:
        _REGIONS.pop(thread, None)
        if outer is not None:
            _REGIONS[thread] = outer
