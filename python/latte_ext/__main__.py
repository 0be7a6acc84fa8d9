# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext info | selftest | demo | bench`."""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from . import __version__, _core, bench, demo, selftest


def info() -> int:
    rows = {
        "latte_ext": __version__,
        "instruction set": _core.cpu_isa(),
        "threads": str(torch.get_num_threads()),
        "CUDA": "yes" if _core.cuda_built() else "no (built without it)",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name, value in rows.items():
        print(f"{name:16} {value}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m latte_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, instruction set, threads, CUDA, torch")
    commands.add_parser("selftest", help="prove this installation in a few seconds")
    demo.add_arguments(commands.add_parser("demo", help="train, sample and time a language model"))
    bench.add_arguments(commands.add_parser("bench", help="measure against peak and peers"))
    args = parser.parse_args(argv)
    if args.command == "info":
        return info()
    if args.command == "selftest":
        return selftest.main()
    return demo.run(args) if args.command == "demo" else bench.run(args)


if __name__ == "__main__":
    sys.exit(main())
