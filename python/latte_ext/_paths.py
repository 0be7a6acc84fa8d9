# SPDX-License-Identifier: Apache-2.0
"""Where the files of this installation that C++ programs need are."""

from __future__ import annotations

from pathlib import Path

from . import _core


def cmake_dir() -> Path:
    """The folder of latteConfig.cmake, for `cmake -Dlatte_DIR=...`.

    Raises:
        RuntimeError: this installation has no C++ files.
    """
    # Beside the compiled module: an editable installation has it elsewhere than the Python files.
    folder = Path(_core.__file__).parent / "lib" / "cmake" / "latte"
    if not (folder / "latteConfig.cmake").is_file():
        raise RuntimeError(f"[latte_ext] {folder} has no latteConfig.cmake, expected the C++ files")
    return folder
