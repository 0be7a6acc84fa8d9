# SPDX-License-Identifier: Apache-2.0
"""The gate on wheels and source archives: that it fails where it should."""

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path

import latte_ext
import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_wheel.py"
spec = importlib.util.spec_from_file_location("check_wheel", TOOL)
assert spec is not None
assert spec.loader is not None
check_wheel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_wheel)

FILES = (
    "latte_ext/_core.cpython-313-x86_64-linux-gnu.so",
    "latte_ext/_core.pyi",
    "latte_ext/py.typed",
    "latte_ext/lib/liblatte.so",
    "latte_ext/include/latte/latte.h",
    "latte_ext/include/latte/latte_c.h",
    "latte_ext/include/latte/export.h",
    "latte_ext/lib/cmake/latte/latteConfig.cmake",
    "latte_ext-0.1.0.dist-info/licenses/LICENSE",
)


@pytest.fixture
def no_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_wheel, "exported", lambda library: [])


def wheel(folder: Path, files: tuple[str, ...], content: bytes = b"", tag: str = "many") -> Path:
    path = folder / f"latte_ext-0.1.0-cp313-cp313-{tag}linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in files:
            archive.writestr(name, content)
    return path


@pytest.mark.usefixtures("no_symbols")
def test_a_whole_wheel_passes_and_numbers_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_wheel.main([str(wheel(tmp_path, FILES))]) == 0
    assert "9 files" in capsys.readouterr().out


@pytest.mark.usefixtures("no_symbols")
@pytest.mark.parametrize("left_out", FILES)
def test_every_file_is_needed(left_out: str, tmp_path: Path) -> None:
    path = wheel(tmp_path, tuple(name for name in FILES if name != left_out))
    (problem,) = check_wheel.check_wheel(path)
    assert "has no latte_ext" in problem


@pytest.mark.usefixtures("no_symbols")
def test_what_does_not_belong_into_a_wheel(tmp_path: Path) -> None:
    library = "latte_ext.libs/libgomp-a34b3233.so.1.0.0"
    assert check_wheel.check_wheel(wheel(tmp_path, (*FILES, library))) == [
        f"latte_ext-0.1.0-cp313-cp313-manylinux_x86_64.whl has {library}, expected it elsewhere"
    ]
    (problem,) = check_wheel.check_wheel(wheel(tmp_path, FILES, tag=""))
    assert "is not repaired" in problem
    (problem,) = check_wheel.check_wheel(wheel(tmp_path, FILES, bytes(300_000)))
    assert "expected at most 2,000,000" in problem


def test_foreign_symbols() -> None:
    ours = ["latte_rotate", "_ZN5latte6rotateERKNS_6RotateEPvi", "_ZTIN5latte5ErrorE"]
    std = "_ZNSt6vectorIcSaIcEE4dataEv"
    assert check_wheel.foreign_symbols("liblatte.so", [*ours, std]) == [std]
    module = "_core.cpython-313-x86_64-linux-gnu.so"
    assert check_wheel.foreign_symbols(module, ["PyInit__core", *ours]) == ours


def test_this_installation_shows_no_foreign_symbol() -> None:
    folder = Path(latte_ext._core.__file__).parent
    for library in (Path(latte_ext._core.__file__), folder / "lib" / "liblatte.so"):
        symbols = check_wheel.exported(library)
        assert symbols
        assert check_wheel.foreign_symbols(library.name, symbols) == []


def test_source_archives(tmp_path: Path) -> None:
    path = tmp_path / "latte_ext-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in check_wheel.SOURCES[1:]:
            archive.addfile(tarfile.TarInfo(f"latte_ext-0.1.0/{name}"), io.BytesIO())
    assert check_wheel.check_sdist(path) == ["latte_ext-0.1.0.tar.gz has no LICENSE"]
    assert check_wheel.main([str(path)]) == 1
    assert check_wheel.main([]) == 2
