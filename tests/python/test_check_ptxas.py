# SPDX-License-Identifier: Apache-2.0
"""The gate on what nvcc makes of kernels: what it reads, and that it fails where it should."""

import importlib.util
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

USED = {"registers": 100, "stack": 0, "spills": 0, "mma": 4}


def test_parse_ptxas() -> None:
    assert check_ptxas.parse_ptxas(LOG) == {
        ("sm_80", "_Z1av"): {"registers": 15, "stack": 0, "spills": 0},
        ("sm_90", "_Z1av"): {"registers": 255, "stack": 32, "spills": 64},
    }


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
    assert (
        table.splitlines()[2] == "| `k` | 2 | 128 / 100 | 0 / 0 | 0 / 0 | 4 / 4 | 0 / 0 | 0 / 0 |"
    )
