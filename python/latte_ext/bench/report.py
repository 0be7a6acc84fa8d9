# SPDX-License-Identifier: Apache-2.0
"""What was measured, as text, Markdown, JSON and plots."""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _core
from .cases import Bench, Row, buffer_bytes, memory_calls, peak_text
from .measure import PEAK_SECONDS, elapsed
from .targets import Outcome, outcomes

SCHEMA = 1
_PEAK_REPEATS = 25


def cpu_model() -> str:
    """The processor's name as Linux gives it, or the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def file_stem(model: str) -> str:
    """A processor's name as a file name."""
    plain = re.sub(r"\((R|TM|tm)\)|@.*$", "", model).lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "cpu"


def machine(bench: Bench) -> dict[str, Any]:
    """Names and measured ceilings: the best of short runs, for display; shares have their own."""
    counts = bench.thread_counts()
    peak = {
        name: max(_core.fma_rate(threads, PEAK_SECONDS) for _ in range(_PEAK_REPEATS))
        for name, threads in counts.items()
    }
    size = buffer_bytes(bench.sizes)
    copy = {}
    for name, threads in counts.items():
        calls = memory_calls(size, threads).values()
        copy[name] = size / min(elapsed(call) for _ in range(4) for call in calls)
    return {
        "cpu": cpu_model(),
        "isa": _core.cpu_isa(),
        "threads": bench.threads,
        "peak": peak,
        "copy": copy,
        "latte_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe(facts: dict[str, Any]) -> str:
    """The machine in a few lines."""
    copy = ", ".join(f"{rate / 1e9:.1f} GB/s ({name})" for name, rate in facts["copy"].items())
    return (
        f"{facts['cpu']}, {facts['isa']}, threads {facts['threads']}, torch {facts['torch']}, "
        f"latte_ext {facts['latte_ext']}\n"
        f"float32 multiply-add peak, measured: {peak_text(facts['peak'])}\n"
        f"memory bandwidth, copying or in place, read + written, by threads: {copy}"
    )


# Tables


_ROW_HEAD = ("", "value", "quartiles", "ns per token", "threads", "clock", "repeats")


def _number(value: float, unit: str) -> str:
    if unit in ("of peak", "of copy"):
        return f"{100 * value:.1f} %"
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _row_cells(row: Row) -> tuple[str, ...]:
    return (
        row.label,
        f"{_number(row.value, row.unit)} {row.unit}",
        f"{_number(row.low, row.unit)} .. {_number(row.high, row.unit)}",
        "" if row.ns_per_token is None else f"{row.ns_per_token:,.1f}",
        str(row.threads),
        row.clock,
        str(row.repeats),
    )


def _peer_table(bench: Bench, facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """Per length: the floor, ours and the peers in ns per token of 8 heads, L = D = 64."""
    curves = {name: dict(points) for name, points in bench.curves.items() if "thread" not in name}
    lengths = sorted({tokens for points in curves.values() for tokens in points})
    floor = 1e9 * 8 * 4 * 64 * 64 / facts["peak"].get("all", facts["peak"]["1"])
    head = ("ns per token", *(f"T = {tokens:,}" for tokens in lengths))
    rows = [head, ("floor (peak)", *[f"{floor:,.0f}"] * len(lengths))]
    for name, points in curves.items():
        cells = [f"{points[t]:,.0f}" if t in points else "-" for t in lengths]
        rows.append((name, *cells))
    return rows


def _target_cells(outcome: Outcome) -> tuple[str, ...]:
    target = outcome.target
    fraction = target.limit < 1 and target.op == ">="
    unit = "of peak" if fraction else "times"
    verdict = {True: "reached", False: "not reached", None: "not measured here"}[outcome.reached]
    value = "" if outcome.value is None else _number(outcome.value, unit)
    return (target.label, f"{target.op} {_number(target.limit, unit)}", value, verdict)


_TARGET_HEAD = ("target", "limit", "measured", "")


def crossovers(bench: Bench) -> list[str]:
    """From which measured length on ours is the faster one, and where softmax attention wins."""
    lines = []
    for suffix in ("", " full", " bfloat16", " full bfloat16"):
        ours, theirs = (dict(bench.curves.get(name + suffix, ())) for name in ("latte", "sdpa"))
        lengths = sorted(set(ours) & set(theirs))
        if not lengths:
            continue
        wins = [tokens for tokens in lengths if theirs[tokens] < ours[tokens]]
        faster = [tokens for tokens in lengths if not wins or tokens > wins[-1]]
        kind = ("bidirectional" if "full" in suffix else "causal") + (
            ", bfloat16" if "bfloat16" in suffix else ", float32"
        )
        start = f"faster from T = {faster[0]:,}" if faster else "slower at every length"
        where = ", ".join(f"{tokens:,}" for tokens in wins)
        lines.append(
            f"against softmax attention ({kind}): {start}; softmax attention wins at "
            + (f"T = {where}" if wins else "no measured length")
        )
    return lines


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _markdown(rows: Sequence[tuple[str, ...]]) -> str:
    head, *body = rows
    rule = ("---", *("---:" for _ in head[1:]))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


_METHOD = (
    "Work is 4LD operations per token and head forward, 12LD backward. A share is a rate over the "
    "multiply-add peak measured right before and after it; ratios are of times of the same round. "
    "Values are medians. Clock cpu is the CPU time of the only thread, wall the time that passed."
)


def _tables(bench: Bench, facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, ...]]]]:
    tables = [("Rows", [_ROW_HEAD, *map(_row_cells, bench.rows)])]
    if any("thread" not in name for name in bench.curves):
        tables.append(("Ours, peers, floor", _peer_table(bench, facts)))
    results = outcomes(bench.rows, facts["isa"])
    if any(outcome.value is not None for outcome in results):
        tables.append(("Targets", [_TARGET_HEAD, *map(_target_cells, results)]))
    return tables


def text(bench: Bench, facts: dict[str, Any]) -> str:
    """Everything for a terminal."""
    blocks = [_aligned(rows) for _, rows in _tables(bench, facts)]
    lines = crossovers(bench) + bench.notes
    return "\n\n".join([_METHOD, *blocks, *(["\n".join(lines)] if lines else [])])


def markdown(bench: Bench, facts: dict[str, Any], plot: str | None = None) -> str:
    """Everything as a page; the targets come first."""
    tables = reversed(_tables(bench, facts))
    blocks = [f"# {facts['cpu']}", describe(facts).replace("\n", "  \n"), _METHOD]
    blocks += [f"## {title}\n\n{_markdown(rows)}" for title, rows in tables]
    lines = [f"* {line}" for line in crossovers(bench) + bench.notes]
    blocks += ["\n".join(lines)] if lines else []
    blocks += [f"![time per token and roofline]({plot})"] if plot else []
    return "\n\n".join(blocks) + "\n"


def as_json(bench: Bench, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything for a program."""
    return {
        "schema": SCHEMA,
        "machine": facts,
        "size": bench.sizes.name,
        "rows": [dataclasses.asdict(row) for row in bench.rows],
        "curves": {
            name: [list(point) for point in points] for name, points in bench.curves.items()
        },
        "targets": [
            {
                "label": outcome.target.label,
                "op": outcome.target.op,
                "limit": outcome.target.limit,
                "value": outcome.value,
                "reached": outcome.reached,
            }
            for outcome in outcomes(bench.rows, facts["isa"])
        ],
        "crossovers": crossovers(bench),
        "notes": bench.notes,
    }


def save_plot(path: Path, bench: Bench, facts: dict[str, Any]) -> bool:
    """Time per token against T, and the roofline; false, and a message, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return False
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in bench.curves.items():
        style = "o-" if name.startswith("latte") else "s--"
        left.loglog(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1)
    left.set(
        xlabel="tokens T",
        ylabel="ns per token",
        title="time per token, L = D = 64; 8 heads, all threads, unless said",
    )
    left.legend(fontsize=7)
    _roofline(right, bench, facts)
    figure.savefig(path, dpi=120)
    return True


def _roofline(axes: Any, bench: Bench, facts: dict[str, Any]) -> None:
    last = "all" if "all" in facts["peak"] else "1"
    peak, copy = facts["peak"][last], facts["copy"][last]
    at = [2.0**i for i in range(-2, 9)]
    axes.loglog(at, [min(peak, copy * x) / 1e9 for x in at], color="black", label="roof")
    for row in bench.rows:
        if row.rate is not None and row.intensity is not None and row.key.endswith(f"/{last}"):
            axes.loglog([row.intensity], [row.rate / 1e9], "o", label=row.label, markersize=5)
    axes.set(
        xlabel="operations per byte of inputs and outputs", ylabel="Gflop/s",
        title=f"roofline, threads: {last}",
    )  # fmt: skip
    axes.legend(fontsize=7)
