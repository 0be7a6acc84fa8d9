# SPDX-License-Identifier: Apache-2.0
"""What `python -m latte_ext` can do where torch is not installed: what C++ users need."""

from __future__ import annotations

import argparse
import platform

from . import _core
from ._paths import cmake_dir


def main(argv: list[str] | None = None) -> int:
    """`info` and `--cmake-dir`; everything else asks for torch."""
    parser = argparse.ArgumentParser(
        prog="python -m latte_ext", description="Without torch; with it there are more commands."
    )
    parser.add_argument("--cmake-dir", action="store_true", help="the folder for -Dlatte_DIR")
    parser.add_argument("command", nargs="?", choices=["info"], help="version, instruction set")
    args = parser.parse_args(argv)
    if args.cmake_dir:
        print(cmake_dir())
        return 0
    rows = {
        "latte_ext": _core.version(),
        "instruction set": _core.cpu_isa(),
        "torch": "not installed",
        "python": platform.python_version(),
    }
    for name, value in rows.items():
        print(f"{name:16} {value}")
    return 0
