# SPDX-License-Identifier: Apache-2.0
"""Four processes with parts of sequences, and the comparison with one that holds them whole."""

from __future__ import annotations

import dataclasses
import datetime
import multiprocessing
import os
import pickle
import socket
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import latte_ext
import torch
import torch.distributed as dist
from helpers import TOLERANCES, assert_close, compute_dtype
from latte_ext.distributed import context_parallel
from torch import Tensor

RANKS = 4
# The dimension of the tokens of an argument, by its name; others are the same on every rank.
TOKENS = dict.fromkeys(("q", "k", "v", "q_latent", "k_latent", "v_latent"), 2)
TOKENS |= dict.fromkeys(("x", "a", "b", "gate_a", "gate_x", "key_mask"), 1)

# Of 70 tokens, by rank: even, uneven, of one token, of none, at the start and at the end.
LENGTHS = [(35, 35), (1, 69), (30, 0, 40), (0, 50, 20), (20, 7, 43, 0), (3, 1, 60, 6)]
# The same tokens by sequence.
PACKED = [[70], [0, 35, 35, 0], [20, 0, 0, 7, 3, 39, 1], [1] * 70, [69, 1], [10, 50, 10]]


def packed(sequences: Sequence[int]) -> Tensor:
    """cu_seqlens of sequences with these lengths."""
    return torch.tensor([0, *sequences]).cumsum(0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(rank: int, ranks: int, port: int, seconds: float = 60) -> None:
    """Make this process one of `ranks`, on one thread."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a host's own name may not resolve
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=seconds),
    )  # fmt: skip


class Pool:
    """Processes that run functions of importable modules, all of them together."""

    def __init__(self, ranks: int) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        pairs = [context.Pipe() for _ in range(ranks)]
        self.connections = [parent for parent, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, ranks, port, child), daemon=True)
            for rank, (_, child) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(group, rank, *args) returns on each of the first `ranks` processes."""
        for connection in self.connections[:ranks]:
            connection.send_bytes(pickle.dumps((ranks, function, args)))
        answers = [pickle.loads(c.recv_bytes()) for c in self.connections[:ranks] if c.poll(300)]
        failures = [answer for answer in answers if isinstance(answer, str)]
        assert not failures, "\n".join(failures)
        assert len(answers) == ranks
        return [result for (result,) in answers]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(30)


def _serve(rank: int, ranks: int, port: int, connection: Connection) -> None:
    join(rank, ranks, port)
    torch.use_deterministic_algorithms(True)  # poisons memory, see conftest.py
    warnings.simplefilter("error")
    groups = {size: dist.new_group(list(range(size))) for size in range(2, ranks + 1)}
    while True:
        try:
            size, function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            break
        try:
            answer: Any = (function(groups[size], rank, *args),)
        except Exception:
            answer = traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an operator of latte_ext: tensors by name, and options."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Call:
        return dataclasses.replace(
            self,
            tensors={
                name: x.to(dtype) if x.is_floating_point() else x
                for name, x in self.tensors.items()
            },
        )

    def part(self, tokens: slice) -> Call:
        """What a rank with these tokens is given."""
        parts = {}
        for name, x in self.tensors.items():
            index = [slice(None)] * x.dim()
            if name in TOKENS:
                index[TOKENS[name]] = tokens
            parts[name] = x[tuple(index)].clone()
        return dataclasses.replace(self, tensors=parts)

    def solve(self, function: Callable[..., Tensor], dy: Tensor) -> dict[str, Tensor]:
        """y, and the gradient of every floating-point tensor."""
        tensors = {
            name: x.detach().requires_grad_(x.is_floating_point())
            for name, x in self.tensors.items()
        }
        y = function(**tensors, **self.options)
        inputs = {f"d_{name}": x for name, x in tensors.items() if x.requires_grad}
        gradients = torch.autograd.grad(
            y, list(inputs.values()), dy.to(y.dtype), allow_unused=True, materialize_grads=True
        )
        return {"y": y.detach(), **dict(zip(inputs, gradients, strict=True))}


def cuts(lengths: Sequence[int]) -> list[slice]:
    """The tokens of every rank."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def assert_sharded_is_whole(
    pool: Pool, call: Call, lengths: Sequence[int], *, factor: float = 1.0
) -> None:
    """T5: outputs and gradients over ranks are those of one process in float64."""
    whole = call.to(torch.float64)
    function = getattr(latte_ext, call.op)
    first = next(iter(call.tensors))
    dim = TOKENS[first]
    y = function(**whole.tensors, **whole.options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    dy = dy.to(call.tensors[first].dtype)
    expected = whole.solve(function, dy)

    pieces = cuts(lengths)
    shards = [dy.narrow(dim, piece.start, piece.stop - piece.start) for piece in pieces]
    parts = [(call.part(piece), part.clone()) for piece, part in zip(pieces, shards, strict=True)]
    results = pool.run(len(lengths), _shard_of, parts)
    assert expected.keys() == results[0].keys()
    wide = TOLERANCES[compute_dtype(call.tensors[first].dtype)]
    for name, want in expected.items():
        token_dim = dim if name == "y" else TOKENS.get(name[2:])
        values = [result[name] for result in results]
        got = torch.stack(values).sum(0) if token_dim is None else torch.cat(values, token_dim)
        tolerance = factor * (wide.value if name == "y" else wide.gradient)
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        assert_close(got, want, tolerance=tolerance, scale=scale, name=name)


def _shard_of(
    group: dist.ProcessGroup, rank: int, parts: list[tuple[Call, Tensor]]
) -> dict[str, Tensor]:
    call, dy = parts[rank]
    return call.solve(context_parallel(getattr(latte_ext, call.op), group), dy)
