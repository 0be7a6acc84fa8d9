# SPDX-License-Identifier: Apache-2.0
"""The demo on a tiny text: baselines, training, timings, files and exit code."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from latte_ext import demo
from latte_ext.nn import LatteLM


def small_model() -> LatteLM:
    return LatteLM(256, embed_dim=16, num_layers=1, num_heads=2, num_latents=4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "build_model", small_model)
    monkeypatch.setattr(demo, "CONTEXTS", (16, 32))
    monkeypatch.setattr(demo, "_milliseconds", lambda call, budget=0.0: float(call() is None) + 1.0)


def test_stdlib_files_are_sorted_sources_without_tests() -> None:
    files = demo.stdlib_files()
    assert len(files) > 100
    assert files == sorted(files)
    assert all(path.suffix == ".py" for path in files)
    assert not any({"test", "tests", "site-packages"} & set(path.parts[-3:]) for path in files)


def test_corpus_of_a_file_is_split_once(text: Path) -> None:
    train, held_out = demo.load_corpus(text)
    data = bytes(train.tolist()) + bytes(held_out.tolist())
    assert data == text.read_bytes()
    assert len(held_out) == len(data) - len(data) * 9 // 10


def test_short_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"too short")
    with pytest.raises(ValueError, match=r"\[demo\] got 8 training and 1 held-out bytes"):
        demo.load_corpus(path)


def test_unigram_of_equally_frequent_bytes() -> None:
    data = torch.tensor([0, 1, 2, 3] * 5000, dtype=torch.uint8)
    assert demo.unigram_bits(data, data) == pytest.approx(2.0, abs=0.02)


def test_trigram_against_its_definition() -> None:
    train = torch.tensor([1, 2, 3, 1, 2, 4, 1, 2, 3], dtype=torch.uint8)
    held_out = torch.tensor([1, 2, 3, 9], dtype=torch.uint8)
    a = demo.TRIGRAM_COUNT
    seen = (2 + a) / (3 + 256 * a)
    unseen = a / (1 + 256 * a)
    expected = -(math.log2(seen) + math.log2(unseen)) / 2
    assert demo.trigram_bits(train, held_out) == pytest.approx(expected, rel=1e-9)


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [demo.learning_rate(i / 100) for i in range(101)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == 0
    assert max(rates) <= demo.LEARNING_RATE


@pytest.mark.usefixtures("quick")
def test_table_lines_up() -> None:
    lines = demo.table(demo.timings((16, 32))).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines[1:]}) == 1


@pytest.mark.parametrize("faster", [1, 2])
def test_the_faster_thread_count_is_chosen(faster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def milliseconds(call: Callable[[], object], budget: float) -> float:
        return 1.0 if torch.get_num_threads() == faster else 2.0

    monkeypatch.setattr(demo, "_milliseconds", milliseconds)
    assert demo.faster_thread_count() == faster


@pytest.mark.usefixtures("quick")
def test_run_writes_results(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, before = tmp_path / "out", torch.get_num_threads()
    arguments = ["--minutes", "0.02", "--text", str(text), "--out", str(out), "--threads", "1"]
    assert demo.main(arguments) == 0
    assert torch.get_num_threads() == before
    result = json.loads((out / "demo.json").read_text())
    bits = result["bits_per_byte"]
    # 27 symbols: well below their entropy after a second or two of training.
    assert 0 < bits["model"] < bits["unigram"]
    assert result["threads"] == 1
    assert [row["context"] for row in result["timings"]] == [16, 32]
    assert (out / "demo.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "held out" in printed
    assert "sampled, token by token" in printed


@pytest.mark.usefixtures("quick")
def test_too_little_gain_on_the_default_corpus_fails(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = demo.load_corpus(text)
    monkeypatch.setattr(demo, "load_corpus", lambda text: corpus)
    monkeypatch.setattr(demo, "save_plot", lambda rows, path: False)
    assert demo.main(["--minutes", "0.001", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "no plot" in printed


@pytest.mark.parametrize("option", ["--minutes", "--threads"])
def test_options_have_to_be_positive(option: str) -> None:
    with pytest.raises(ValueError, match=r"\[demo\] got"):
        demo.main([option, "0"])
