# SPDX-License-Identifier: Apache-2.0
"""What context parallelism sends, what it does when a rank fails, and training under torchrun."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import latte_ext
import pytest
import torch
import torch.distributed as dist
from latte_ext.distributed import context_parallel, shard_sequence
from latte_ext.nn import VARIANTS, LatteConfig, LatteLM
from sharded_helpers import Pool, free_port, join
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_context_parallel.py"


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends, one entry per collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # c10d's schemas are (output, input, ...).
            self.sent.append((func._opname, args[1].numel() * args[1].element_size()))
        return func(*args, **(kwargs or {}))


def _latent_traffic(group: dist.ProcessGroup, rank: int, tokens: int) -> list[tuple[str, int]]:
    q, k, v = (
        torch.randn(2, h, tokens, c, requires_grad=True) for h, c in ((4, 5), (2, 5), (2, 6))
    )
    with Traffic() as traffic:
        y = context_parallel(latte_ext.latent_attention, group)(q, k, v)
        y.sum().backward()
    return traffic.sent


def test_latent_attention_sends_one_state(pool: Pool) -> None:
    state = 2 * 2 * (2 * 5 + 5 * 6) * 4  # B Hk (2L + L D) float32 numbers
    for tokens in (16, 1024):
        for rank, sent in enumerate(pool.run(3, _latent_traffic, tokens)):
            assert sent == [("_allgather_base_", state), ("alltoall_base_", rank * state)]


def _model_traffic(
    group: dist.ProcessGroup, rank: int, variant: str, tokens: int
) -> list[tuple[str, int]]:
    options = {"window": 9} if "window" in VARIANTS[variant] else {}
    config = LatteConfig.named(
        variant, vocab_size=11, embed_dim=12, num_layers=2, num_heads=2, num_latents=3, **options
    )
    model = context_parallel(LatteLM(config), group)
    with Traffic() as traffic:
        model(torch.randint(11, (1, tokens))).sum().backward()
    return traffic.sent


@pytest.mark.parametrize("variant", VARIANTS)
def test_traffic_of_models_does_not_depend_on_tokens(pool: Pool, variant: str) -> None:
    few, many = (pool.run(3, _model_traffic, variant, tokens) for tokens in (16, 256))
    assert few == many
    assert all(sent for sent in few)


def _fail(rank: int, port: int, kind: str, connection: Connection) -> None:
    join(rank, 3, port, seconds=4)
    x = torch.randn(1, 2, 8, 3, requires_grad=True)
    op = context_parallel(latte_ext.latent_attention)
    op(x, x, x).sum().backward()
    if rank == 1:
        if kind == "stall":
            time.sleep(3600)  # until it is killed: the others end before, or they hang
        return
    try:
        op(x, x, x).sum().backward()
        connection.send("no error")
    except RuntimeError as error:
        connection.send(str(error))


@pytest.mark.parametrize("kind", ["stall", "die"])
def test_a_rank_that_fails_ends_the_others_in_time(kind: str) -> None:
    context, port = multiprocessing.get_context("spawn"), free_port()
    pairs = [context.Pipe(duplex=False) for _ in range(3)]
    processes = [
        context.Process(target=_fail, args=(rank, port, kind, sender))
        for rank, (_, sender) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    try:
        for rank in (0, 2):
            receiver = pairs[rank][0]
            assert receiver.poll(120), f"rank {rank} hangs"
            message = receiver.recv()
            assert re.match(r"\[latent_attention\] all_gather\w* over 3 ranks failed", message)
            assert "dead, stalled" in message
    finally:
        for process in processes:
            process.kill()
            process.join()


def _shards(group: dist.ProcessGroup, rank: int) -> tuple[list[Tensor], list[str]]:
    x = torch.arange(20).view(2, 10)
    errors = []
    for lengths in ((5, 5), (4, 4, 4), (12, -2, 0)):
        try:
            shard_sequence(x, group, dim=1, lengths=lengths)
        except ValueError as error:
            errors.append(str(error))
    return [
        shard_sequence(x, group, dim=1),
        shard_sequence(x, group, dim=1, lengths=(1, 0, 9)),
        shard_sequence(x.T, group, dim=0),
    ], errors


def test_sequences_are_cut(pool: Pool) -> None:
    x = torch.arange(20).view(2, 10)
    results = pool.run(3, _shards)
    assert [parts[0].shape[1] for parts, _ in results] == [4, 3, 3]
    assert [parts[1].shape[1] for parts, _ in results] == [1, 0, 9]
    for i, dim in ((0, 1), (1, 1), (2, 0)):
        whole = torch.cat([parts[i] for parts, _ in results], dim)
        assert torch.equal(whole, x if dim == 1 else x.T)
    for _, errors in results:
        assert len(errors) == 3
        assert all(error.startswith("[shard_sequence] lengths are (") for error in errors)


def test_the_projection_is_computed_as_the_page_says() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert load(ROOT / "tools" / "project_context_parallel.py").table() in page


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_whole(steps: int) -> list[float]:
    """The example's training in this process, without torch.distributed."""
    example = load(EXAMPLE)
    model = example.build_model()
    optimizer = example.build_optimizer(model)
    losses = []
    for step in range(steps):
        loss = example.summed_loss(model, *example.documents(step))
        loss = loss / (example.BATCH * example.TOKENS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def launch(ranks: int, *arguments: str) -> list[tuple[int, float]]:
    """(step, loss) of the example on so many ranks."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()), str(EXAMPLE), *arguments,
    ]  # fmt: skip
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = re.findall(r"step (\d+) loss ([\d.]+)", ran.stdout)
    return [(int(step), float(loss)) for step, loss in found]


@pytest.mark.slow
def test_training_goes_on_at_another_world_size(tmp_path: Path) -> None:
    expected = list(enumerate(train_whole(6)))
    folder = str(tmp_path / "checkpoint")
    losses = launch(4, "--dp", "2", "--cp", "2", "--steps", "3", "--save", folder)
    losses += launch(3, "--cp", "3", "--wrap", "ddp", "--steps", "5", "--resume", folder,
                     "--save", folder + "2")  # fmt: skip
    losses += launch(1, "--steps", "6", "--resume", folder + "2")
    assert [step for step, _ in losses] == list(range(6))
    for (_, got), (_, want) in zip(losses, expected, strict=True):
        assert abs(got - want) < 2e-5


@pytest.mark.parametrize("option", ["--save", "--resume"])
def test_a_checkpoint_without_numpy_is_refused_before_the_training(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load(EXAMPLE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        example.main([option, "checkpoint"])
    assert "needs numpy, which is not installed" in capsys.readouterr().err
