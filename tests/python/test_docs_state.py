# SPDX-License-Identifier: Apache-2.0
"""The code of docs/state.md runs as it stands there, and does what its comments say."""

import re
from pathlib import Path
from typing import Any

import torch

PAGE = (Path(__file__).parents[2] / "docs" / "state.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block, "state.md", "exec"), names)
    return names


def test_the_page_runs() -> None:
    draft, batch, stored, prefixes, idle = map(run, BLOCKS)
    assert draft["y"].shape == (3, 4, 5, 32)
    assert (draft["state"].norm == 0).flatten(1).all(1).tolist() == [False, True, False]
    assert batch["logits"].shape == (2, 64)
    assert torch.equal(
        stored["again"][1].attention.latent.mean, stored["cache"][1].attention.latent.mean
    )
    assert prefixes["prefixes"].get(prefixes["system"][0])[0] == 48
    assert 0 < idle["error"] < 0.02
    assert idle["state"].mean.shape == (1, 2, 16, 64)
    header = len(idle["state"].to_bytes()) - idle["state"].nbytes
    assert f"{header} bytes of header" in PAGE
