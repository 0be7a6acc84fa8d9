#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles every cuda/*.cu with nvcc, warnings as errors, and holds each kernel to its budget.

cuda/resources.json has, per architecture and kernel, the registers that ptxas may use and the
tensor-core and copy instructions that its PTX must still have. Spills and a stack frame fail,
unless the budget gives their bytes and says "why". --update writes what this nvcc measures; --table
writes the budget into docs/gpu.md, and every run fails where that is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "cuda" / "resources.json"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- resources: begin -->\n", "<!-- resources: end -->\n"
ARCHITECTURES = ("80", "90")
INSTRUCTIONS = {"mma": "mma.sync", "ldmatrix": "ldmatrix.sync", "cp.async": "cp.async.cg"}
FLAGS = [
    *("-std=c++20", "-O3", "-ftz=true", "-lineinfo", "-Werror=all-warnings"),
    *("-Xcompiler=-Wall,-Wextra,-fPIC", "-Xptxas=-v", "-Dlatte_EXPORTS"),
    "--expt-relaxed-constexpr",
]

Resources = dict[str, Any]  # of one kernel
Budget = dict[str, dict[str, Resources]]  # by architecture and kernel


def short_name(demangled: str) -> str:
    """The kernel and its template arguments, without return type, namespace and parameters."""
    depth, end = 0, len(demangled)
    for i, character in enumerate(demangled):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0 and not demangled.startswith("(anonymous", i):
            end = i
            break
    name = re.sub(r"^void ", "", demangled[:end])
    return re.sub(r"latte::cuda::|\(anonymous namespace\)::", "", name)


def demangle(names: list[str]) -> dict[str, str]:
    out = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return dict(zip(names, map(short_name, out.splitlines()), strict=True))


def parse_ptxas(log: str) -> dict[tuple[str, str], Resources]:
    """(architecture, mangled kernel) -> resources."""
    found: dict[tuple[str, str], Resources] = {}
    kernel = None
    frame = (0, 0, 0)
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(sm_\S+)'", line):
            kernel = (match[2], match[1])
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            frame = (int(match[1]), int(match[2]), int(match[3]))
        elif (match := re.search(r"Used (\d+) registers", line)) and kernel:
            stack, stores, loads = frame
            found[kernel] = {
                "registers": int(match[1]),
                "stack": stack,
                "spills": stores + loads,
            }
    return found


def count_instructions(ptx: str) -> dict[str, dict[str, int]]:
    """Mangled kernel -> how often its PTX has each of INSTRUCTIONS."""
    counts = {}
    for body in re.split(r"\.visible \.entry |\.weak \.entry |\n\.entry ", ptx)[1:]:
        name = re.match(r"\w+", body)
        assert name, "an entry without a name"
        found = {short: body.count(long) for short, long in INSTRUCTIONS.items()}
        counts[name[0]] = {short: count for short, count in found.items() if count}
    return counts


def measure(source: Path, include: list[str]) -> Budget:
    includes = [f"-I{path}" for path in (ROOT, ROOT / "cpp/src", ROOT / "cpp/include", *include)]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as scratch:
        command = ["nvcc", *FLAGS, *includes, *targets, "--keep", "--keep-dir", scratch]
        result = subprocess.run(
            [*command, "-c", str(source), "-o", f"{scratch}/object.o"],
            capture_output=True,
            text=True,
        )
        log = result.stdout + result.stderr
        if result.returncode:
            sys.exit(f"nvcc fails on {source.relative_to(ROOT)}:\n{log}")
        found = parse_ptxas(log)
        names = demangle(sorted({mangled for _, mangled in found}))
        budget: Budget = {}
        for arch in ARCHITECTURES:
            ptx = Path(scratch, f"{source.stem}.compute_{arch}.ptx")
            instructions = count_instructions(ptx.read_text())
            budget[f"sm_{arch}"] = {
                names[mangled]: {**used, **instructions.get(mangled, {})}
                for (target, mangled), used in found.items()
                if target == f"sm_{arch}"
            }
    return budget


def excesses(arch: str, name: str, used: Resources, allowed: Resources, same: bool) -> list[str]:
    """What of a kernel is beyond its budget; registers only with the compiler that set it."""
    kernel = f"{arch} {name}"
    bad = []
    for what in ("spills", "stack"):
        if used[what] > (allowed.get(what, 0) if allowed.get("why") else 0):
            bad.append(f"{kernel}: {used[what]} bytes of {what}, expected a budget that says why")
    if same and used["registers"] > allowed["registers"]:
        bad.append(f"{kernel}: {used['registers']} registers, budget {allowed['registers']}")
    for instruction in INSTRUCTIONS:
        if allowed.get(instruction) and not used.get(instruction):
            bad.append(f"{kernel}: no {instruction} any more")
    return bad


def compare(measured: Budget, budget: Budget, same_compiler: bool) -> list[str]:
    bad = []
    for arch, kernels in measured.items():
        known = budget.get(arch, {})
        for name, used in kernels.items():
            if name not in known:
                bad.append(f"{arch} {name}: not in the budget, run tools/check_ptxas.py --update")
            else:
                bad += excesses(arch, name, used, known[name], same_compiler)
        bad += [f"{arch} {name}: in the budget, but gone" for name in known.keys() - kernels.keys()]
    return bad


def table(budget: Budget) -> str:
    """A row per kernel template: the most that any of its variants uses, per architecture."""
    columns = ["registers", "spills", "stack", *INSTRUCTIONS]
    lines = [f"| kernel | variants | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    per_arch = [budget.get(f"sm_{arch}", {}) for arch in ARCHITECTURES]
    templates = sorted({name.split("<")[0] for kernels in per_arch for name in kernels})
    for template in templates:
        variants = [
            [used for name, used in kernels.items() if name.split("<")[0] == template]
            for kernels in per_arch
        ]
        cells = [
            " / ".join(str(max((u.get(column, 0) for u in used), default=0)) for used in variants)
            for column in columns
        ]
        lines.append(f"| `{template}` | {len(variants[0])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page_with(text: str) -> str:
    page = PAGE.read_text()
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:begin] + text + page[end:]


def nvcc_version() -> str:
    out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V([\d.]+)", out)
    return match[1] if match else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--include", action="append", default=[], help="folder of latte/export.h")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--update", action="store_true", help="write the budget and its table")
    parser.add_argument("--table", action="store_true", help="write the table, compile nothing")
    args = parser.parse_args()

    stored = json.loads(BUDGET.read_text())
    budget: Budget = stored["kernels"]
    if args.table:
        PAGE.write_text(page_with(table(budget)))
        return
    measured: Budget = {f"sm_{arch}": {} for arch in ARCHITECTURES}
    sources = sorted((ROOT / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(args.jobs) as pool:
        for part in pool.map(lambda source: measure(source, args.include), sources):
            for arch, kernels in part.items():
                measured[arch].update(kernels)
    version = nvcc_version()
    if args.update:
        for arch, kernels in measured.items():
            for name, used in kernels.items():
                if why := budget.get(arch, {}).get(name, {}).get("why"):
                    used["why"] = why
        text = json.dumps({"nvcc": version, "kernels": measured}, indent=1, sort_keys=True)
        BUDGET.write_text(text + "\n")
        PAGE.write_text(page_with(table(measured)))
        budget = measured
    bad = compare(measured, budget, version == stored["nvcc"] or args.update)
    if PAGE.read_text() != page_with(table(budget)):
        bad.append("docs/gpu.md: its table of resources is stale, run tools/check_ptxas.py --table")
    count = sum(map(len, measured.values()))
    print(
        f"nvcc {version}: {len(sources)} sources, {count} kernels, {len(bad)} beyond their budget"
    )
    sys.exit("\n".join(bad) if bad else 0)


if __name__ == "__main__":
    main()
