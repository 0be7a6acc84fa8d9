# SPDX-License-Identifier: Apache-2.0
"""Models whose sequences are sharded over ranks, and what keeps shards from whole operators."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import latte_ext
import pytest
import torch
import torch.distributed as dist
from helpers import random_mask
from latte_ext import LatentState
from latte_ext.distributed import context_parallel
from latte_ext.nn import (
    VARIANTS,
    LatentAttention,
    LatteConfig,
    LatteEncoder,
    LatteLM,
)
from sharded_helpers import LENGTHS, Pool, cuts, packed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def build(variant: str, **options: Any) -> LatteLM:
    torch.manual_seed(3)
    config = LatteConfig.named(
        variant, vocab_size=11, embed_dim=12, num_layers=2, num_heads=2, num_latents=3, **options
    )
    return LatteLM(config, dtype=torch.float64)


def lm_loss(model: nn.Module, tokens: Tensor, targets: Tensor, **rows: Any) -> Tensor:
    logits = model(tokens, **rows)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def _train(
    group: dist.ProcessGroup,
    rank: int,
    variant: str,
    options: dict[str, Any],
    parts: list[tuple[Tensor, Tensor]],
    rows: list[dict[str, Tensor]],
) -> tuple[Tensor, dict[str, Tensor]]:
    model = context_parallel(build(variant, **options), group)
    loss = lm_loss(model, *parts[rank], **rows[rank])
    loss.backward()
    return loss.detach(), gradients(model)


def assert_model_is_whole(
    pool: Pool,
    variant: str,
    lengths: tuple[int, ...],
    *,
    sequences: list[int] | None = None,
    mask: Tensor | None = None,
    **options: Any,
) -> None:
    batch = 2 if sequences is None else 1
    tokens, targets = torch.randint(11, (2, batch, 70), generator=torch.Generator().manual_seed(1))
    rows = {} if sequences is None else {"cu_seqlens": packed(sequences)}
    whole_rows = rows if mask is None else {**rows, "key_mask": mask}
    model = build(variant, **options)
    loss = lm_loss(model, tokens, targets, **whole_rows)
    loss.backward()

    parts = [(tokens[:, piece].clone(), targets[:, piece].clone()) for piece in cuts(lengths)]
    shard_rows = [
        rows if mask is None else {**rows, "key_mask": mask[:, piece].clone()}
        for piece in cuts(lengths)
    ]
    results = pool.run(len(lengths), _train, variant, options, parts, shard_rows)
    torch.testing.assert_close(sum(result[0] for result in results), loss.detach())
    for name, want in gradients(model).items():
        got = torch.stack([result[1][name] for result in results]).sum(0)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_variant(pool: Pool, variant: str, lengths: tuple[int, ...]) -> None:
    options = {"window": 9} if "window" in VARIANTS[variant] else {}
    assert_model_is_whole(pool, variant, lengths, **options)


@pytest.mark.parametrize("variant", ["latte-rglru-swa++", "latte-conv-swa++"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_and_masked(pool: Pool, variant: str, lengths: tuple[int, ...]) -> None:
    sequences = [20, 0, 7, 3, 39, 1]
    assert_model_is_whole(pool, variant, lengths, sequences=sequences, window=9)
    assert_model_is_whole(pool, variant, lengths, mask=random_mask(2, 70), window=9)
    assert_model_is_whole(
        pool, variant, lengths, sequences=sequences, mask=random_mask(1, 70), window=9
    )


def test_heads_in_groups(pool: Pool) -> None:
    assert_model_is_whole(pool, "latte-conv-swa++", (20, 7, 43), kv_heads=1, latent_heads=2)


def build_encoder(mixer: str) -> LatteEncoder:
    torch.manual_seed(3)
    config = LatteConfig(11, 12, 1, 2, 3, window=9, mixer=mixer, norm="rms")  # type: ignore[arg-type]
    return LatteEncoder(config, 5, dtype=torch.float64)


def _classify(
    group: dist.ProcessGroup, rank: int, mixer: str, parts: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    model = context_parallel(build_encoder(mixer), group)
    tokens, mask = parts[rank]
    logits = model(tokens, key_mask=mask)
    if rank == 1:
        F.cross_entropy(logits, torch.tensor([1, 4])).backward()
    else:
        (0 * logits.sum()).backward()
    return logits.detach(), gradients(model)


@pytest.mark.parametrize("mixer", ["conv", "rglru"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_encoder(pool: Pool, mixer: str, lengths: tuple[int, ...]) -> None:
    tokens, mask = torch.randint(11, (2, 70)), random_mask(2, 70)
    model = build_encoder(mixer)
    logits = model(tokens, key_mask=mask)
    F.cross_entropy(logits, torch.tensor([1, 4])).backward()
    parts = [(tokens[:, piece].clone(), mask[:, piece].clone()) for piece in cuts(lengths)]
    results = pool.run(len(lengths), _classify, mixer, parts)
    for got, _ in results:
        torch.testing.assert_close(got, logits.detach())
    for name, want in gradients(model).items():
        got = torch.stack([result[1][name] for result in results]).sum(0)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=name)


def _checkpointed(
    group: dist.ProcessGroup, rank: int, parts: list[tuple[Tensor, Tensor]]
) -> list[dict[str, Tensor]]:
    """Gradients of the two halves of a batch of blocks, recomputed in backward or not."""
    found = []
    for recompute in (False, True):
        model = context_parallel(build("latte-rglru-swa++", window=9), group)
        x = model.embedding(parts[rank][0])
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        x.square().sum().backward()
        found.append(gradients(model))
    return found


def test_activation_checkpoints(pool: Pool) -> None:
    tokens = torch.randint(11, (2, 70))
    parts = [(tokens[:, piece].clone(), tokens) for piece in cuts((20, 7, 43))]
    for plain, recomputed in pool.run(3, _checkpointed, parts):
        for name, want in plain.items():
            assert torch.equal(recomputed[name], want), name


def test_only_its_own_package_imports_torch_distributed() -> None:
    package = Path(latte_ext.__file__).parent
    users = {
        path.relative_to(package).parts[0]
        for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) torch\.distributed", path.read_text(), re.MULTILINE)
    }
    assert users == {"distributed"}
    code = "import sys, latte_ext; assert 'latte_ext.distributed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


class Unwrapped(nn.Module):
    """A layer of a user's own beside one of the library."""

    def __init__(self) -> None:
        super().__init__()
        self.known = LatentAttention(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.known(x)
        heads = y.unsqueeze(1)
        return latte_ext.latent_attention(heads, heads, heads)


def _errors(group: dist.ProcessGroup, rank: int) -> dict[str, str]:
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard

    mesh = DeviceMesh.from_group(group, "cpu")
    x = torch.randn(1, 2, 5, 3)
    sharded = DTensor.from_local(x, mesh, [Shard(2)])
    state = LatentState.empty(1, 2, 3, 3)
    rows = torch.randn(1, 5, 4)
    lm = context_parallel(build("latte-rglru-swa++", window=9), group)
    tokens = torch.randint(11, (1, 5))

    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.known = LatentAttention(8, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return latte_ext.latent_attention_step(x[:, :, 0], x[:, :, 0], x[:, :, 0], state)

    stepping = context_parallel(Stepping(), group)
    attempts = {
        "unwrapped": lambda: context_parallel(Unwrapped(), group)(torch.randn(1, 5, 8)),
        "step": lambda: stepping(x),
        "q": lambda: latte_ext.latent_attention(sharded, x, x),
        "v": lambda: latte_ext.sliding_window_attention(x, x, sharded, window=3),
        "k_latent": lambda: latte_ext.macchiato_attention(
            torch.randn(1, 2, 5, 4), sharded, x, x, x, window=3
        ),
        "b": lambda: latte_ext.linear_recurrence(rows, DTensor.from_local(rows, mesh, [Shard(1)])),
        "cache": lambda: lm(tokens, return_cache=True),
        "prefill": lambda: lm.prefill(tokens),
        "batch": lambda: lm(torch.randint(11, (1 + rank, 5))),
        "twice": lambda: context_parallel(lm, group),
        "no layers": lambda: context_parallel(nn.Linear(2, 2), group),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "no error"
        except (RuntimeError, ValueError, TypeError) as error:
            found[name] = str(error)
    # The regions are left with the errors.
    latte_ext.latent_attention(x, x, x)
    return found


def test_what_is_refused(pool: Pool) -> None:
    inside = "got a call within a context-parallel model"
    expected = {
        "unwrapped": f"[latent_attention] {inside}",
        "step": f"[latent_attention_step] {inside}",
        "q": "[latent_attention] q is a DTensor with placements (Shard(dim=2),)",
        "v": "[sliding_window_attention] v is a DTensor with placements (Shard(dim=2),)",
        "k_latent": "[macchiato_attention] k_latent is a DTensor",
        "b": "[linear_recurrence] b is a DTensor with placements (Shard(dim=1),)",
        "cache": "[rg_lru] got return_state on sharded sequences",
        "prefill": "[rg_lru] got return_state on sharded sequences",
        "batch": "[LatteLM] ranks have batches of [1, 2], expected one size",
        "twice": "[context_parallel] target is a LatteLM with layers that are parallel already",
        "no layers": "[context_parallel] target is a Linear without layers of latte_ext.nn",
    }
    for found in pool.run(2, _errors):
        for name, start in expected.items():
            assert found[name].startswith(start), (name, found[name])
