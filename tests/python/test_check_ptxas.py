# SPDX-License-Identifier: Apache-2.0
"""The gate on what nvcc makes of kernels: what it reads, and that it fails where it should."""

import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_ptxas.py"
spec = importlib.util.spec_from_file_location("check_ptxas", TOOL)
assert spec is not None
assert spec.loader is not None
check_ptxas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_ptxas)

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 15 registers, used 3 barriers, 368 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
ptxas info    : Function properties for _Z1av
    32 bytes stack frame, 24 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, 368 bytes cmem[0]
"""

USED = {"registers": 100, "stack": 0, "spills": 0, "mma": 4, "hmma": 4, "local": 0}


def test_parse_ptxas() -> None:
    assert check_ptxas.parse_ptxas(LOG) == {
        ("sm_80", "_Z1av"): {"registers": 15, "stack": 0, "spills": 0},
        ("sm_90", "_Z1av"): {"registers": 255, "stack": 32, "spills": 64},
    }


def test_count_machine_code() -> None:
    listing = (
        "\t.section\t.text._Z1av\n.text._Z1av:\n  HMMA.1688.F32.TF32 R1 ;\n  STL [R1], R92 ;\n"
        "  LDL.LU R1, [R1] ;\n  HMMA.16816.F32.BF16 R1 ;\n.text._Z1bv:\n  LDG.E R1 ;\n"
    )
    assert check_ptxas.count_machine_code(listing) == {
        "_Z1av": {"hmma": 2, "local": 2}, "_Z1bv": {"hmma": 0, "local": 0}
    }  # fmt: skip


def test_without_a_disassembler_nothing_is_missing() -> None:
    used = {what: count for what, count in USED.items() if what not in ("hmma", "local")}
    assert check_ptxas.compare({"sm_80": {"k": used}}, {"sm_80": {"k": USED}}, True) == []


def test_count_instructions() -> None:
    ptx = (
        ".visible .entry _Z1av(\n){ mma.sync.aligned.m16n8k16; mma.sync.aligned; }\n"
        ".weak .entry _Z1bv(\n){ cp.async.cg.shared.global; cp.async.wait_group 0; }\n"
    )
    assert check_ptxas.count_instructions(ptx) == {"_Z1av": {"mma": 2}, "_Z1bv": {"cp.async": 1}}


@pytest.mark.parametrize(
    ("demangled", "expected"),
    [
        ("void latte::cuda::scan<float, 4>(latte::cuda::Params)", "scan<float, 4>"),
        ("void latte::cuda::(anonymous namespace)::merge(float*)", "merge"),
        ("latte::cuda::pick<(latte::cuda::Form)2>(int)", "pick<(Form)2>"),
    ],
)
def test_short_name(demangled: str, expected: str) -> None:
    assert check_ptxas.short_name(demangled) == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"registers": 101}, "101 registers, budget 100"),
        ({"spills": 8}, "8 bytes of spills"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"mma": 0}, "no mma any more"),
        ({"hmma": 0}, "no hmma any more"),
        ({"local": 3}, "3 accesses of local memory"),
    ],
)
def test_a_kernel_beyond_its_budget(change: dict[str, int], complaint: str | None) -> None:
    bad = check_ptxas.compare(
        {"sm_80": {"k": {**USED, **change}}}, {"sm_80": {"k": USED}}, same_compiler=True
    )
    assert [complaint in line for line in bad] == ([True] if complaint else [])


def test_a_stack_frame_with_a_reason_and_registers_of_another_compiler() -> None:
    used = {"sm_80": {"k": {**USED, "stack": 16, "registers": 120}}}
    allowed = {"sm_80": {"k": {**USED, "stack": 16, "why": "the slow path of sin"}}}
    assert check_ptxas.compare(used, allowed, same_compiler=False) == []


def test_kernels_that_come_and_go() -> None:
    bad = check_ptxas.compare({"sm_80": {"new": USED}}, {"sm_80": {"old": USED}}, True)
    assert len(bad) == 2
    assert "not in the budget" in bad[0]
    assert "gone" in bad[1]


def test_table_has_the_worst_variant() -> None:
    kernels = {"k<1>": USED, "k<2>": {**USED, "registers": 128}}
    table = check_ptxas.table({"sm_80": kernels, "sm_90": {"k<1>": USED}})
    cells = table.splitlines()[2].strip("| ").split(" | ")
    assert cells[:4] == ["`k`", "2", "128 / 100", "0 / 0"]
    assert cells[4:] == ["0 / 0", "4 / 4", "0 / 0", "0 / 0", "4 / 4", "0 / 0"]


def test_part_of_the_kernels_says_nothing_of_the_others() -> None:
    budget = {"sm_80": {"k": USED, "other": USED}}
    assert check_ptxas.compare({"sm_80": {"k": USED}}, budget, True, complete=False) == []


def test_update_keeps_reasons_and_what_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_ptxas, "BUDGET", tmp_path / "resources.json")
    old = {"k": {**USED, "why": "because"}, "other": USED}
    for complete, names in ((False, {"k", "other"}), (True, {"k"})):
        stored = {"nvcc": "1", "kernels": {"sm_80": dict(old), "sm_90": {"x": USED}}}
        check_ptxas.update(stored, {"sm_80": {"k": {**USED, "stack": 8}}}, "2", complete)
        written = json.loads((tmp_path / "resources.json").read_text())
        assert written["nvcc"] == "2"
        assert written["kernels"]["sm_80"].keys() == names
        assert written["kernels"]["sm_80"]["k"] == {**USED, "stack": 8, "why": "because"}
        assert written["kernels"]["sm_90"] == {"x": USED}


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"),
    [(255, 1024, 2), (128, 1024, 4), (129, 1024, 3), (32, 1024, 16), (64, 112 * 1024, 2)],
)
def test_resident_blocks(registers: int, shared: int, blocks: int) -> None:
    assert check_ptxas.resident_blocks(registers, 128, shared) == blocks


def test_occupancy_of_a_launch() -> None:
    launch = {
        "call": "forward", "shape": "(1, 1, 1, 1, 1)", "kernel": "k<1>", "blocks": 264,
        "threads": 128, "shared": 65536, "stages": 2, "mma": 10**9, "moved": 3 * 10**12,
        "least": 15 * 10**11,
    }  # fmt: skip
    row = check_ptxas.occupancy_row(launch, {"registers": 200})
    assert (
        row
        == "| forward | (1, 1, 1, 1, 1) | `k` | 264 | 200 | 64 (2) | 2 | 8 | 1.00 | 50 % | 2 % |"
    )


def test_a_source_is_compiled_again_where_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_source(source: Path, arch: str, include: list[str]) -> tuple[object, list[str]]:
        compiled.append(arch)
        return {"k": USED}, ["header.h"]

    monkeypatch.setattr(check_ptxas, "ROOT", tmp_path)
    monkeypatch.setattr(check_ptxas, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(check_ptxas, "nvcc_version", lambda: "1")
    monkeypatch.setattr(check_ptxas, "compile_source", compile_source)
    header = tmp_path / "header.h"
    header.write_text("one")
    for text, count in (("one", 1), ("one", 1), ("two", 2)):
        header.write_text(text)
        assert check_ptxas.measure(tmp_path / "a.cu", "90", []) == {"k": USED}
        assert len(compiled) == count
    check_ptxas.measure(tmp_path / "a.cu", "80", [])
    header.unlink()
    check_ptxas.measure(tmp_path / "a.cu", "90", [])
    assert compiled == ["90", "90", "80", "90"]
