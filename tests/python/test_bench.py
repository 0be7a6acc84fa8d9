# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext bench`: the peers compute what they claim, and every row is there."""

import dataclasses
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import latte_ext
import pytest
import torch
from helpers import TOLERANCES, assert_close, rms
from latte_ext import __main__ as command
from latte_ext import _core, bench, reference
from latte_ext.bench import cases, measure, peers, report, targets
from torch import Tensor


@pytest.fixture(autouse=True)
def no_poison() -> None:
    """Timings of memory that is filled first would be of the filling."""
    torch.use_deterministic_algorithms(False)


# The peers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("attention", [peers.looped, peers.batched])
@pytest.mark.parametrize(("tokens", "chunk", "rise"), [(70, 16, 0.0), (64, 8, 0.5), (9, 64, 0.0)])
def test_peers_are_latent_attention(
    attention: Callable[..., Tensor], dtype: torch.dtype, tokens: int, chunk: int, rise: float
) -> None:
    inputs = [torch.randn(2, 2, tokens, width, dtype=dtype) for width in (5, 5, 7)]
    inputs[1] += rise * torch.arange(tokens).view(-1, 1)
    options = {"group": 2} if attention is peers.batched else {}
    dy = torch.randn(2, 2, tokens, 7, dtype=dtype)

    def solve(function: Callable[..., Tensor], wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in inputs]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(wide))]

    got = solve(lambda *x: attention(*x, chunk=chunk, **options), dtype)
    want = solve(lambda *x: reference.latent_attention(*x)[0], torch.float64)
    for name, actual, expected in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        assert_close(
            actual, expected, tolerance=4 * TOLERANCES[dtype].gradient,
            scale=max(1.0, rms(dy) * math.sqrt(7)), name=name,
        )  # fmt: skip


def test_plain_torch_step_is_a_step() -> None:
    _, state = latte_ext.latent_attention(*torch.randn(3, 2, 4, 10, 8).unbind(), return_state=True)
    plain = state.clone()
    for _ in range(3):
        token = torch.randn(3, 2, 4, 8).unbind()
        want = latte_ext.latent_attention_step(*token, state)
        torch.testing.assert_close(peers.step_in_place(*token, plain.tensors()), want)
    torch.testing.assert_close(plain.tensors(), state.tensors())


def test_jax_scan_is_latent_attention() -> None:
    pytest.importorskip("jax")
    q, k, v = torch.randn(3, 1, 2, 128, 8)
    y = torch.tensor(peers.jax_scan(q, k, v)().tolist())
    torch.testing.assert_close(y, latte_ext.latent_attention(q, k, v), rtol=1e-4, atol=1e-5)


# Measuring


def test_peak_is_a_rate() -> None:
    assert 1e8 < _core.fma_rate(1, 0.01) < 1e13
    assert 1e8 < _core.fma_rate(2, 0.01) < 1e14
    for arguments in ((0, 0.01), (1, 0.0), (1, math.nan)):
        with pytest.raises(ValueError, match=r"\[fma_rate\] got threads"):
            _core.fma_rate(*arguments)


def test_spread_is_median_and_quartiles() -> None:
    assert measure.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0, 5)
    assert measure.spread([2.0, 1.0]) == (1.5, 1.0, 2.0, 2)


def test_repeats_end_with_the_budget() -> None:
    calls = {"a": measure.Call(lambda: None), "b": measure.Call(lambda: None, 2)}
    samples = measure.interleave(calls, repeats=1000, budget=0.0)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3}
    assert [call.clock for call in calls.values()] == ["cpu", "wall"]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("offset", [0, 16])
@pytest.mark.parametrize("time_major", [False, True])
def test_problem_computes_latent_attention(offset: int, time_major: bool) -> None:
    problem = cases.Problem((1, 2, 40, 8, 6), offset=offset, time_major=time_major, rise=0.1)
    problem.both(1)
    dy, dq, dk, dv = problem.gradients
    leaves = [x.detach().clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    y = latte_ext.latent_attention(*leaves)
    assert problem.q.data_ptr() % 64 == dv.data_ptr() % 64 == offset
    assert problem.q.is_contiguous() != time_major
    torch.testing.assert_close(problem.y, y)
    torch.testing.assert_close((dq, dk, dv), torch.autograd.grad(y, leaves, dy))


# The command


def test_command_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = tmp_path / "extra.json"
    options = ["--size", "tiny", "--out", str(tmp_path), "--json", str(extra)]
    assert command.main(["bench", *options]) == 0
    out = capsys.readouterr().out
    count = len(bench.GROUPS)
    progress = f"{count - 1}/{count}"
    for expected in ("multiply-add peak", "of peak", "floor (peak)", "softmax attention", progress):
        assert expected in out
    stem = report.file_stem(report.cpu_model())
    result = json.loads(extra.read_text())
    assert result == json.loads((tmp_path / f"{stem}.json").read_text())
    assert result["schema"] == report.SCHEMA
    assert set(result) == {
        "schema", "machine", "size", "rows", "curves", "targets", "crossovers", "notes"
    }  # fmt: skip
    assert result["machine"]["isa"] == _core.cpu_isa()
    assert set(result["machine"]["peak"]) == set(result["machine"]["copy"]) == {"1", "all"}
    for row in result["rows"]:
        assert row["low"] <= row["value"] <= row["high"]
        assert row["value"] > 0
        assert row["clock"] == ("wall" if row["threads"] > 1 else row["clock"])
    groups = {row["key"].split("/")[0] for row in result["rows"]}
    assert groups >= {
        "causal", "training", "odd", "bidirectional", "heads", "long", "order", "rising", "half",
        "length", "flat", "decode", "states", "peers", "training peers", "recurrences",
        "recurrence peers", "window", "macchiato",
    }  # fmt: skip
    assert {"latte", "sdpa", "torch loop", "torch batched"} <= set(result["curves"])
    assert [target["label"] for target in result["targets"]] == [t.label for t in targets.TARGETS]
    page = (tmp_path / f"{stem}.md").read_text()
    assert page.index("## Targets") < page.index("## Rows")
    assert page.count("| reached |") + page.count("| not reached |") > 10
    if f"{stem}.png" in page:
        assert (tmp_path / f"{stem}.png").stat().st_size > 1000


def test_command_measures_chosen_groups_on_one_thread(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    path = tmp_path / "rows.json"
    options = ["--size", "tiny", "--json", str(path), "--groups"]
    assert command.main(["bench", *options, "scaling", "alignment"]) == 0
    result = json.loads(path.read_text())
    assert {row["threads"] for row in result["rows"]} == {1}
    assert result["notes"] == ["no scaling: one thread"]
    assert "not reached" not in capsys.readouterr().out


def test_options_choose_the_size() -> None:
    parser = bench.argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert parser.parse_args([]).size == "full"
    assert parser.parse_args(["--quick"]).size == "quick"


def test_an_unusable_peer_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nat all")

    slow = dataclasses.replace(cases.TINY, peer_lengths=(64,), slow=True)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    run = cases.Bench(slow, 1)
    cases.against(run)
    cases.training(run)
    assert "no torch loop compiled: no compiler" in run.notes
    assert "no flex: no compiler" in run.notes
    assert len(run.notes) == len(set(run.notes))
    assert not any("compiled" in row.key for row in run.rows)


def test_a_missing_instruction_set_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nValueError: expected one of: x\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    run = cases.Bench(cases.TINY, 1)
    cases.narrow(run)
    assert run.notes == ["no x86-64-v3: ValueError: expected one of: x"]
    assert run.rows == []


# The report


def _row(key: str, value: float) -> cases.Row:
    return cases.Row(key, key, "times", value, value, value, 1, 1, "cpu")


def test_the_worst_row_decides_a_target() -> None:
    rows = [
        _row("peers/8192/sdpa", 70.0),
        _row("peers/128/sdpa", 0.5),
        _row("peers/256/sdpa", 1.5),
        _row("half/bfloat16/forward", 0.9),
        _row("half/float16/forward", 1.2),
        _row("causal/forward/1x8x8192x64x64/1", 0.8),
    ]
    found = {outcome.target.label: outcome for outcome in targets.outcomes(rows, "x86-64-v3")}
    assert found["faster than softmax attention, T = 8192"].reached is True
    assert found["faster than softmax attention from T = 256"].value == 1.5
    assert found["bfloat16 and float16 over float32"].value == 1.2
    assert found["bfloat16 and float16 over float32"].reached is False
    assert found["forward, L = 64, 1 thread"].reached is None  # set for another instruction set


def test_crossover_is_after_the_last_length_that_softmax_wins() -> None:
    run = cases.Bench(cases.TINY, 1)
    run.curves = {
        "latte": [(128, 10.0), (256, 5.0), (512, 5.0)],
        "sdpa": [(128, 8.0), (256, 6.0), (512, 9.0)],
        "latte full": [(128, 3.0)],
        "sdpa full": [(128, 2.0)],
    }
    first, second = report.crossovers(run)
    assert "(causal, float32): faster from T = 256" in first
    assert first.endswith("softmax attention wins at T = 128")
    assert "slower at every length" in second


@pytest.mark.parametrize(
    ("model", "stem"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c-cpu"),
        ("AMD EPYC 7B13", "amd-epyc-7b13"),
        ("???", "cpu"),
    ],
)
def test_file_stem_is_plain(model: str, stem: str) -> None:
    assert report.file_stem(model) == stem


def test_plot_needs_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(bench.sys.modules, "matplotlib.figure", None)
    assert not report.save_plot(tmp_path / "x.png", cases.Bench(cases.TINY, 1), {})
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_overhead_has_every_operator() -> None:
    """One sample of one call: the rows are there and timed, whatever they say."""
    least = bench.overhead.measure(samples=1, count=1)
    backward = {name for name in _core.SCHEMAS if name.endswith("_backward")}
    assert least.keys() - {"torch.nn.functional.linear"} == (
        _core.SCHEMAS.keys() - backward - {"state_merge"}
    )
    assert all(0 < value < 1 for seconds in least.values() for value in seconds)
    page = bench.overhead.table({key: [4e-06, 6e-06, 8e-06, 5e-06, 7e-06, 9e-06] for key in least})
    assert "12 of 12 functions within 4.5 us in inference mode" in page
    assert page.endswith("0 of 12 operators of torch.ops within 4.5 us in inference mode")
    assert "| `rotate` | 4.00 | 6.00 | 8.00 | 5.00 | 7.00 | 9.00 | 1.00 |" in page
