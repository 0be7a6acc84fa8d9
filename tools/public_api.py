# SPDX-License-Identifier: Apache-2.0
"""What a release promises, as text: Python names and signatures, operators, C and C++ declarations.

python tools/public_api.py            prints it
python tools/public_api.py --update   writes tests/python/public_api.txt, which a test compares
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from inspect import formatannotation
from pathlib import Path
from types import ModuleType
from typing import Any, ForwardRef

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = ROOT / "tests" / "python" / "public_api.txt"
MODULES = ("", ".nn", ".hf", ".distributed", ".storage", ".rotary")
HEADERS = ("latte.h", "latte_c.h")


class Written:
    """An annotation as it stands in the source, not evaluated: every Python prints the same."""

    def __init__(self, annotation: Any) -> None:
        if isinstance(annotation, ForwardRef):
            annotation = annotation.__forward_arg__
        self.text = annotation if isinstance(annotation, str) else formatannotation(annotation)

    def __repr__(self) -> str:
        return self.text


def signature(function: Any) -> str:
    """The arguments with their annotations and defaults, and the result."""
    found = inspect.signature(function)

    def written(annotation: Any) -> Any:
        return annotation if annotation is inspect.Signature.empty else Written(annotation)

    parameters = [p.replace(annotation=written(p.annotation)) for p in found.parameters.values()]
    return str(
        found.replace(parameters=parameters, return_annotation=written(found.return_annotation))
    )


def members(cls: type) -> Iterator[str]:
    """The constructor, and the public methods and properties that latte_ext itself defines."""
    yield signature(cls)
    defined: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("latte_ext"):
            defined.update(vars(base))
    for name, member in sorted(defined.items()):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"  .{name}"
        elif isinstance(member, (staticmethod, classmethod)):
            yield f"  .{name}{signature(getattr(cls, name))} [{type(member).__name__}]"
        elif inspect.isfunction(member):
            yield f"  .{name}{signature(member)}"


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or what a module without it defines."""
    names = getattr(module, "__all__", None) or [
        name
        for name, member in vars(module).items()
        if not name.startswith("_") and getattr(member, "__module__", None) == module.__name__
    ]
    return sorted(names)


def python_lines() -> Iterator[str]:
    """One line for each public name, and one for each public member of a class."""
    for suffix in MODULES:
        module = importlib.import_module(f"latte_ext{suffix}")
        yield f"# {module.__name__}"
        for name in public_names(module):
            member = getattr(module, name)
            if inspect.isclass(member):
                constructor, *rest = members(member)
                yield f"{name}{constructor}"
                yield from rest
            elif inspect.isfunction(member):
                yield f"{name}{signature(member)}"
            elif inspect.ismodule(member):
                yield f"{name}: module"
            else:
                yield f"{name}: {type(member).__name__}"
        yield ""


def operator_lines() -> Iterator[str]:
    """The schemas of torch.ops.latte_ext."""
    import torch

    yield "# torch.ops.latte_ext"
    schemas = torch._C._jit_get_all_schemas()
    yield from sorted(str(s) for s in schemas if s.name.startswith("latte_ext::"))
    yield ""


def declarations(header: str) -> list[str]:
    """A header without comments: its macros, then one declaration or member a line."""
    code = re.sub(r"/\*.*?\*/|//[^\n]*|LATTE_EXPORT ", " ", header, flags=re.DOTALL)
    code = code.replace("\\\n", " ")
    directives = re.findall(r"^#.*", code, flags=re.MULTILINE)
    code = re.sub(r"^#.*", "", code, flags=re.MULTILINE)
    lines = [line for line in directives if re.match(r"#define \w+\(", line)]
    lines += re.sub(r"([;{])", r"\1\n", re.sub(r"\s+", " ", code)).splitlines()
    return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]


def header_lines() -> Iterator[str]:
    """What C and C++ programs compile against."""
    for name in HEADERS:
        yield f"# latte/{name}"
        yield from declarations((ROOT / "cpp" / "include" / "latte" / name).read_text())
        yield ""


def public_api() -> str:
    """The whole text."""
    return "\n".join([*python_lines(), *operator_lines(), *header_lines()])


def main(arguments: list[str]) -> int:
    """Prints the text, or writes the snapshot."""
    if arguments == ["--update"]:
        SNAPSHOT.write_text(public_api())
    elif not arguments:
        print(public_api(), end="")
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
