# SPDX-License-Identifier: Apache-2.0
"""The README's code runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_has_code() -> None:
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("block", BLOCKS)
def test_readme_block_runs(block: str) -> None:
    if "transformers" in block:
        pytest.importorskip("transformers")
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
    if "text" in names:
        text = names["text"]
        assert isinstance(text, torch.Tensor)
        assert 600 < text.shape[1] <= 650
    elif "logits" in names:
        logits = names["logits"]
        assert isinstance(logits, torch.Tensor)
        assert logits.shape == (2, 256)
        assert logits.isfinite().all()
    elif "model" in names:
        model = names["model"]
        assert isinstance(model, torch.nn.Module)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert not any(isinstance(m, torch.nn.MultiheadAttention) for m in model.modules())
    else:
        y_next, q = names["y_next"], names["q"]
        assert isinstance(y_next, torch.Tensor)
        assert isinstance(q, torch.Tensor)
        assert y_next.shape == (1, 8, 64)
        assert y_next.isfinite().all()
