# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a GPU, with a clock of its own on the CPU."""

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from latte_ext import __main__ as command
from latte_ext import reference
from latte_ext.bench import cuda, cuda_peers
from torch import Tensor

TINY = cuda.SIZES["tiny"]


def once(call: Callable[[], object]) -> float:
    """Two microseconds, whatever it is."""
    call()
    return 2.0


def test_every_case_is_measured_after_its_result() -> None:
    said: list[str] = []
    found, rows = cuda.measure(TINY, "cpu", once, said.append)
    assert [row.name for row in rows] == [
        "causal", "bidirectional", "causal, with gradients", "step", "linear_recurrence", "rg_lru",
        "short_conv",
    ]  # fmt: skip
    assert found["copy"] == pytest.approx(2 * TINY.copy_bytes / 2e-6)
    assert found["bfloat16 product"] == pytest.approx(2 * TINY.product**3 / 2e-6)
    causal = rows[0]
    # q, k, v and y of 2 x 2 x 70 x 16 bfloat16 numbers.
    moved = 4 * 2 * 2 * 70 * 16 * 2
    assert causal.gb_per_s == pytest.approx(moved / 2e-6 / 1e9)
    assert causal.of_floor == pytest.approx(moved / (2 * TINY.copy_bytes))
    assert all(0 < row.error < cuda.ALLOWED for row in rows)
    # No peer runs here: flash attention is of CUDA, and the other library is not installed.
    assert all(
        any(peer in line for line in said) for peer in set(cuda_peers.PEERS) - set(causal.peers)
    )


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cuda.latent_attention
    monkeypatch.setattr(cuda, "latent_attention", lambda *a, **k: right(*a, **k) * 1.1)
    said: list[str] = []
    _, rows = cuda.measure(TINY, "cpu", once, said.append)
    assert not any(row.name in ("causal", "bidirectional") for row in rows)
    assert any(line.startswith("NOT timed: causal") for line in said)


def test_page_and_peers() -> None:
    row = cuda.Row("causal", "1x2", 12.34, 1000.0, 0.5, 1e-3, {"chunk_gla": 3.21})
    page = cuda.markdown("GPU", {"copy": 3e12, "bfloat16 product": 8e14}, [row])
    assert "copy 3,000 GB/s read + written, bfloat16 product 800.0 Tflop/s" in page
    assert "| causal | 1x2 | 12.3 | 1,000 | 50 % | 1.0e-03 | 3.21 |" in page
    assert json.dumps(dataclasses.asdict(row))


def test_gated_linear_attention_is_the_same_function() -> None:
    """The recurrence that chunk_gla computes: h = e^g h + k v, y = q h."""
    q, k, v = (torch.randn(2, 2, 30, 5, dtype=torch.float64) for _ in range(3))
    p, w, decay = cuda_peers.gated_inputs(*(x.transpose(1, 2).float() for x in (q, k)))
    h, rows = torch.zeros(2, 2, 5, 5), []
    for t in range(30):
        h = decay[:, t, :, :, None].exp() * h
        h = h + w[:, t, :, :, None] * v.float()[:, :, t, None, :]
        rows.append((p[:, t, :, :, None] * h).sum(2))
    expected, _ = reference.latent_attention(q, k, v)
    torch.testing.assert_close(torch.stack(rows, 2).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_peer_that_computes_something_else_is_refused() -> None:
    def zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(v)

    inputs = tuple(torch.randn(1, 9, 1, 4) for _ in range(3))
    with pytest.raises(ValueError, match=r"off by 1\.0e\+00 of the largest value, expected 3e-02"):
        cuda_peers._check(zeros, inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize("name", ["bench", "selftest"])
def test_without_a_gpu_the_commands_say_so(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([name, "--device", "cuda"]) == 1
    assert ": expected a GPU" in capsys.readouterr().out
