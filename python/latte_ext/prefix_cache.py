# SPDX-License-Identifier: Apache-2.0
"""`PrefixCache`: states of token prefixes that were read before, in memory and on disk."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
import warnings
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import storage
from ._checks import check_integers, check_type

_SUFFIX = ".latte"


class PrefixCache:
    """The states after prefixes of whole blocks, found again by their tokens.

    In memory the least recently used ones go first. A directory keeps all that was put into it,
    also for other processes: files are replaced as a whole, and one that is damaged is removed with
    a warning. Safe to use from several threads.

    Args:
        block: tokens per block: a prefix of 0, block, 2 block, ... tokens can be found.
        max_bytes: of the states in memory; a larger state is kept on disk only.
        directory: made if it is not there; None: memory only.
        model: what the states belong to, such as the name and version of the weights. Caches that
            share a directory find each other's states if, and only if, it is the same.

    Raises:
        ValueError: block < 1 or max_bytes < 0.
    """

    def __init__(
        self,
        block: int = 64,
        *,
        max_bytes: int = 1 << 30,
        directory: str | os.PathLike[str] | None = None,
        model: str = "",
    ) -> None:
        check_integers("PrefixCache", block=block, max_bytes=max_bytes)
        check_type("PrefixCache", "model", model, str)
        if block < 1 or max_bytes < 0:
            raise ValueError(
                f"[PrefixCache] block is {block} and max_bytes {max_bytes}, expected block >= 1 "
                "and max_bytes >= 0"
            )
        self.block, self.max_bytes, self.model = block, max_bytes, model
        self.directory = None if directory is None else Path(directory)
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._entries: OrderedDict[str, Any] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The number of states in memory."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Memory of the states in bytes."""
        return self._nbytes

    def put(self, tokens: Sequence[int] | Tensor, state: Any) -> None:
        """Keep a copy of the state after these tokens.

        Args:
            tokens: (T,) integers, T a multiple of `block`.
            state: what `latte_ext.storage.to_bytes` takes, of one sequence.

        Raises:
            ValueError: T is not a multiple of block.
            TypeError: another state.
            OSError: the directory cannot be written to.
        """
        ids = _ids("[PrefixCache.put]", tokens)
        if len(ids) % self.block:
            raise ValueError(
                f"[PrefixCache.put] tokens has length {len(ids)}, expected a multiple of "
                f"block = {self.block}"
            )
        storage._check_storable("[PrefixCache.put]", state)
        key = list(self._keys(ids))[-1]
        if self.directory is not None:
            self._write(
                self.directory, key, storage.to_bytes([torch.tensor(ids, dtype=torch.int64), state])
            )
        self._remember(key, _copied(state))

    def get(self, tokens: Sequence[int] | Tensor) -> tuple[int, Any]:
        """The longest stored prefix of the tokens (T,): how many tokens, and a copy of the state.

        (0, None) if there is none. A state from the directory is on the CPU.
        """
        ids = _ids("[PrefixCache.get]", tokens)
        keys = list(self._keys(ids))
        for count in range(len(keys) - 1, -1, -1):
            prefix = ids[: count * self.block]
            state = self._find(keys[count], prefix)
            if state is not None:
                return len(prefix), _copied(state)
        return 0, None

    def read(self, model: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        """`model.prefill(tokens)` from the longest stored prefix on.

        The state after the last whole block before the last token is stored.

        Args:
            model: an `nn.LatteLM`, or what has its `prefill`.
            tokens: (1,T), T >= 1.

        Returns:
            logits (1,V) of the token after the last, and the cache.
        """
        check_type("PrefixCache.read", "tokens", tokens, Tensor)
        if tokens.dim() != 2 or tokens.shape[0] != 1 or not tokens.shape[1]:
            raise ValueError(
                f"[PrefixCache.read] tokens has shape {tuple(tokens.shape)}, expected (1, T) "
                "with T >= 1"
            )
        row = tokens[0]
        # The last token is always read, for its logits.
        border = (row.shape[0] - 1) // self.block * self.block
        start, cache = self.get(row[:border])
        cache = _map(lambda x: x.to(tokens.device), cache)
        if start < border:
            _, cache = model.prefill(tokens[:, start:border], cache)
            self.put(row[:border], cache)
        logits, cache = model.prefill(tokens[:, border:], cache)
        return logits, cache

    def clear(self) -> None:
        """Forget the states in memory; the directory stays."""
        with self._lock:
            self._entries.clear()
            self._nbytes = 0

    def _keys(self, ids: array[int]) -> Iterator[str]:
        """A key for each prefix of 0, block, 2 block, ... tokens."""
        digest = hashlib.sha256(f"{self.block}:{self.model}\0".encode())
        yield digest.hexdigest()
        for start in range(0, len(ids) - self.block + 1, self.block):
            digest.update(_little_endian(ids[start : start + self.block]))
            yield digest.copy().hexdigest()

    def _find(self, key: str, ids: array[int]) -> Any:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        if self.directory is None:
            return None
        state = _load(self.directory / (key + _SUFFIX), ids)
        if state is not None:
            self._remember(key, state)
        return state

    def _remember(self, key: str, state: Any) -> None:
        size = _size(state)
        with self._lock:
            self._forget(key)
            if size > self.max_bytes:
                return
            self._entries[key] = state
            self._nbytes += size
            while self._nbytes > self.max_bytes:
                self._forget(next(iter(self._entries)))

    def _forget(self, key: str) -> None:
        if key in self._entries:
            self._nbytes -= _size(self._entries.pop(key))

    @staticmethod
    def _write(directory: Path, key: str, data: bytes) -> None:
        """All of the file or nothing, whatever other processes do."""
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=directory)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, directory / (key + _SUFFIX))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def _load(path: Path, ids: array[int]) -> Any:
    """The state of a file of the tokens `ids`; a damaged file is removed, with a warning."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        stored = storage.from_bytes(data)
        if not isinstance(stored, list) or len(stored) != 2:
            raise ValueError("expected tokens and a state")
        tokens, state = stored
        if not isinstance(tokens, Tensor) or tokens.tolist() != ids.tolist():
            raise ValueError("the tokens are not those of its name")
    except ValueError as error:
        warnings.warn(f"[PrefixCache] removed {path.name}: {error}", RuntimeWarning, stacklevel=4)
        path.unlink(missing_ok=True)
        return None
    return state


def _ids(op: str, tokens: Sequence[int] | Tensor) -> array[int]:
    """Tokens as int64 numbers."""
    if isinstance(tokens, Tensor):
        if tokens.dim() != 1 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(
                f"{op} tokens is a tensor of {tokens.dtype} with shape {tuple(tokens.shape)}, "
                "expected (T,) integers"
            )
        tokens = tokens.tolist()
    try:
        ids = array("q", tokens)
    except (TypeError, OverflowError) as error:
        raise TypeError(f"{op} tokens is not a sequence of integers ({error})") from None
    return ids


def _little_endian(ids: array[int]) -> bytes:
    if sys.byteorder == "big":
        ids = ids[:]
        ids.byteswap()
    return ids.tobytes()


def _map(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    return pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, state)


def _copied(state: Any) -> Any:
    return _map(lambda x: x.detach().clone(), state)


def _size(state: Any) -> int:
    return sum(x.nbytes for x in pytree.tree_leaves(state) if isinstance(x, Tensor))
