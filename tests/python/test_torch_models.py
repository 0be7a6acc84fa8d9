# SPDX-License-Identifier: Apache-2.0
"""Whole models under torch's machinery: graphs that are not compiled twice, export, autocast,
checkpointing, several processes, threads."""

import concurrent.futures
import copy
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import make_problem, needs_torch, threads
from latte_ext import _register, latent_attention, linear_recurrence, short_conv
from latte_ext.nn import LatteConfig, LatteLM, LayerCache
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

VARIANT = pytest.mark.parametrize("variant", ["latte", "latte-rglru-swa++", "latte-conv++"])
OPERATORS = ("latent_attention", "macchiato_attention", "rg_lru", "short_conv")


@pytest.fixture(autouse=True)
def fresh_compiler(fixed_surroundings: None) -> Iterator[None]:
    torch.set_num_threads(1)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def language_model(variant: str = "latte-rglru-swa++") -> LatteLM:
    config = LatteConfig.named(
        variant, vocab_size=32, embed_dim=16, num_layers=2, num_heads=4, num_latents=5
    )
    return LatteLM(config)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(32, (batch, length))


def loss(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


# torch.compile -----------------------------------------------------------------------------------


@pytest.mark.supports("compile: training step, any batch and length, one graph", *OPERATORS)
@VARIANT
def test_training_steps_share_one_graph(variant: str) -> None:
    model = language_model(variant)
    step = compiled(lambda x: loss(model, x))
    for batch, length in ((3, 20), (2, 33), (5, 70)):
        x = tokens(batch, length)
        got, want = step(x), loss(model, x)
        torch.testing.assert_close(got, want)
        parameters = list(model.parameters())
        for g, w in zip(
            torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True
        ):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)
    assert graphs() == 1


@needs_torch("its compiler does not trace caches")
@pytest.mark.supports("compile: prefill, any length, one graph", *OPERATORS)
@VARIANT
def test_prefills_share_one_graph(variant: str) -> None:
    model = language_model(variant)
    prefill = compiled(model.prefill)
    for batch, length in ((2, 20), (3, 33), (4, 70)):
        x = tokens(batch, length)
        logits, cache = prefill(x)
        want, expected = model.prefill(x)
        torch.testing.assert_close(logits, want)
        after = x[:, 0]
        torch.testing.assert_close(model.step(after, cache), model.step(after, expected))
    assert graphs() == 1


@needs_torch("its compiler does not trace caches")
@pytest.mark.supports("compile: decode steps in place, one graph for all positions", *OPERATORS)
@VARIANT
def test_positions_share_one_graph(variant: str) -> None:
    model = language_model(variant)
    _, cache = model.prefill(tokens(2, 9))
    other = [layer.clone() for layer in cache]
    step = compiled(model.step)
    for row in tokens(12, 2):
        torch.testing.assert_close(step(row, other), model.step(row, cache))
    assert graphs() == 1


# torch.export ------------------------------------------------------------------------------------


class Prefill(nn.Module):
    def __init__(self, model: LatteLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, list[LayerCache]]:
        return self.model.prefill(x)


class Step(nn.Module):
    """Updates the cache that it is given."""

    def __init__(self, model: LatteLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, cache: list[LayerCache]) -> Tensor:
        return self.model.step(x, cache)


def saved(program: torch.export.ExportedProgram) -> nn.Module:
    """The program after a way through a file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


@needs_torch("torch.export does not trace caches")
@pytest.mark.supports("export: prefill, dynamic batch and length", *OPERATORS)
@pytest.mark.supports("export: decode step in place", *OPERATORS)
@VARIANT
@torch.no_grad()
def test_export_of_prefill_and_step(variant: str) -> None:
    """Without grad mode: a graph that turns it off by itself cannot be saved (torch 2.13)."""
    model = language_model(variant)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    prefill = saved(
        torch.export.export(
            Prefill(model), (tokens(2, 20),), dynamic_shapes=({0: batch, 1: length},)
        )
    )
    x = tokens(3, 41)
    logits, cache = prefill(x)
    want, expected = model.prefill(x)
    torch.testing.assert_close(logits, want)
    example = [layer.clone() for layer in cache]
    step = saved(torch.export.export(Step(model), (x[:, 0], example)))
    for t in range(3):
        torch.testing.assert_close(step(x[:, t], cache), model.step(x[:, t], expected))


# Autocast, checkpointing, determinism ------------------------------------------------------------


@pytest.mark.supports("autocast (CPU)", *OPERATORS)
@VARIANT
def test_autocast_trains(variant: str) -> None:
    """bfloat16 around the operators: gradients of float32 parameters, near those without it."""
    model, x = language_model(variant), tokens(4, 40)
    plain = torch.autograd.grad(loss(model, x), list(model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(model, x)
    rounded = torch.autograd.grad(value, list(model.parameters()))
    scale = torch.stack([g.norm() for g in plain]).max()
    for got, want in zip(rounded, plain, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.05 * scale


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.supports("autocast (CUDA)", "latent_attention")
def test_autocast_on_cuda() -> None:
    problem = make_problem(8, 8, 40).map(lambda x: x.to("cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = latent_attention(problem.q, problem.k, problem.v)
    assert torch.equal(y, latent_attention(problem.q, problem.k, problem.v))


@pytest.mark.supports("activation checkpointing", *OPERATORS)
@VARIANT
def test_checkpointed_blocks(variant: str) -> None:
    model, x = language_model(variant), tokens(2, 30)
    parameters = list(model.parameters())
    plain = torch.autograd.grad(loss(model, x), parameters)
    again = torch.autograd.grad(
        loss(lambda x: checkpoint(model, x, use_reentrant=False), x), parameters
    )
    assert all(map(torch.equal, again, plain))


@pytest.mark.supports("use_deterministic_algorithms: the same bits again", *OPERATORS)
@VARIANT
def test_deterministic_mode(variant: str) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    model, x = language_model(variant), tokens(2, 60)
    with threads(2):
        first, second = (
            torch.autograd.grad(loss(model, x), list(model.parameters())) for _ in range(2)
        )
    assert all(map(torch.equal, first, second))


# Several processes -------------------------------------------------------------------------------

# Each rank trains on its half of the batch; the result is that of the whole on one process.
RANK = """
import sys
import torch
from torch import distributed, nn
from test_torch_models import language_model, loss
kind, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
distributed.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
)
torch.manual_seed(0)
model, x = language_model(), torch.randint(32, (4, 20))
whole = torch.autograd.grad(loss(model, x), list(model.parameters()))
if kind == "ddp":
    trained = nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    trained = fully_shard(model, mesh=mesh)
loss(trained, x[2 * rank : 2 * rank + 2]).backward()
for parameter, want in zip(model.parameters(), whole, strict=True):
    got = parameter.grad.full_tensor() if kind == "fsdp2" else parameter.grad
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
print("equal")
distributed.destroy_process_group()
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.supports("two processes", *OPERATORS)
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["ddp", pytest.param("fsdp2", marks=needs_torch("its fully_shard wants a GPU"))]
)
def test_two_ranks(kind: str) -> None:
    here, port = os.path.dirname(__file__), free_port()
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": here}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, kind, str(rank), port],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output
        assert "equal" in output


# Threads -----------------------------------------------------------------------------------------


def long_call(op: str) -> Callable[[], Tensor]:
    """Some 0.1 seconds of one kernel."""
    if op == "latent_attention":
        q = torch.randn(1, 4, 8192, 64)
        return lambda: latent_attention(q, q, q)
    x = torch.randn(1, 65536, 256).sigmoid()
    if op == "linear_recurrence":
        return lambda: linear_recurrence(x, x)
    weight = torch.randn(256, 8)
    return lambda: short_conv(x, weight)


@pytest.mark.supports("releases the interpreter's lock")
@pytest.mark.parametrize("op", ["latent_attention", "linear_recurrence", "short_conv"])
def test_long_calls_release_the_lock(op: str) -> None:
    """Another Python thread runs between the beginning and the end of a call.

    The interpreter is told not to switch by itself: a kernel that holds the lock lets nobody count
    in any number of calls, while one call is enough unless others keep the machine's cores.
    """
    call = long_call(op)
    call()
    counted, stop = 0, threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.is_set():
            counted += 1
            time.sleep(0)

    before = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    sys.setswitchinterval(60)
    try:
        counter.start()
        during = 0
        for _ in range(20):
            seen = counted
            call()
            during += counted - seen
            if during > 10:
                break
    finally:
        stop.set()
        sys.setswitchinterval(before)
        counter.join()
    assert during > 10


@pytest.mark.supports("models in Python threads", *OPERATORS)
@pytest.mark.filterwarnings("ignore:.*inference.*:UserWarning")
def test_two_models_in_two_threads() -> None:
    """Each as if it were alone: gradients bit for bit, and its own number of threads."""
    models = [language_model(), language_model("latte")]
    batches = [tokens(2, 200), tokens(2, 150)]

    def gradients(i: int) -> list[Tensor]:
        with threads(1 + i):
            assert torch.get_num_threads() == 1 + i
            model = copy.deepcopy(models[i])
            return list(torch.autograd.grad(loss(model, batches[i]), list(model.parameters())))

    alone = [gradients(0), gradients(1)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(gradients, range(2)), alone, strict=True):
                assert all(map(torch.equal, got, want))


THREADS = """
import torch
asked, get_num_threads = [], torch.get_num_threads
def ask():
    asked.append(get_num_threads())
    return asked[-1]
torch.get_num_threads = ask  # before the package looks it up
import latte_ext
x, y = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 4)
ops = torch.ops.latte_ext
calls = [
    lambda: latte_ext.latent_attention(x, x, x),
    lambda: latte_ext.linear_recurrence(y, y),
    lambda: latte_ext.short_conv(y, y[0]),
    lambda: ops.latent_attention(x, x, x, None, None, None, None, None, True, 1.0),
    lambda: ops.linear_recurrence(y, y, None, None, False),
    lambda: ops.short_conv(y, y[0], None, None, None, True),
]
for call in calls:
    asked.clear()
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        call()
    assert [n for n, last in zip(asked, [0, *asked]) if n != last] == [1, 2, 1], asked
"""


@pytest.mark.skipif(_register.COMPILED, reason="C++ asks libtorch")
@pytest.mark.supports(
    "torch.set_num_threads at every call", "latent_attention", "linear_recurrence", "short_conv"
)
def test_number_of_threads_is_that_of_the_call() -> None:
    subprocess.run([sys.executable, "-c", THREADS], check=True)
