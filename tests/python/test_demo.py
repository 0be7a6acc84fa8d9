# SPDX-License-Identifier: Apache-2.0
"""The demo on a tiny text: corpus, baselines, training, sample, timings, files, exit codes."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from latte_ext import _demo_text as text
from latte_ext import _demo_timing as timing
from latte_ext import demo
from latte_ext.nn import LatteConfig, LatteLM, load
from torch import Tensor

SENTENCE = b"the quick brown fox jumps over the lazy dog. "


def small_model(variant: str = "latte-conv++") -> LatteLM:
    return LatteLM(
        LatteConfig.named(
            variant, vocab_size=256, embed_dim=16, num_layers=1, num_heads=2, num_latents=4
        )
    )


def as_bytes(data: Tensor) -> bytes:
    return bytes(data.tolist())


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_bytes(SENTENCE * 100)
    return path


class Clock:
    """Stands in for the module `time`: each look takes a hundredth of a second."""

    def __init__(self) -> None:
        self.looks = 0

    def perf_counter(self) -> float:
        self.looks += 1
        return self.looks / 100


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model, short contexts, single calls, and as many steps on any machine."""
    monkeypatch.setattr(demo, "build_model", small_model)
    monkeypatch.setattr(demo, "time", Clock())
    monkeypatch.setattr(demo, "CONTEXTS", (32, 16, 64))
    monkeypatch.setattr(timing, "milliseconds", lambda call: float(call() is not None))
    torch.set_num_threads(1)


# Text and baselines


def test_the_default_files_are_sorted_sources_without_tests() -> None:
    files = text.standard_library_files()
    assert len(files) > 100
    assert files == sorted(files)
    assert {"argparse.py", "textwrap.py"} <= {path.name for path in files}
    assert all(path.suffix == ".py" for path in files)
    assert not any("site-packages" in path.parts or path.name.startswith("test") for path in files)


def test_every_tenth_default_file_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for i in range(25):
        files.append(tmp_path / f"{i:02}.py")
        files[-1].write_bytes(bytes([i]) * 10)
    monkeypatch.setattr(text, "standard_library_files", lambda: files)
    corpus = text.load_corpus(None, 8)
    assert as_bytes(corpus.held_out) == bytes([9] * 10 + [19] * 10)
    kept = [i for i in range(25) if i not in (9, 19)]
    assert as_bytes(corpus.train) == b"".join(bytes([i]) * 10 for i in kept)


def test_the_last_tenth_of_a_file_is_held_out(story: Path) -> None:
    corpus = text.load_corpus(story, 128)
    assert as_bytes(corpus.train) + as_bytes(corpus.held_out) == story.read_bytes()
    assert len(corpus.held_out) == len(story.read_bytes()) // 10
    assert corpus.source == str(story)


def test_a_short_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * 90)
    with pytest.raises(ValueError, match=r"\[demo\] .*got 81 .* 9 held out, expected at least 10"):
        text.load_corpus(path, 8)
    assert demo.main(["--text", str(path)]) == 2
    assert demo.main(["--text", str(tmp_path / "missing")]) == 2
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize(("length", "most", "count"), [(100, 50, 9), (100, 4, 4), (12, 4, 1)])
def test_windows_are_spread_and_do_not_overlap(length: int, most: int, count: int) -> None:
    starts = text.window_starts(torch.zeros(length, dtype=torch.uint8), 10, most)
    assert len(starts) == count
    assert starts[0] == text.CONTEXT
    assert (starts.diff() >= 10).all()
    assert starts[-1] + 10 <= length
    assert count == 1 or starts[-1] + 10 == length


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngram_bits_against_their_definition(order: int) -> None:
    train, held_out = b"abracadabra abracadabra", b"a cadabra abc"
    positions = range(2, len(held_out))
    expected = 0.0
    for i in positions:
        context = held_out[i - order + 1 : i]
        seen = [
            train[j] for j in range(order - 1, len(train)) if train[j - order + 1 : j] == context
        ]
        p = (seen.count(held_out[i]) + text.SMOOTHING) / (len(seen) + 256 * text.SMOOTHING)
        expected -= math.log2(p) / len(positions)
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (train, held_out)]
    got = text.ngram_bits(tensors[0], tensors[1], torch.tensor(list(positions)), order)
    assert got == pytest.approx(expected, rel=1e-9)


# Training and output


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [demo.learning_rate(i / 1000) for i in range(1001)]
    peak = rates.index(max(rates))
    assert peak == pytest.approx(1000 * demo.WARMUP, abs=1)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.usefixtures("quick")
def test_training_learns_and_reports(story: Path) -> None:
    corpus = text.load_corpus(story, demo.SEQUENCE)
    starts = text.window_starts(corpus.held_out, demo.SEQUENCE, 10)
    model, reports = demo.build_model(), []
    before = demo.evaluate(model, corpus.held_out, starts)
    result = demo.train(model, corpus.train, 1.505, lambda *report: reports.append(report))
    # 28 symbols in a fixed order.
    assert demo.evaluate(model, corpus.held_out, starts) < 3 < before
    assert result.steps == len(result.curve) == len(reports) == 150
    assert [steps for _, steps, _ in reports] == list(range(1, 151))
    assert result.seconds == pytest.approx(1.52)


def test_evaluation_scores_the_bytes_of_the_windows() -> None:
    model, held_out = small_model(), torch.randint(256, (600,), dtype=torch.uint8)
    starts = torch.tensor([2, 300])
    bits = []
    for start in starts.tolist():
        window = held_out[start - 1 : start + demo.SEQUENCE].long()
        log_p = model(window[None, :-1]).log_softmax(-1)[0]
        bits.append(-log_p.gather(1, window[1:, None]).mean() / math.log(2))
    expected = torch.stack(bits).mean().item()
    assert demo.evaluate(model, held_out, starts) == pytest.approx(expected, rel=1e-5)


def test_the_sample_is_what_generate_draws(capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model().eval()
    prompt = torch.tensor(list("caf\u00e9".encode()))
    sampled = demo.sample(model, prompt, 20)
    generator = torch.Generator().manual_seed(demo.SEED)
    drawn = model.generate(prompt[None], 20, temperature=demo.TEMPERATURE, generator=generator)[0]
    # What is left of an unfinished character at the end is not shown.
    assert as_bytes(drawn).decode("utf-8", "replace").startswith(sampled)
    assert sampled.startswith("caf\u00e9")
    assert "ms per token" in capsys.readouterr().out


def test_control_characters_are_not_printed() -> None:
    assert demo._printable("a\x1b[2J\tb\n") == "a?[2J\tb\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_redraws_on_a_terminal_and_logs_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "60")
    bar = demo.Progress(100.0, "trigram 2.66, unigram 4.69", stream)
    for i in range(1000):
        bar.show(i / 10, i, 3.0)
    bar.finish(1000, 2.5)
    written = stream.getvalue()
    if terminal:
        assert written.count("\n") == 1
        assert written.endswith("\n")
        drawn = written.strip().split("\r")
        assert len(drawn) > 100
        assert max(map(len, drawn)) < 60
    else:
        lines = written.splitlines()
        assert len(lines) == 11
        assert "\r" not in written
        assert all("trigram 2.66, unigram 4.69" in line for line in lines)
    assert "[##########----------] 50/100 s, step 500: 3.00 bits" in written
    assert "[####################] 100/100 s, step 1,000: 2.50 bits" in written


# Timings


@pytest.mark.usefixtures("quick")
def test_timings_rise_in_context_and_stop_the_quadratic_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 1 ms at a context of 16 predicts 16 ms at 64.
    monkeypatch.setattr(timing, "PREFILL_LIMIT", 0.015)
    rows = timing.measure((64, 16))
    assert [row.context for row in rows] == [16, 64]
    assert [row.sdpa_prefill for row in rows] == [1 / 16, None]
    assert [row.latte_prefill for row in rows] == [1 / 16, 1 / 64]
    assert rows[0].latte_bytes == rows[1].latte_bytes
    assert rows[1].sdpa_bytes == 4 * rows[0].sdpa_bytes == 2 * 4 * timing.HEADS * 64 * timing.WIDTH
    lines = timing.table(rows).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].split()[4] == "-"


def test_the_softmax_decode_attends_to_the_whole_cache() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    keys, values = k.clone(), v.clone()
    keys[:, :, -1] = values[:, :, -1] = 7.0
    y = timing._cached_attention(q[:, :, -1], k[:, :, -1], v[:, :, -1], keys, values)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    expected = (q[:, :, -1:] @ k.mT / 2).softmax(-1) @ v
    torch.testing.assert_close(y, expected)


def test_milliseconds_is_a_median_without_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = Clock(), iter([0.0, 5.0, 5.0, 6.0, 6.0, 9.0, 9.0, 11.0])
    monkeypatch.setattr(clock, "perf_counter", lambda: next(looks))
    monkeypatch.setattr(timing, "time", clock)
    assert timing.milliseconds(lambda: None, budget=10.5) == 2000


# The whole


@pytest.mark.usefixtures("quick")
def test_the_demo_reaches_its_target_and_writes_results(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, out = torch.get_num_threads(), tmp_path / "out"
    arguments = ["--minutes", "0.04", "--text", str(story), "--out", str(out), "--threads", "1"]
    assert demo.main(arguments) == 0
    assert torch.get_num_threads() == threads
    result = json.loads((out / "demo.json").read_text())
    bits = result["bits_per_byte"]
    assert 0 < bits["model"] < bits["trigram"] - demo.REQUIRED_GAIN
    assert result["target_reached"] is True
    assert result["threads"] == 1
    assert result["scored_bytes"] == 3 * demo.SEQUENCE
    assert [row["context"] for row in result["timings"]] == [16, 32, 64]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert load(out / "model.safetensors").config == demo.build_model(result["variant"]).config
    printed = capsys.readouterr().out
    assert f"trigram {bits['trigram']:.2f}, unigram {bits['unigram']:.2f}" in printed
    assert "FAILED" not in printed


@pytest.mark.usefixtures("quick")
def test_a_missed_target_fails_and_the_files_are_optional(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setattr(timing, "PREFILL_LIMIT", 0.0)
    arguments = ["--minutes", "0.001", "--text", str(story), "--out", str(tmp_path)]
    assert demo.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "pip install matplotlib" in printed
    assert (tmp_path / "demo.json").exists()
    assert not (tmp_path / "demo.png").exists()
    assert "pip install safetensors" in printed
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.usefixtures("quick")
def test_the_fastest_number_of_threads_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def milliseconds(call: object) -> float:
        tried.append(torch.get_num_threads())
        return abs(tried[-1] - 4)

    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    assert demo.fastest_threads(6) == 4
    assert tried == [1, 2, 4, 6]


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0"], ["--minutes", "inf"], ["--threads", "-1"], ["--threads", "x"]]
)
def test_arguments_have_to_be_positive(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err
