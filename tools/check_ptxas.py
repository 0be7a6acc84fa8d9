#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles cuda/*.cu with nvcc, warnings as errors, and holds each kernel to its budget.

cuda/resources.json has, per architecture and kernel, the registers that ptxas may use and the
tensor-core and copy instructions that its PTX must still have. Spills and a stack frame fail,
unless the budget gives their bytes and says "why". --update writes what this nvcc measures; --table
writes the budget and what it makes of occupancy into docs/gpu.md, and every run fails where that is
stale. What nvcc made of a source is kept in build/ptxas until the source or a header changes.
Where nvdisasm is found, the machine code must have the tensor cores' HMMA and no local memory.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUDGET = ROOT / "cuda" / "resources.json"
PAGE = ROOT / "docs" / "gpu.md"
CACHE = ROOT / "build" / "ptxas"
# The kernels that the targets of docs/gpu.md are about, and the short ones.
QUICK = (
    "attention_bfloat16", "attention_rows", "gradient_bfloat16", "latent_attention_backward",
    "merge", "segments", "step", "window_bfloat16", "window_rows",
)  # fmt: skip
INSTRUCTIONS = {"mma": "mma.sync", "ldmatrix": "ldmatrix.sync", "cp.async": "cp.async.cg"}
FLAGS = [
    *("-std=c++20", "-O3", "-ftz=true", "-lineinfo", "-Werror=all-warnings"),
    *("-Xcompiler=-Wall,-Wextra,-fPIC", "-Xptxas=-v", "-Dlatte_EXPORTS"),
    "--expt-relaxed-constexpr",
]

# In machine code: products on tensor cores, and accesses of local memory.
MACHINE = {"hmma": re.compile(r"\bHMMA\."), "local": re.compile(r"\b(?:LDL|STL)\b")}

Resources = dict[str, Any]  # of one kernel
Kernels = dict[str, Resources]  # by name
Budget = dict[str, Kernels]  # by architecture, as sm_90

# An H100: registers, threads and KiB of shared memory of a multiprocessor, and their number.
REGISTERS, THREADS, SHARED, MULTIPROCESSORS = 65536, 2048, 228, 132
# Design rates, not measured: bytes per second, and operations of mma.sync in bfloat16.
BANDWIDTH, PRODUCTS = 3.0e12, 5.0e14


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


@functools.cache
def disassembler() -> str | None:
    """nvdisasm of the toolkit or of its package for Python, if there is one."""
    packaged = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/bin/nvdisasm")
    return shutil.which("nvdisasm") or next(map(str, packaged), None)


def count_machine_code(listing: str) -> dict[str, dict[str, int]]:
    """Mangled kernel -> how often a listing of nvdisasm has each of MACHINE."""
    parts = re.split(r"^\.text\.(\w+):$", listing, flags=re.MULTILINE)
    return {
        name: {what: len(pattern.findall(code)) for what, pattern in MACHINE.items()}
        for name, code in zip(parts[1::2], parts[2::2], strict=True)
    }


def machine_code(cubin: Path) -> dict[str, dict[str, int]]:
    if (tool := disassembler()) is None:
        return {}
    listing = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True)
    return count_machine_code(listing.stdout)


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "gone"


def measure(source: Path, arch: str, include: list[str]) -> Kernels:
    """The kernels of a source, from the cache where nothing that it includes has changed."""
    kept = CACHE / f"{source.stem}_{arch}.json"
    settings = [nvcc_version(), disassembler(), *FLAGS]
    if kept.exists():
        stored = json.loads(kept.read_text())
        if stored["settings"] == settings and all(
            file_hash(ROOT / path) == known for path, known in stored["files"].items()
        ):
            kernels: Kernels = stored["kernels"]
            return kernels
    kernels, files = compile_source(source, arch, include)
    CACHE.mkdir(parents=True, exist_ok=True)
    hashes = {path: file_hash(ROOT / path) for path in files}
    kept.write_text(json.dumps({"settings": settings, "files": hashes, "kernels": kernels}))
    return kernels


def compile_source(source: Path, arch: str, include: list[str]) -> tuple[Kernels, list[str]]:
    """The kernels, and the files of this repository that they are made of."""
    includes = [f"-I{path}" for path in (ROOT, ROOT / "cpp/src", ROOT / "cpp/include", *include)]
    with tempfile.TemporaryDirectory() as scratch:
        dependencies = Path(scratch, "dependencies")
        command = ["nvcc", *FLAGS, *includes, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += ["--keep", "--keep-dir", scratch, "-MD", "-MF", str(dependencies)]
        result = subprocess.run(
            [*command, "-c", str(source), "-o", f"{scratch}/object.o"],
            capture_output=True,
            text=True,
        )
        log = result.stdout + result.stderr
        if result.returncode:
            sys.exit(f"nvcc fails on {source.relative_to(ROOT)}:\n{log}")
        ptx = next(Path(scratch).glob("*.ptx")).read_text()
        machine = machine_code(next(Path(scratch).glob("*.cubin")))
        words = dependencies.read_text().replace("\\\n", " ").split()
    files = [path.relative_to(ROOT) for path in map(Path, words) if path.is_relative_to(ROOT)]
    found = {mangled: used for (_, mangled), used in parse_ptxas(log).items()}
    names, instructions = demangle(sorted(found)), count_instructions(ptx)
    kernels = {
        names[mangled]: {**used, **instructions.get(mangled, {}), **machine.get(mangled, {})}
        for mangled, used in found.items()
    }
    return kernels, sorted(map(str, files))


def excesses(arch: str, name: str, used: Resources, allowed: Resources, same: bool) -> list[str]:
    """What of a kernel is beyond its budget; registers only with the compiler that set it."""
    kernel = f"{arch} {name}"
    bad = []
    for what in ("spills", "stack"):
        if used[what] > (allowed.get(what, 0) if allowed.get("why") else 0):
            bad.append(f"{kernel}: {used[what]} bytes of {what}, expected a budget that says why")
    if same and used["registers"] > allowed["registers"]:
        bad.append(f"{kernel}: {used['registers']} registers, budget {allowed['registers']}")
    if used.get("local") and not allowed.get("why"):
        bad.append(f"{kernel}: {used['local']} accesses of local memory, expected none")
    # What no disassembler has looked for is not missing.
    looked_for = [*INSTRUCTIONS, *({"hmma"} & used.keys())]
    for instruction in looked_for:
        if allowed.get(instruction) and not used.get(instruction):
            bad.append(f"{kernel}: no {instruction} any more")
    return bad


def compare(
    measured: Budget, budget: Budget, same_compiler: bool, complete: bool = True
) -> list[str]:
    """What is wrong; `complete`: all sources were measured, so that what is not there is gone."""
    bad = []
    for arch, kernels in measured.items():
        known = budget.get(arch, {})
        for name, used in kernels.items():
            if name not in known:
                bad.append(f"{arch} {name}: not in the budget, run tools/check_ptxas.py --update")
            else:
                bad += excesses(arch, name, used, known[name], same_compiler)
        gone = known.keys() - kernels.keys() if complete else set()
        bad += [f"{arch} {name}: in the budget, but gone" for name in sorted(gone)]
    return bad


def table(budget: Budget) -> str:
    """A row per kernel template: the most that any of its variants uses, per architecture."""
    columns = ["registers", "spills", "stack", *INSTRUCTIONS, *MACHINE]
    lines = [f"| kernel | variants | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    per_arch = [budget[arch] for arch in sorted(budget)]
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
        lines.append(f"| `{template}` | {max(map(len, variants))} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def resident_blocks(registers: int, threads: int, shared: int) -> int:
    """Blocks that share a multiprocessor: registers in eights per thread, 1 KiB for each block."""
    of_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(of_registers, THREADS // threads, SHARED * 1024 // (shared + 1024))


def occupancy_row(launch: dict[str, Any], used: Resources) -> str:
    """A launch of tools/plan_table.cpp, with the registers of its kernel."""
    blocks = resident_blocks(used["registers"], launch["threads"], launch["shared"])
    busy = min(blocks, -(-launch["blocks"] // MULTIPROCESSORS))
    floor = launch["least"] / BANDWIDTH
    cells = [
        launch["call"], launch["shape"], f"`{launch['kernel'].split('<')[0]}`",
        f"{launch['blocks']:,}", used["registers"],
        f"{launch['shared'] / 1024:.0f} ({launch['stages']})",
        blocks, busy * launch["threads"] // 32,
        f"{launch['blocks'] / (blocks * MULTIPROCESSORS):.2f}",
        f"{100 * launch['least'] / launch['moved']:.0f} %",
        f"{100 * 4096 * launch['mma'] / PRODUCTS / floor:.0f} %",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def occupancy(kernels: Kernels, include: list[str]) -> str:
    """What the planner makes of the shapes with targets; bfloat16, sm_90."""
    columns = [
        "call", "(B, H, T, L, D)", "kernel", "blocks", "registers", "shared KiB (stages)",
        "blocks per SM", "warps per SM", "waves", "floor / bytes", "products / floor",
    ]  # fmt: skip
    paths = [f"-I{path}" for path in (ROOT, ROOT / "cpp/include", *include)]
    with tempfile.TemporaryDirectory() as scratch:
        program = f"{scratch}/plan_table"
        subprocess.run(
            ["c++", "-std=c++20", *paths, str(ROOT / "tools/plan_table.cpp"), "-o", program],
            check=True,
        )
        out = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    rows = [
        occupancy_row(launch, kernels[launch["kernel"]])
        for launch in map(json.loads, out.splitlines())
    ]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]) + "\n"


def page_with(tables: dict[str, str]) -> str:
    """docs/gpu.md with these tables between their marks."""
    page = PAGE.read_text()
    for name, text in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = page.split(begin)
        page = before + begin + text + end + rest.split(end)[1]
    return page


@functools.cache
def nvcc_version() -> str:
    out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V([\d.]+)", out)
    return match[1] if match else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--include", action="append", default=[], help="folder of latte/export.h")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the kernels of QUICK, on sm_90 alone")
    parser.add_argument("--only", nargs="+", metavar="SOURCE", help="of these, as step or rotate")
    parser.add_argument("--arch", action="append", help="90, ..: instead of those of the budget")
    parser.add_argument("--update", action="store_true", help="write the budget and its tables")
    parser.add_argument("--table", action="store_true", help="write the tables, compile no kernel")
    args = parser.parse_args()

    stored = json.loads(BUDGET.read_text())
    budget: Budget = stored["kernels"]

    def tables() -> dict[str, str]:
        return {
            "resources": table(budget), "occupancy": occupancy(budget["sm_90"], args.include)
        }  # fmt: skip

    if args.table:
        PAGE.write_text(page_with(tables()))
        return
    architectures = ["90"] if args.quick else args.arch or [arch[3:] for arch in sorted(budget)]
    chosen = args.only or (QUICK if args.quick else None)
    sources = [
        source
        for source in sorted((ROOT / "cuda").glob("*.cu"))
        if chosen is None or source.stem in chosen
    ]
    version = nvcc_version()
    measured: Budget = {f"sm_{arch}": {} for arch in architectures}
    with ThreadPoolExecutor(args.jobs) as pool:
        for arch in architectures:
            tasks = [pool.submit(measure, source, arch, args.include) for source in sources]
            for task in tasks:
                measured[f"sm_{arch}"].update(task.result())
    if args.update:
        update(stored, measured, version, complete=chosen is None)
        PAGE.write_text(page_with(tables()))
    same = version == stored["nvcc"]
    bad = compare(measured, budget, same, complete=chosen is None)
    if PAGE.read_text() != page_with(tables()):
        bad.append("docs/gpu.md: its tables are stale, run tools/check_ptxas.py --table")
    count = sum(map(len, measured.values()))
    if disassembler() is None:
        print("machine code NOT read: no nvdisasm here")
    print(
        f"nvcc {version}: {len(sources)} sources for {', '.join(measured)}, {count} kernels, "
        f"{len(bad)} beyond their budget"
    )
    sys.exit("\n".join(bad) if bad else 0)


def update(stored: dict[str, Any], measured: Budget, version: str, complete: bool) -> None:
    """The budget becomes what was measured; reasons and what was not measured stay."""
    budget: Budget = stored["kernels"]
    for arch, kernels in measured.items():
        known = budget.setdefault(arch, {})
        for name, used in kernels.items():
            if why := known.get(name, {}).get("why"):
                used["why"] = why
        budget[arch] = kernels if complete else {**known, **kernels}
    stored["nvcc"] = version
    BUDGET.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
