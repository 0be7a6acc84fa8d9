# SPDX-License-Identifier: Apache-2.0
"""Holds a wheel and a source archive to what their users rely on, and prints their numbers.

python tools/check_wheel.py dist/latte_ext-*.whl dist/latte_ext-*.tar.gz
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

MAX_BYTES = 2_000_000

# Of the wheel, after the name of the package or of its metadata folder.
NEEDED = (
    r"latte_ext/_core\.[^/]*\.so",
    r"latte_ext/_core\.pyi",
    r"latte_ext/py\.typed",
    r"latte_ext/lib/liblatte\.so",
    r"latte_ext/include/latte/latte\.h",
    r"latte_ext/include/latte/latte_c\.h",
    r"latte_ext/include/latte/export\.h",
    r"latte_ext/lib/cmake/latte/latteConfig\.cmake",
    r"latte_ext-[^/]*\.dist-info/licenses/LICENSE",
)
# Shared objects that belong to others: the OpenMP runtime must be torch's.
FORBIDDEN = r".*/lib(gomp|omp|torch|stdc\+\+|c10)[^/]*"
# Of the source archive, below its folder.
SOURCES = ("LICENSE", "README.md", "CMakeLists.txt", "pyproject.toml", "cmake/liblatte.map",
           "cpp/include/latte/latte_c.h", "cpp/src/cpu/simd.h", "cuda/no_cuda.cpp", "PKG-INFO",
           "examples/cpp/main.cpp", "tests/cpp/main.cpp")  # fmt: skip

# Dynamic symbols that a shared object may define.
EXPORTS = {
    "liblatte.so": r"latte_\w+|_ZN5latte\w+|_ZT[ISV]N5latte5ErrorE",
    "_core": r"PyInit__core",
}


def missing(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """The patterns that no name matches whole."""
    return [p for p in patterns if not any(re.fullmatch(p, name) for name in names)]


def foreign_symbols(name: str, symbols: list[str]) -> list[str]:
    """Symbols that the shared object of that name must not define."""
    allowed = EXPORTS["liblatte.so" if name == "liblatte.so" else "_core"]
    return [symbol for symbol in symbols if not re.fullmatch(allowed, symbol)]


def exported(library: Path) -> list[str]:
    """Dynamic symbols that `library` defines."""
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", str(library)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in output.splitlines()]


def check_wheel(path: Path) -> list[str]:
    """What is wrong with the wheel; prints its numbers."""
    problems = []
    size = path.stat().st_size
    if size > MAX_BYTES:
        problems.append(f"{path.name} has {size:,} bytes, expected at most {MAX_BYTES:,}")
    if "-linux_" in path.name:
        problems.append(f"{path.name} is not repaired, expected a manylinux tag")
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as folder:
        names = wheel.namelist()
        problems += [f"{path.name} has no {pattern}" for pattern in missing(names, NEEDED)]
        problems += [
            f"{path.name} has {name}, expected it elsewhere"
            for name in names
            if re.fullmatch(FORBIDDEN, name)
        ]
        print(f"{path.name}: {size:,} bytes, {len(names)} files")
        for name in names:
            if not name.endswith(".so"):
                continue
            library = Path(wheel.extract(name, folder))
            symbols = exported(library)
            problems += [
                f"{name} defines {symbol}" for symbol in foreign_symbols(library.name, symbols)
            ]
            print(f"  {name}: {library.stat().st_size:,} bytes, {len(symbols)} symbols")
    return problems


def check_sdist(path: Path) -> list[str]:
    """What is wrong with the source archive; prints its numbers."""
    with tarfile.open(path) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    print(f"{path.name}: {path.stat().st_size:,} bytes, {len(names)} files")
    wanted = tuple(map(re.escape, SOURCES))
    return [f"{path.name} has no {pattern}" for pattern in missing(names, wanted)]


def main(arguments: list[str]) -> int:
    """0 if all archives are as they should be, 1 if not, 2 if none is given."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    problems = []
    for path in map(Path, arguments):
        problems += check_wheel(path) if path.suffix == ".whl" else check_sdist(path)
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
