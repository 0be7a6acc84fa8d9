# SPDX-License-Identifier: Apache-2.0
"""Nested states as bytes and as safetensors: T4, and any damage raises."""

import json
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latte_ext import LatentState, MacchiatoState, storage
from latte_ext import _serialise as serialise
from latte_ext.nn import VARIANTS, LatteConfig, LatteLM
from torch.utils._pytree import tree_leaves, tree_structure


def model_cache(variant: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    sizes = {"vocab_size": 32, "embed_dim": 8, "num_layers": 2, "num_heads": 2}
    if variant != "softmax":
        sizes["num_latents"] = 3
    if "window" in VARIANTS[variant]:
        sizes["window"] = 3
    model = LatteLM(LatteConfig.named(variant, **sizes), dtype=dtype)
    return model.prefill(torch.randint(32, (2, 5)))[1]


def assert_same(got: object, want: object) -> None:
    assert tree_structure(got) == tree_structure(want)
    for x, y in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            assert serialise._bytes_of(x.contiguous()) == serialise._bytes_of(y.contiguous())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_caches_of_models_come_back(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    cache = model_cache(variant, dtype)
    assert_same(storage.from_bytes(storage.to_bytes(cache)), cache)
    pytest.importorskip("safetensors")
    storage.save_safetensors(cache, tmp_path / "cache.safetensors")
    assert_same(storage.load_safetensors(tmp_path / "cache.safetensors"), cache)


def test_bytes_need_no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which torch does not bring along."""
    cache = model_cache("latte-conv-swa++")
    expected = storage.to_bytes(cache)

    def absent(*_: object) -> None:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", absent)
    assert storage.to_bytes(cache) == expected
    assert_same(storage.from_bytes(expected), cache)


def test_decoding_goes_on_from_a_file() -> None:
    config = LatteConfig.named(
        "latte-rglru-swa++", vocab_size=32, embed_dim=8, num_layers=2, num_heads=2, num_latents=3,
        window=3,
    )  # fmt: skip
    model = LatteLM(config)
    logits, cache = model.prefill(torch.randint(32, (2, 9)))
    again = storage.from_bytes(storage.to_bytes(cache))
    for _ in range(3):
        token = logits.argmax(1)
        logits = model.step(token, cache)
        assert torch.equal(model.step(token, again), logits)


@pytest.mark.parametrize("parts", ["both", "latent", "window"])
def test_macchiato_states_come_back(parts: str) -> None:
    state = model_cache("latte-conv-swa++")[0].attention
    if parts == "latent":
        state = state._replace(window=None)
    elif parts == "window":
        state = state._replace(latent=None)
    assert_same(MacchiatoState.from_bytes(state.to_bytes()), state)
    with pytest.raises(ValueError, match=r"^\[MacchiatoState.from_bytes\] data holds a list"):
        MacchiatoState.from_bytes(storage.to_bytes([state]))


def signed(structure: Any, *tensors: torch.Tensor) -> bytes:
    """With correct checksums, whatever is in it."""
    return serialise.pack_tree(json.dumps(structure), tensors)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (signed("Tensor"), "fewer tensors"),
        (signed("Tensor", X, X), "more tensors"),
        (signed(["os.system", "Tensor"], X), "holds a 'os.system', expected one of"),
        (signed(["LatentState", "Tensor", "Tensor"], X, X), "has a LatentState of"),
        (signed(["LatentState", *["Tensor"] * 3], X, X, X), "mean has shape"),
        (signed(["LayerCache", "Tensor", "None"], X), "has a LayerCache of"),
        (signed(["RecurrentState", "Tensor", "Tensor"], X, X), r"\[RecurrentState\] h has shape"),
        (signed({"list": 1}), "expected one of"),
        (signed([]), "expected one of"),
        (signed(["list", 3]), "expected one of"),
        (serialise.pack_tree("[" * 100_000, []), "cannot be read"),
        (serialise.pack_tree("{", []), "cannot be read"),
        (LatentState.empty(1, 1, 1, 1).to_bytes(), "version 1, expected 2"),
    ],
)
def test_well_signed_nonsense_raises(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        storage.from_bytes(data)


def test_parts_of_other_batches_raise() -> None:
    one, two = (model_cache("latte-conv-swa++")[0].attention.select(i) for i in ([0], [0, 1]))
    mixed = storage.to_bytes(MacchiatoState(one.latent, two.window))
    with pytest.raises(ValueError, match="expected the same N for all"):
        storage.from_bytes(mixed)


def test_bools_are_true_or_false() -> None:
    """Whatever byte stands for them in well signed data."""
    x = torch.tensor([2, 0, 255], dtype=torch.uint8)
    data = signed("Tensor", x.view(torch.bool))
    assert torch.equal(storage.from_bytes(data).view(torch.uint8), torch.tensor([1, 0, 1]).byte())


def test_what_cannot_be_stored_raises() -> None:
    with pytest.raises(TypeError, match=r"^\[to_bytes\] state holds a dict, expected"):
        storage.to_bytes({"a": X})
    for x in (torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match=r"^\[to_bytes\] state holds a tensor of .*, expected"):
            storage.to_bytes(x)


def damaged(data: bytes, random: random.Random) -> bytes:
    """A truncation, bit flips, another number somewhere, or absurd sizes with right checksums."""
    how = random.randrange(5)
    changed = bytearray(data)
    if how == 0:
        return data[: random.randrange(len(data))]
    if how == 1:
        for _ in range(random.randint(1, 4)):
            changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif how == 2:
        at = random.randrange(len(data) - 8)
        changed[at : at + 8] = struct.pack("<Q", random.choice([0, 1, 2**31, 2**63, 2**64 - 1]))
    elif how == 3:
        return data + random.randbytes(random.randint(1, 9))
    else:
        end = random.randrange(16, 200)
        changed = changed[:end]
        changed[random.randrange(8, end)] = random.randrange(256)
        changed += struct.pack("<I", zlib.crc32(changed)) + struct.pack("<I", 0)
    return bytes(changed)


def message_of(read: Callable[[bytes], object], data: bytes) -> str | None:
    """Of the ValueError, if there is one."""
    try:
        read(data)
    except ValueError as error:
        return str(error)
    return None


def fuzz(count: int, seed: int) -> None:
    """ValueError with the name of the operation, whatever bytes are changed."""
    cases = random.Random(seed)
    data = storage.to_bytes(model_cache("latte-rglru-swa++"))
    single = LatentState.empty(1, 2, 3, 4).to_bytes()
    for case in range(count):
        source, read = (data, storage.from_bytes) if case % 2 else (single, LatentState.from_bytes)
        broken = damaged(source, cases)
        if broken != source:
            message = message_of(read, broken)
            assert message is not None, f"case {case} was read"
            assert message.startswith("[")


@pytest.mark.slow
def test_fuzz() -> None:
    fuzz(100_000, seed=0)


def test_fuzz_allocates_no_more_than_the_data() -> None:
    storage.from_bytes(storage.to_bytes(X))
    tracemalloc.start()
    fuzz(2000, seed=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_safetensors_that_are_not_ours_raise(tmp_path: Path) -> None:
    torch_files = pytest.importorskip("safetensors.torch")
    path = tmp_path / "file.safetensors"
    torch_files.save_file({"0": X}, path)
    with pytest.raises(ValueError, match=r"^\[load_safetensors\] .* holds no state"):
        storage.load_safetensors(path)
    storage.save_safetensors(X, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^\[load_safetensors\] .* is damaged"):
        storage.load_safetensors(path)
