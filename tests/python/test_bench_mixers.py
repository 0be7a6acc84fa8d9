# SPDX-License-Identifier: Apache-2.0
"""The benchmark of recurrences and convolutions: its peers compute the same, its rows are there."""

import torch
from latte_ext import linear_recurrence, rg_lru, short_conv
from latte_ext.bench import cases, mixers


def test_peers_compute_the_same() -> None:
    x, gate_a, gate_x = torch.randn(3, 2, 30, 8)
    a, log_lambda = torch.sigmoid(gate_a), torch.randn(8)
    torch.testing.assert_close(mixers.loop(a, x), linear_recurrence(a, x))
    plain = mixers.loop(*mixers.gates(x, gate_a, gate_x, log_lambda))
    torch.testing.assert_close(plain, rg_lru(x, gate_a, gate_x, log_lambda))
    weight, bias = torch.randn(8, 4), torch.randn(8)
    torch.testing.assert_close(mixers.conv1d(x, weight, bias), short_conv(x, weight, bias))


def test_rows() -> None:
    torch.use_deterministic_algorithms(False)
    run = cases.Bench(cases.TINY, 1)
    for group in mixers.GROUPS.values():
        group(run)
    keys = {row.key for row in run.rows}
    for op in ("linear_recurrence", "rg_lru", "short_conv"):
        for which in ("forward", "backward"):
            for dtype in ("float32", "bfloat16"):
                assert f"recurrences/{op}/{which}/{dtype}/copy/1" in keys
                assert f"recurrences/{op}/{which}/{dtype}/in place/1" in keys
    assert "recurrence peers/rg_lru/training/torch loop" in keys
    assert "recurrence peers/short_conv/forward/torch conv1d" in keys
    assert all(row.value > 0 for row in run.rows)
