# SPDX-License-Identifier: Apache-2.0
"""Tensors to bytes and back: little-endian, checked, never larger in memory than in the bytes.

Layout: 8 bytes of magic, version u16, length u8 and name of the kind, tensor count u8; per tensor
dtype u8, rank u8, sizes u64; CRC-32 of all of that; the elements of every tensor; CRC-32 of these.
Version 2, for nested states: length u32 and text of the structure, tensor count u32, then as 1.
"""

from __future__ import annotations

import ctypes
import math
import struct
import sys
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MAGIC = b"\x93latte\r\n"
_VERSION = 1
_TREE_VERSION = 2
_MAX_RANK = 8
# Part of the format: never renumber.
CODES = {
    torch.float32: 1,
    torch.float64: 2,
    torch.bfloat16: 3,
    torch.float16: 4,
    torch.int64: 5,
    torch.bool: 6,
    torch.int8: 7,
}
_DTYPES = {code: dtype for dtype, code in CODES.items()}


def pack(kind: str, tensors: Sequence[Tensor]) -> bytes:
    """The tensors' values, from whatever device, with `kind` as the name of what they are."""
    name = kind.encode()
    return _pack(struct.pack("<HB", _VERSION, len(name)) + name + bytes([len(tensors)]), tensors)


def pack_tree(structure: str, tensors: Sequence[Tensor]) -> bytes:
    """The same for any number of tensors, with a text that says how they belong together."""
    text = structure.encode()
    prefix = struct.pack("<HI", _TREE_VERSION, len(text)) + text
    return _pack(prefix + struct.pack("<I", len(tensors)), tensors)


def unpack(op: str, kind: str, data: bytes | bytearray | memoryview) -> list[Tensor]:
    """The tensors on the CPU.

    Raises:
        TypeError: data is not bytes.
        ValueError: truncated, damaged, of another kind or version, or trailing bytes.
    """
    reader = _open(op, data, _VERSION)
    name = reader.take(reader.numbers("<B", "kind")[0], "kind")
    if name != kind.encode():
        raise ValueError(f"{op} data holds a {name!r}, expected {kind.encode()!r}")
    return _tensors(reader, reader.numbers("<B", "tensor count")[0])


def unpack_tree(op: str, data: bytes | bytearray | memoryview) -> tuple[str, list[Tensor]]:
    """The text and the tensors of `pack_tree`; raises as `unpack`."""
    reader = _open(op, data, _TREE_VERSION)
    text = reader.take(reader.numbers("<I", "structure")[0], "structure")
    tensors = _tensors(reader, reader.numbers("<I", "tensor count")[0])
    try:
        return text.decode(), tensors
    except UnicodeDecodeError as error:
        raise ValueError(f"{op} data has a structure that is no text ({error})") from None


def _pack(prefix: bytes, tensors: Sequence[Tensor]) -> bytes:
    layouts, parts = [], []
    for x in tensors:
        layouts.append(struct.pack(f"<BB{x.dim()}Q", CODES[x.dtype], x.dim(), *x.shape))
        parts.append(_swapped(_bytes_of(x.detach().cpu().contiguous()), x.element_size()))
    header, payload = b"".join([_MAGIC, prefix, *layouts]), b"".join(parts)
    return header + _checksum(header) + payload + _checksum(payload)


def _open(op: str, data: bytes | bytearray | memoryview, version: int) -> _Reader:
    """Stands behind magic and version."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"{op} data is a {type(data).__name__}, expected bytes")
    reader = _Reader(op, bytes(data))
    magic = reader.take(len(_MAGIC), "magic")
    if magic != _MAGIC:
        raise ValueError(f"{op} data begins with {magic!r}, expected {_MAGIC!r}")
    (found,) = reader.numbers("<H", "version")
    if found != version:
        raise ValueError(f"{op} data has version {found}, expected {version}")
    return reader


def _tensors(reader: _Reader, count: int) -> list[Tensor]:
    """The layouts of `count` tensors, and then their elements."""
    layout = [_read_layout(reader) for _ in range(count)]
    reader.check(0, "header")
    begin = reader.at
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in layout]
    if sum(sizes) + 4 != reader.left:
        raise ValueError(
            f"{reader.op} data has {reader.left} bytes after the header, expected {sum(sizes) + 4}"
        )
    parts = [reader.take(size, "elements") for size in sizes]
    reader.check(begin, "elements")
    return [
        _tensor_of(_swapped(part, dtype.itemsize), dtype, shape)
        for part, (dtype, shape) in zip(parts, layout, strict=True)
    ]


class _Reader:
    """Takes bytes off the front, and says which part was missing."""

    def __init__(self, op: str, data: bytes) -> None:
        self.op, self.data, self.at = op, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise ValueError(f"{self.op} data ends within its {what}, at byte {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))

    def check(self, begin: int, what: str) -> None:
        """Hold the bytes since `begin` to the checksum that follows."""
        expected = _checksum(self.data[begin : self.at])
        if self.take(4, "checksum") != expected:
            raise ValueError(f"{self.op} data has a wrong checksum: its {what} are damaged")


def _read_layout(reader: _Reader) -> tuple[torch.dtype, tuple[int, ...]]:
    code, rank = reader.numbers("<BB", "dtype")
    if code not in _DTYPES:
        raise ValueError(f"{reader.op} data has dtype code {code}, expected one of {[*_DTYPES]}")
    shape = reader.numbers(f"<{rank}Q", "shape")
    # What torch can address, also where a size of zero leaves no elements.
    if rank > _MAX_RANK or math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise ValueError(f"{reader.op} data has shape {shape}, expected at most 2^60 elements")
    return _DTYPES[code], shape


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(data))


def _bytes_of(x: Tensor) -> bytes:
    # Not through numpy, which torch works without; string_at takes no more than 2^31 - 1 bytes.
    return bytes((ctypes.c_ubyte * x.nbytes).from_address(x.data_ptr())) if x.numel() else b""


def _tensor_of(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        # A bool of another bit pattern than 0 or 1 is neither true nor false.
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).ne(0).reshape(shape)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def _swapped(data: bytes, size: int) -> bytes:
    """Elements of `size` bytes from this machine's order to little-endian, or back."""
    if sys.byteorder == "little" or size == 1:
        return data
    out = bytearray(len(data))
    for i in range(size):
        out[i::size] = data[size - 1 - i :: size]
    return bytes(out)
