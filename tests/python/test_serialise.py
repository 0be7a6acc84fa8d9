# SPDX-License-Identifier: Apache-2.0
"""States and caches as bytes: T4, bit for bit, and every damage is noticed."""

import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latte_ext import LatentState, WindowCache
from latte_ext import _serialise as serialise


def make_state(dtype: torch.dtype = torch.float32, batch: int = 2) -> LatentState:
    shape = (batch, 3, 5, 4)
    return LatentState(*(torch.randn(shape[:n], dtype=dtype) for n in (3, 3, 4)))


def make_cache(dtype: torch.dtype = torch.float32) -> WindowCache:
    return WindowCache(
        torch.randn(2, 3, 7, 4).to(dtype), torch.randn(2, 3, 7, 5).to(dtype),
        torch.rand(2, 7) < 0.5, torch.tensor([3, 2**40]),
    )  # fmt: skip


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert serialise._bytes_of(got) == serialise._bytes_of(want.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_state_comes_back_bit_for_bit(dtype: torch.dtype, batch: int) -> None:
    state = make_state(dtype, batch)
    if batch:
        state.max[0, 0] = torch.tensor([-torch.inf, torch.nan, -0.0, 1e-45, torch.inf])
    back = LatentState.from_bytes(state.to_bytes())
    for got, want in zip(back, state, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_window_cache_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    cache = make_cache(dtype)
    for got, want in zip(WindowCache.from_bytes(cache.to_bytes()), cache, strict=True):
        assert_same_bits(got, want)


def test_strides_and_gradients_do_not_matter() -> None:
    state = make_state()
    turned = LatentState(state.max, state.norm.requires_grad_(), state.mean.mT.contiguous().mT)
    assert turned.to_bytes() == state.to_bytes()
    assert not any(x.requires_grad for x in LatentState.from_bytes(turned.to_bytes()))


def test_format_is_fixed() -> None:
    """Version 1 as documented, so that a later version can read it."""
    state = LatentState(torch.ones(1, 1, 1), torch.ones(1, 1, 1) * 2, torch.ones(1, 1, 1, 1) * 3)
    header = b"\x93latte\r\n" + struct.pack("<HB", 1, 11) + b"LatentState" + b"\x03"
    header += struct.pack("<BB3Q", 1, 3, 1, 1, 1) * 2 + struct.pack("<BB4Q", 1, 4, 1, 1, 1, 1)
    payload = struct.pack("<3f", 1, 2, 3)
    checksums = (struct.pack("<I", zlib.crc32(part)) for part in (header, payload))
    assert state.to_bytes() == header + next(checksums) + payload + next(checksums)


def test_other_byte_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialise.sys, "byteorder", "big")
    assert serialise._swapped(b"abcdefgh", 4) == b"dcbahgfe"
    assert serialise._swapped(b"ab", 1) == b"ab"


@pytest.mark.parametrize("data", [make_state().to_bytes(), make_cache().to_bytes()])
def test_every_truncation_and_extension_raises(data: bytes) -> None:
    kind = LatentState if b"LatentState" in data else WindowCache
    for length in range(len(data)):
        with pytest.raises(ValueError, match=rf"^\[{kind.__name__}.from_bytes\] data "):
            kind.from_bytes(data[:length])
    with pytest.raises(ValueError, match="bytes after the header"):
        kind.from_bytes(data + b"\0")


def test_every_bit_flip_raises() -> None:
    data = make_state(batch=1).to_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"^\[LatentState.from_bytes\] data "):
            LatentState.from_bytes(damaged)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_raise(noise: bytes, begins_well: bool) -> None:
    data = serialise._MAGIC + b"\x01\x00\x0bLatentState" + noise if begins_well else noise
    with pytest.raises(ValueError, match=r"^\[LatentState.from_bytes\] "):
        LatentState.from_bytes(data)


@pytest.mark.parametrize("sizes", [(2**63, 2**63, 2**63), (2**40, 1, 1), (0, 2**62, 5)])
def test_sizes_that_the_data_does_not_have(sizes: tuple[int, ...]) -> None:
    """Correctly signed, absurdly large: refused without the memory for it."""
    header = serialise._MAGIC + struct.pack("<HB", 1, 11) + b"LatentState" + b"\x03"
    for more in ((), (), (4,)):
        header += struct.pack(f"<BB{3 + len(more)}Q", 1, 3 + len(more), *sizes, *more)
    data = header + struct.pack("<I", zlib.crc32(header)) + struct.pack("<I", zlib.crc32(b""))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^\[LatentState"):
        LatentState.from_bytes(data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_another_kind_version_or_type() -> None:
    with pytest.raises(ValueError, match="holds a b'WindowCache', expected b'LatentState'"):
        LatentState.from_bytes(make_cache().to_bytes())
    data = bytearray(make_state().to_bytes())
    data[8] = 2
    with pytest.raises(ValueError, match="version 2, expected 1"):
        LatentState.from_bytes(data)
    with pytest.raises(TypeError, match="data is a str, expected bytes"):
        LatentState.from_bytes("text")  # type: ignore[arg-type]
    state = make_state()
    two = serialise.pack("LatentState", (state.max, state.norm))
    with pytest.raises(ValueError, match="holds 2 tensors, expected 3"):
        LatentState.from_bytes(two)
    with pytest.raises(ValueError, match="holds 2 tensors, expected 4"):
        WindowCache.from_bytes(serialise.pack("WindowCache", (state.max, state.norm)))
