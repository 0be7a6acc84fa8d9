# SPDX-License-Identifier: Apache-2.0
"""The operators for programs without Python (LATTE_TORCH_STABLE), where this build has them.

The package takes its CPU kernels from there, so that whatever runs in this build runs on them.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import latte_ext
import pytest
import torch
from latte_ext import LatentState, _core, _register, rotary
from latte_ext.nn import LatteConfig, LatteLM
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

LIBRARY = Path(_core.__file__).parent / "_torch.so"
EXAMPLE = Path(__file__).parents[2] / "examples" / "aoti"
OPERATORS = (
    "latent_attention", "linear_recurrence", "rg_lru", "short_conv", "sliding_window_attention",
    "macchiato_attention", "rotate",
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARY.is_file(), reason="built without LATTE_TORCH_STABLE"),
]


def python(code: str, *args: object) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def copied(tree: Any) -> Any:
    return pytree.tree_map(
        lambda x: torch.empty_like(x).copy_(x) if isinstance(x, Tensor) else x, tree
    )


class Recorder(TorchDispatchMode):
    """Every call of an operator: its arguments before and after, and the results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace != "latte_ext":
            return func(*args, **(kwargs or {}))
        before = copied(args)
        results = func(*args)
        name = func._schema.name.partition("::")[2]
        self.calls.append((name, before, copied(args), copied(results)))
        return results


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention(dtype: torch.dtype) -> None:
    q, k, v = (leaf(2, heads, 70, size, dtype=dtype) for heads, size in ((4, 3), (2, 3), (2, 5)))
    mask = torch.rand(2, 70) > 0.2
    y, state = latte_ext.latent_attention(q, k, v, key_mask=mask, return_state=True)
    y, _ = latte_ext.latent_attention(q, k, v, state=state, scale=0.5, return_state=True)
    y.sum().backward()
    latte_ext.latent_attention(q[:1], k[:1], v[:1], cu_seqlens=torch.tensor([0, 9, 9, 70]))
    with torch.no_grad():
        latte_ext.latent_attention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], state.detach())
        torch.ops.latte_ext.state_merge(
            *state.detach(), *LatentState.empty(2, 2, 3, 5, dtype=state_dtype(dtype))
        )


def recurrences(dtype: torch.dtype) -> None:
    x, gate, other, rate = (leaf(2, 30, 6, dtype=dtype) for _ in range(4))
    log_lambda, h0 = leaf(6, dtype=dtype), leaf(2, 6, dtype=state_dtype(dtype))
    h, final = latte_ext.linear_recurrence(rate.sigmoid(), x, h0=h0, return_state=True)
    (h.sum() + final.sum()).backward()
    fresh = torch.tensor([True, False])
    y, _ = latte_ext.rg_lru(
        x, gate, other, log_lambda, h0=h0, fresh=fresh, return_state=True, reverse=True
    )
    y.sum().backward()
    state = torch.randn(2, 6, dtype=state_dtype(dtype))
    row = torch.randn(3, 2, 6).to(dtype)
    with torch.no_grad():
        latte_ext.rg_lru_step(*row, log_lambda, state, fresh=fresh)


def convolutions(dtype: torch.dtype) -> None:
    x, weight, bias = leaf(2, 30, 6, dtype=dtype), leaf(6, 4, dtype=dtype), leaf(6, dtype=dtype)
    state = leaf(2, 3, 6, dtype=dtype)
    y, tail = latte_ext.short_conv(x, weight, bias, state=state, return_state=True)
    (y.sum() + tail.sum() + latte_ext.short_conv(x, weight, causal=False).sum()).backward()
    with torch.no_grad():
        latte_ext.short_conv_step(x[:, 0], weight, bias, state.detach())


def windows(dtype: torch.dtype) -> None:
    q, k, v = (leaf(2, heads, 30, 4, dtype=dtype) for heads in (4, 2, 2))
    k_sink, v_sink = leaf(2, 2, 3, 4, dtype=dtype), leaf(2, 2, 3, 4, dtype=dtype)
    sinks = latte_ext.WindowSinks(
        leaf(2, 4, 30, 4, dtype=dtype), k_sink, v_sink, torch.arange(3).expand(2, 3)
    )
    y, cache = latte_ext.sliding_window_attention(
        q, k, v, window=5, sinks=sinks, softcap=3.0, return_cache=True
    )
    y.sum().backward()
    with torch.no_grad():
        latte_ext.sliding_window_attention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], cache.detach())


def gated(dtype: torch.dtype) -> None:
    q_latent, k_latent = leaf(2, 4, 30, 4, dtype=dtype), leaf(2, 2, 30, 3, dtype=dtype)
    q, k, v = (leaf(2, heads, 30, 4, dtype=dtype) for heads in (4, 2, 2))
    for values in (None, leaf(2, 2, 30, 4, dtype=dtype)):
        y, state = latte_ext.macchiato_attention(
            q_latent, k_latent, q, k, v, window=5, return_state=True, v_latent=values
        )
        y.sum().backward()
    window_alone = latte_ext.macchiato_attention(q_latent[..., :1], k_latent[..., :0], q, k, v,
                                                 window=5, v_latent=values)  # fmt: skip
    window_alone.sum().backward()
    with torch.no_grad():
        rows = (x[:, :, 0] for x in (q_latent, k_latent, q, k, v))
        latte_ext.macchiato_attention_step(*rows, state.detach())
        latte_ext.macchiato_attention(q_latent, k_latent, q, k, v, window=5)


def rotations(dtype: torch.dtype) -> None:
    x = leaf(2, 7, 3, 8, dtype=dtype)
    for view in (x, x.transpose(1, 2)):
        rotary.rotate(view, torch.arange(view.shape[2]), dim=4, interleaved=True).sum().backward()
        rotary.rotate(view, torch.arange(view.shape[2]), rates=torch.rand(4))


CASES = (attention, recurrences, convolutions, windows, gated, rotations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.supports("without Python: C++ operators", *OPERATORS)
def test_values_are_those_of_the_kernels_of_python(dtype: torch.dtype) -> None:
    """Bit for bit: forward, backward and in place, of every operator."""
    torch.set_num_threads(1)
    assert _register.COMPILED
    calls = []
    for case in CASES:
        with Recorder() as recorder:
            case(dtype)
        calls += recorder.calls
    for name, arguments, after, results in calls:
        want = getattr(_core, name)(*arguments, 1, None)
        for got, expected in zip(
            pytree.tree_leaves((results, after)), pytree.tree_leaves((want, arguments)), strict=True
        ):
            if isinstance(expected, Tensor):
                assert (got.dtype, got.stride()) == (expected.dtype, expected.stride()), name
                torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=name)
    assert {name for name, *_ in calls} == set(_core.SCHEMAS)


SCHEMAS = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
print(json.dumps({name: str(getattr(torch.ops.latte_ext, name).default._schema)
                  for name in sys.argv[2:]}))
assert "latte_ext" not in sys.modules
import latte_ext  # takes what is defined, and adds derivatives
x = torch.randn(1, 1, 5, 3, requires_grad=True)
latte_ext.latent_attention(x, x, x).sum().backward()
assert x.grad is not None
"""


def test_schemas_without_the_package_and_the_package_after_it() -> None:
    parsed = {name: str(torch._C.parse_schema("latte_ext::" + _core.SCHEMAS[name]))
              for name in _core.SCHEMAS}  # fmt: skip
    assert json.loads(python(SCHEMAS, LIBRARY, *_core.SCHEMAS)) == parsed


OLD = """
import torch
torch.__version__ = "2.9.1"
import latte_ext
from latte_ext import _register
assert not _register.COMPILED
x = torch.randn(1, 1, 5, 3, requires_grad=True)
latte_ext.latent_attention(x, x, x).sum().backward()
assert x.grad is not None
"""


def test_registration_from_python_where_torch_is_too_old() -> None:
    python(OLD)


def test_errors() -> None:
    x = torch.randn(1, 1, 5, 3)
    with pytest.raises(ValueError, match=r"^\[latent_attention\] k has shape"):
        latte_ext.latent_attention(x, x[..., :2], x)
    with pytest.raises(RuntimeError, match=r"^\[latent_attention\] q, k, v have dtypes"):
        latte_ext.latent_attention(x, x, x.double())


def test_updates_are_marked() -> None:
    """Autograd refuses a backward pass through a state from before a step."""
    state = LatentState.empty(1, 1, 3, 4)
    loss = (torch.ones_like(state.mean).requires_grad_() * state.mean).sum()
    row = torch.randn(1, 1, 3)
    torch.ops.latte_ext.latent_attention_step(row, row, torch.randn(1, 1, 4), *state, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def example() -> Any:
    spec = importlib.util.spec_from_file_location("aoti_export", EXAMPLE / "export.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.supports(
    "AOTInductor package in C++ without Python",
    *(name for name in OPERATORS if name not in ("linear_recurrence", "sliding_window_attention")),
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # of torch's own code
def test_language_model_without_python(tmp_path: Path) -> None:
    """Windows, latents, recurrences, convolutions and rotations: the tokens of Python."""
    torch.use_deterministic_algorithms(False)
    config = LatteConfig.named(
        "latte-rglru-swa++", vocab_size=32, embed_dim=16, num_layers=2, num_heads=4, num_latents=5,
        window=8,
    )  # fmt: skip
    model = LatteLM(config).eval()
    example().export(model, tmp_path)
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", EXAMPLE, "-B", build, "-DCMAKE_BUILD_TYPE=Release",
         f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"],
        ["cmake", "--build", build],
    ):  # fmt: skip
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout + built.stderr
    prompt, count = torch.randint(32, (1, 21)), 12
    packages = (tmp_path / name for name in ("prefill.pt2", "step.pt2"))
    run = subprocess.run(
        [build / "run_package", LIBRARY, *packages, str(count), *map(str, prompt[0].tolist())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    want = []
    with torch.no_grad():
        logits, cache = model.prefill(prompt)
        for _ in range(count):
            want.append(int(logits.argmax(1)))
            logits = model.step(torch.tensor(want[-1:]), cache)
    assert list(map(int, run.stdout.split())) == want
