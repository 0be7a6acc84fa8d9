# SPDX-License-Identifier: Apache-2.0
"""Train a language model with batches over `dp` groups of ranks and sequences over `cp` ranks each.

torchrun --nproc-per-node 4 examples/train_context_parallel.py --dp 2 --cp 2 --save checkpoint
torchrun --nproc-per-node 2 examples/train_context_parallel.py --cp 2 --resume checkpoint --steps 40

The losses do not depend on how many ranks there are, nor does what is saved: training goes on from
it on another mesh. `--wrap fsdp` shards parameters over cp and replicates them over dp, `--wrap
ddp` replicates them everywhere. Documents copy their first half, which the window cannot see.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from latte_ext.distributed import context_parallel, shard_sequence
from latte_ext.nn import LatteConfig, LatteLM
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

VOCABULARY = 32
# Not a multiple of the ranks: shards are uneven.
BATCH, TOKENS = 4, 101


def build_model() -> LatteLM:
    """The same weights in every process."""
    torch.manual_seed(0)
    config = LatteConfig.named(
        "latte-rglru-swa++", vocab_size=VOCABULARY, embed_dim=32, num_layers=2, num_heads=2,
        num_latents=8, window=8,
    )  # fmt: skip
    return LatteLM(config)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def documents(step: int) -> tuple[Tensor, Tensor]:
    """Tokens (B,T) and the token after each, whole: a random half and the same half again."""
    generator = torch.Generator().manual_seed(step)
    half = torch.randint(VOCABULARY, (BATCH, TOKENS // 2 + 1), generator=generator)
    rows = torch.cat([half, half], dim=1)[:, : TOKENS + 1]
    return rows[:, :-1], rows[:, 1:]


def summed_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss of some tokens; divided by BATCH TOKENS it is their part of the mean."""
    logits = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def wrap(model: LatteLM, kind: str, mesh: DeviceMesh) -> nn.Module:
    """The model over the mesh; both kinds average gradients over all ranks."""
    context_parallel(model, mesh["cp"])
    if kind == "ddp":
        return DistributedDataParallel(model)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(args: argparse.Namespace) -> None:
    mesh = init_device_mesh("cpu", (args.dp, args.cp), mesh_dim_names=("dp", "cp"))
    model = wrap(build_model(), args.wrap, mesh)
    optimizer = build_optimizer(model)
    start = load(args.resume, model, optimizer) if args.resume else 0
    rows = slice(mesh.get_local_rank("dp"), None, args.dp)
    for step in range(start, args.steps):
        tokens, targets = (shard_sequence(x[rows], mesh["cp"], dim=1) for x in documents(step))
        loss = summed_loss(model, tokens, targets) / (BATCH * TOKENS)
        # Ranks hold parts of a sum, of which the wrapper takes the mean.
        (loss * dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step} loss {total.item():.6f}", flush=True)
    if args.save:
        save(args.save, model, optimizer, args.steps)


def save(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments, "step": step}, checkpoint_id=folder)


def load(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The number of steps that were trained."""
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return int(state["step"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dp", type=int, default=1, help="groups that share the batch")
    parser.add_argument("--cp", type=int, default=1, help="ranks that share a sequence")
    parser.add_argument("--wrap", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--steps", type=int, default=20, help="in all, resumed ones included")
    parser.add_argument("--save", help="folder of the checkpoint to write at the end")
    parser.add_argument("--resume", help="folder of a checkpoint to go on from")
    args = parser.parse_args(argv)
    if (args.save or args.resume) and importlib.util.find_spec("numpy") is None:
        parser.error("torch.distributed.checkpoint needs numpy, which is not installed")
    # A rank that dies or stalls ends the others after this, with an error.
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=2))
    try:
        train(args)
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
