# SPDX-License-Identifier: Apache-2.0
"""What the commands of `python -m latte_ext` check before the minutes that they take."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """The type of an option that is a positive finite number."""

    def parse(text: str) -> float:
        number = kind(text)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"got {text}, expected a positive number")
        return number

    parse.__name__ = kind.__name__  # argparse names it where `kind` cannot read the text
    return parse


def check_folder(op: str, folder: Path) -> None:
    """Makes a folder for results.

    Raises:
        SystemExit: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(
            f"[{op}] {folder} cannot be written to ({error.strerror}), expected a folder"
        ) from None


def check_file(op: str, file: Path) -> None:
    """As `check_folder`, for one file of results."""
    if file.is_dir():
        raise SystemExit(f"[{op}] {file} is a folder, expected the name of a file")
    check_folder(op, file.parent)
