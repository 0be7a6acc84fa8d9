# SPDX-License-Identifier: Apache-2.0
"""PrefixCache: what is found, what is forgotten, files of other processes and damaged ones."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import latte_ext
import pytest
import torch
from latte_ext import LatentState, PrefixCache
from latte_ext.nn import VARIANTS, LatteConfig, LatteLM
from torch import Tensor
from torch.utils._pytree import tree_leaves


def state(value: float = 0.0) -> LatentState:
    made = LatentState.empty(1, 1, 4, 2)
    made.mean.fill_(value)
    return made


def language_model(variant: str, num_layers: int = 2) -> LatteLM:
    sizes = {"vocab_size": 32, "embed_dim": 16, "num_layers": num_layers, "num_heads": 4}
    if variant != "softmax":
        sizes["num_latents"] = 5
    if "window" in VARIANTS[variant]:
        sizes["window"] = 6
    return LatteLM(LatteConfig.named(variant, **sizes), dtype=torch.float64).eval()


def test_the_longest_prefix_is_found() -> None:
    cache = PrefixCache(block=2)
    assert cache.get([1, 2, 3]) == (0, None)
    cache.put([1, 2], state(2))
    cache.put([1, 2, 3, 4], state(4))
    for tokens, count in [
        ([1, 2, 3, 4, 5, 6, 7], 4), ([1, 2, 3, 4], 4), ([1, 2, 3, 5], 2), ([1, 2, 3], 2),
        ([1], 0), ([2, 1], 0), ([], 0), ([1, 3, 3, 4], 0),
    ]:  # fmt: skip
        got, found = cache.get(torch.tensor(tokens, dtype=torch.int32))
        assert got == count
        assert (found is None) == (count == 0)
        assert found is None or (found.mean == count).all()


def test_states_are_copies() -> None:
    cache, mine = PrefixCache(block=1), state(1)
    cache.put([7], mine)
    mine.mean.zero_()
    cache.get([7])[1].mean.zero_()
    assert (cache.get([7])[1].mean == 1).all()


def test_the_least_recently_used_goes_first() -> None:
    size = state().nbytes
    cache = PrefixCache(block=1, max_bytes=2 * size)
    cache.put([1], state(1))
    cache.put([2], state(2))
    cache.get([1])
    cache.put([3], state(3))
    assert [cache.get([n])[0] for n in (1, 2, 3)] == [1, 0, 1]
    assert (len(cache), cache.nbytes) == (2, 2 * size)
    cache.put([3], state(4))
    assert (cache.get([3])[1].mean == 4).all()
    assert cache.nbytes == 2 * size
    cache.put([5], LatentState.empty(3, 1, 4, 2))
    assert cache.get([5]) == (0, None)
    cache.clear()
    assert (len(cache), cache.nbytes, cache.get([1])) == (0, 0, (0, None))


def test_a_directory_outlives_the_cache(tmp_path: Path) -> None:
    first = PrefixCache(block=2, max_bytes=0, directory=tmp_path / "states", model="a")
    first.put([1, 2], state(1))
    assert len(first) == 0
    for model, block, count in (("a", 2, 2), ("b", 2, 0), ("a", 1, 0)):
        again = PrefixCache(block=block, directory=tmp_path / "states", model=model)
        assert again.get([1, 2])[0] == count
    assert [path.suffix for path in (tmp_path / "states").iterdir()] == [".latte"]


@pytest.mark.parametrize("damage", ["short", "flipped", "other tokens", "no state"])
def test_a_damaged_file_is_removed(tmp_path: Path, damage: str) -> None:
    cache = PrefixCache(block=1, directory=tmp_path)
    cache.put([1], state())
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "short":
        del data[-1]
    elif damage == "flipped":
        data[len(data) // 2] ^= 4
    elif damage == "other tokens":
        data = latte_ext.storage.to_bytes([torch.tensor([2]), state()])
    else:
        data = latte_ext.storage.to_bytes(state())
    path.write_bytes(data)
    cache.clear()
    with pytest.warns(RuntimeWarning, match=r"^\[PrefixCache\] removed .*\.latte: "):
        assert cache.get([1]) == (0, None)
    assert list(tmp_path.iterdir()) == []
    assert cache.get([1]) == (0, None)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space")

    cache = PrefixCache(block=1, directory=tmp_path)
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        cache.put([1], state())
    assert list(tmp_path.iterdir()) == []


# Two of them at once write and read the state after one token, each with values of its own.
WORKER = """
import sys, threading, warnings
from latte_ext import LatentState, PrefixCache
warnings.simplefilter("error")
failures = []
def work(value):
    cache = PrefixCache(block=1, max_bytes=0, directory=sys.argv[1])
    state = LatentState.empty(1, 1, 4, 2)
    state.mean.fill_(value)
    try:
        for _ in range(100):
            cache.put([1], state)
            count, found = cache.get([1])
            assert count == 1 and found.mean.unique().shape == (1,)
    except BaseException as error:
        failures.append(error)
threads = [threading.Thread(target=work, args=(int(sys.argv[2]) + i,)) for i in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
sys.exit(repr(failures) if failures else 0)
"""


def test_processes_and_threads_share_a_directory(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), first], stderr=subprocess.PIPE, text=True
        )
        for first in ("1", "3")
    ]
    for process in processes:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".latte"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_from_a_prefix_is_reading_all(variant: str, tmp_path: Path) -> None:
    model, cache = language_model(variant), PrefixCache(block=8, directory=tmp_path)
    shared = torch.randint(32, (1, 20))
    for tail in (1, 4, 5, 13):
        tokens = torch.cat([shared, torch.randint(32, (1, tail))], 1)
        logits, after = cache.read(model, tokens)
        wanted, whole = model.prefill(tokens)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)
        for got, want in zip(tree_leaves(after), tree_leaves(whole), strict=True):
            if want is not None:
                torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    again = PrefixCache(block=8, directory=tmp_path)
    assert again.get(shared[0])[0] == 16


class Counting:
    """A model that says how many tokens it has read."""

    def __init__(self) -> None:
        self.model, self.tokens = language_model("latte"), 0

    def prefill(self, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        self.tokens += tokens.shape[1]
        return self.model.prefill(tokens, cache)


def test_only_what_is_new_is_read() -> None:
    model, cache, tokens = Counting(), PrefixCache(block=8), torch.randint(32, (1, 21))
    cache.read(model, tokens)
    assert model.tokens == 21
    cache.read(model, tokens)
    assert model.tokens == 21 + 5


def test_documents_read_in_any_order_are_the_documents_in_sequence() -> None:
    """Latents of tokens that are read apart: those of an operator, and of a model's first layer."""
    k, v = torch.randn(1, 2, 30, 5, dtype=torch.float64), torch.randn(1, 2, 30, 4).double()
    _, whole = latte_ext.latent_attention(k, k, v, return_state=True)
    parts = [
        latte_ext.latent_attention(k[:, :, i], k[:, :, i], v[:, :, i], return_state=True)[1]
        for i in (slice(20, 30), slice(0, 11), slice(11, 20))
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)

    model, tokens = language_model("latte", num_layers=1), torch.randint(32, (1, 30))
    states = [model.prefill(x)[1][0].attention.latent for x in tokens.split(10, 1)]
    merged = states[2].merge(states[0]).merge(states[1])
    for got, want in zip(merged, model.prefill(tokens)[1][0].attention.latent, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PrefixCache(0), ValueError, "block is 0"),
        (lambda: PrefixCache(max_bytes=-1), ValueError, "max_bytes -1"),
        (lambda: PrefixCache(4.5), TypeError, "block is a float, expected an int"),  # type: ignore[arg-type]
        (lambda: PrefixCache().read(None, [1]), TypeError, "tokens is a list"),  # type: ignore[arg-type]
        (lambda: PrefixCache(2).put([1], state()), ValueError, "length 1, expected a multiple"),
        (lambda: PrefixCache(2).put([1, 2], {"a": 1}), TypeError, "state holds a dict"),
        (lambda: PrefixCache().get([0.5]), TypeError, "not a sequence of integers"),
        (lambda: PrefixCache().get(torch.zeros(1, 2).long()), TypeError, r"expected \(T,\)"),
        (lambda: PrefixCache().read(None, torch.zeros(2, 3).long()), ValueError, r"\(1, T\)"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^\[PrefixCache[.\w]*\] .*" + message):
        call()
