# SPDX-License-Identifier: Apache-2.0
"""`python -m latte_ext info | selftest | demo | bench | extend`, or `--cmake-dir`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from collections.abc import Callable
from typing import Any

if importlib.util.find_spec("torch") is None:
    from . import _bare

    sys.exit(_bare.main())

import torch

from . import __version__, _core, bench, demo, selftest
from ._device import unusable, version_text
from ._paths import cmake_dir


def info() -> int:
    rows = {
        "latte_ext": __version__,
        "instruction set": _core.cpu_isa(),
        "threads": str(torch.get_num_threads()),
        **_cuda(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name, value in rows.items():
        print(f"{name:16} {value}")
    return 0


def _cuda() -> dict[str, str]:
    """What is built, and what of it this machine can run."""
    found = _core.cuda_info()
    if not _core.cuda_built():
        return {"CUDA": "no (built without it)"}
    if found["emulated"]:
        return {"CUDA": "EMULATED on the CPU, a build for tests"}
    runtime, driver = version_text(found["runtime"]), version_text(found["driver"])
    rows = {
        "CUDA": f"built for {found['architectures']}; runtime {runtime}, driver {driver}",
        "devices": "; ".join(found["devices"]) or f"none ({found['error']})",
    }
    if not torch.cuda.is_available() and not unusable():
        rows["CUDA of torch"] = "none: this torch cannot make CUDA tensors"
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m latte_ext", description=__doc__)
    parser.add_argument(
        "--cmake-dir", action="store_true", help="the folder for cmake's -Dlatte_DIR, and no more"
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("info", help="version, instruction set, threads, CUDA, torch")
    selftest.add_arguments(
        commands.add_parser("selftest", help="prove this installation in a few seconds")
    )
    demo.add_arguments(commands.add_parser("demo", help="train, sample and time a language model"))
    bench.add_arguments(commands.add_parser("bench", help="measure against peak and peers"))
    extend = commands.add_parser("extend", help="longer context for a pretrained model")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["extend"]:
        _extension().add_arguments(extend)
    args = parser.parse_args(argv)
    if args.cmake_dir:
        print(cmake_dir())
        return 0
    if args.command is None:
        parser.error("a command is required")
    run: dict[str, Callable[[argparse.Namespace], int]] = {
        "info": lambda _: info(),
        "selftest": selftest.run,
        "demo": demo.run,
        "bench": bench.run,
        "extend": lambda args: int(_extension().run(args)),
    }
    try:
        return run[args.command](args)
    except KeyboardInterrupt:
        print(f"\n[{args.command}] interrupted", file=sys.stderr)
        return 130


def _extension() -> Any:
    """latte_ext.hf.extend, which takes seconds to import, as transformers does."""
    try:
        return importlib.import_module("latte_ext.hf.extend")
    except ImportError as error:
        raise SystemExit(f"[extend] {error}, expected `pip install latte-ext[hf]`") from error


if __name__ == "__main__":
    sys.exit(main())
