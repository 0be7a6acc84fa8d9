# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext bench`: the kernels against this machine's own peak and against peers.

Prints the machine with its measured multiply-add peak, then shares of that peak, ratios and times
per token, and where softmax attention is the faster one. A full run takes some three minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from .._command_line import check_file, check_folder
from .._progress import Bar
from . import cuda, mixers, overhead, report, tune, window
from .cases import EXTRA_GROUPS, SIZES, Bench
from .cases import GROUPS as LATENT_GROUPS

GROUPS = LATENT_GROUPS | window.GROUPS | mixers.GROUPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to `parser`."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what to measure")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--tune", type=Path, metavar="FILE",
        help="measure how the CUDA kernels best cut long sequences, for cuda/tuned.h",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--plot", type=Path, help="also draw a PNG file (needs matplotlib)")
    parser.add_argument("--out", type=Path, help="folder for <cpu>.json, <cpu>.md and <cpu>.png")
    parser.add_argument(
        "--quick",
        dest="size",
        action="store_const",
        const="quick",
        default="full",
        help="about one minute",
    )
    parser.add_argument(
        "--groups", nargs="+", metavar="GROUP", choices=[*GROUPS, *EXTRA_GROUPS],
        default=list(GROUPS), help=f"only these of: {', '.join(GROUPS)}",
    )  # fmt: skip
    parser.add_argument(
        "--overhead", action="store_true", help="only what a call of each operator costs"
    )
    parser.add_argument("--size", choices=list(SIZES), default="full", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write what the options ask for; returns the exit code."""
    if args.overhead:
        print(overhead.table(overhead.measure()))
        return 0
    for file in (args.json, args.plot, args.tune):
        if file is not None:
            check_file("bench", file)
    if args.out is not None:
        check_folder("bench", args.out)
    if args.tune is not None:
        return tune.run(args.size, args.tune)
    if args.device == "cuda":
        return cuda.run(args.size, args.json, args.once)
    bench = Bench(SIZES[args.size], torch.get_num_threads())
    facts = report.machine(bench)
    print(report.describe(facts), flush=True)
    bar = Bar(len(args.groups), "groups", sys.stdout, redraw=0.5)
    for done, name in enumerate(args.groups):
        bar.show(done, name)
        torch.manual_seed(0)
        (GROUPS | EXTRA_GROUPS)[name](bench)
    bar.finish("done")
    print("\n" + report.text(bench, facts))

    json_paths = [] if args.json is None else [args.json]
    plots = [] if args.plot is None else [args.plot]
    if args.out is not None:
        stem = report.file_stem(facts["cpu"])
        json_paths.append(args.out / f"{stem}.json")
        plots.append(args.out / f"{stem}.png")
    drawn = [path for path in plots if report.save_plot(path, bench, facts)]
    for path in json_paths:
        path.write_text(json.dumps(report.as_json(bench, facts), indent=1) + "\n")
    pages = []
    if args.out is not None:
        pages = [args.out / f"{stem}.md"]
        plot = f"{stem}.png" if plots[-1] in drawn else None
        pages[0].write_text(report.markdown(bench, facts, plot))
    for path in [*json_paths, *drawn, *pages]:
        print(f"saved {path}")
    return 0
