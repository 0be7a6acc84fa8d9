# SPDX-License-Identifier: Apache-2.0
"""Problems for the latent attention operators, their float64 solution and the error measure.

Notation: B batch, T tokens, H query heads, Hk key/value heads, L latents, D value channels,
N sequences (B, or the number of packed sequences).
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import pytest
import torch
from latte_ext import LatentState, latent_attention, reference
from latte_ext._device import EMULATED
from latte_ext.bench.measure import torch_threads as threads
from torch import Tensor

# docs/torch.md lists what older ones lack.
OLD_TORCH = torch.torch_version.TorchVersion(torch.__version__) < "2.7"


def needs_torch(why: str) -> pytest.MarkDecorator:
    """For what torch 2.6 cannot do, and says so itself; nothing between 2.6 and 2.10 was tried."""
    return pytest.mark.skipif(OLD_TORCH, reason=f"torch {torch.__version__}: {why}")


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Error of the arithmetic relative to the natural scale, before the result is rounded."""

    value: float
    gradient: float


# The single tolerance table, by compute dtype. Half precision is computed in float32, so its
# results differ from float32's by exactly one rounding, which `assert_close` allows on top.
TOLERANCES = {
    torch.float64: Tolerance(value=1e-14, gradient=2e-14),
    torch.float32: Tolerance(value=2e-6, gradient=5e-6),
}


# On CUDA, where exp and division are approximate and the factors of products of half precision are
# rounded to it: `value` in units of eps of the type of the products.
CUDA_TOLERANCE = Tolerance(value=4, gradient=16)
CUDA_FLOAT32 = Tolerance(value=1e-5, gradient=4e-5)


def on_cuda() -> bool:
    """Whether the device under test is a CUDA device, or its emulation."""
    return EMULATED or torch.get_default_device().type == "cuda"


def tolerances(*inputs: Tensor) -> Tolerance:
    """Those of a call on these q, k and v."""
    dtype = inputs[0].dtype
    if not on_cuda():
        return TOLERANCES[compute_dtype(dtype)]
    if any(x.dtype != dtype for x in inputs) or dtype.itemsize != 2:
        return CUDA_FLOAT32
    eps = torch.finfo(dtype).eps
    return Tolerance(CUDA_TOLERANCE.value * eps, CUDA_TOLERANCE.gradient * eps)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms(x: Tensor) -> float:
    return math.sqrt(x.double().square().mean().item()) if x.numel() else 0.0


def assert_close(
    actual: Tensor, expected: Tensor, *, tolerance: float, scale: float | Tensor, name: str
) -> None:
    """Each element of `actual` is within `tolerance * scale`, and one rounding, of `expected`."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
    if actual.numel() == 0:
        return
    info = torch.finfo(actual.dtype)
    actual, expected = actual.cpu(), expected.cpu()
    scale = scale.cpu() if isinstance(scale, Tensor) else scale
    want = expected.detach().double()
    # Half a unit in the last place, of a normal or of a subnormal number.
    rounding = 0.501 * info.eps * want.abs().clamp(min=info.smallest_normal)
    error = (actual.detach().double() - want).abs()
    excess = error / (rounding + tolerance * scale)
    excess = torch.where(error == 0, 0.0, excess)
    worst = int(torch.where(excess.isnan(), math.inf, excess).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), excess.shape))
    assert excess[index] <= 1, (
        f"{name}{list(index)} = {actual[index].item()!r}, expected {want[index].item()!r}: "
        f"{excess[index]:.3g} times the tolerance"
    )


@dataclasses.dataclass
class Problem:
    """Inputs of one call and the cotangents of its outputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor
    d_norm: Tensor
    d_mean: Tensor
    causal: bool = True
    scale: float = 1.0
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    state: tuple[Tensor, Tensor, Tensor] | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Problem":
        """The problem with `function` applied to every floating-point tensor."""
        changes = {
            name: function(getattr(self, name))
            for name in ("q", "k", "v", "dy", "d_norm", "d_mean")
        }
        state = None if self.state is None else tuple(function(x) for x in self.state)
        return dataclasses.replace(self, **changes, state=state)

    def to(self, device: torch.device | str) -> "Problem":
        """The problem with every tensor there."""
        others = {
            name: None if x is None else x.to(device)
            for name, x in (("key_mask", self.key_mask), ("cu_seqlens", self.cu_seqlens))
        }
        return dataclasses.replace(self.map(lambda x: x.to(device)), **others)


@dataclasses.dataclass
class Solution:
    """Outputs of one call and gradients of its inputs (None: no initial state, or no kernel)."""

    y: Tensor
    max: Tensor
    norm: Tensor
    mean: Tensor
    dq: Tensor = None  # type: ignore[assignment]
    dk: Tensor = None  # type: ignore[assignment]
    dv: Tensor = None  # type: ignore[assignment]
    d_norm0: Tensor | None = None
    d_mean0: Tensor | None = None

    def cpu(self) -> "Solution":
        return Solution(**{name: x.cpu() for name, x in self.named()})

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value


def make_problem(
    latents: int = 10,
    dim: int = 16,
    tokens: int = 70,
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
    lengths: Sequence[int] | None = None,
    initial_state: bool = False,
    spread: float = 1.0,
    seed: int = 0,
    **options: object,
) -> Problem:
    """Normally distributed inputs; `lengths` packs sequences, `options` are Problem fields."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return x.to(dtype)

    kv_heads = heads if kv_heads is None else kv_heads
    sequences = batch
    if lengths is not None:
        batch, tokens, sequences = 1, sum(lengths), len(lengths)
        bounds = torch.tensor([0, *lengths], device="cpu").cumsum(0)
        options["cu_seqlens"] = bounds.to(torch.int32 if seed % 2 == 0 else torch.int64)
    wide = compute_dtype(dtype)
    state_shape = (sequences, kv_heads, latents)
    if initial_state:
        options["state"] = (
            spread * normal(*state_shape, dtype=wide),
            1 + normal(*state_shape, dtype=wide).square(),
            normal(*state_shape, dim, dtype=wide),
        )
    return Problem(
        q=spread * normal(batch, heads, tokens, latents),
        k=spread * normal(batch, kv_heads, tokens, latents),
        v=normal(batch, kv_heads, tokens, dim),
        dy=normal(batch, heads, tokens, dim),
        d_norm=normal(*state_shape, dtype=wide),
        d_mean=normal(*state_shape, dim, dtype=wide),
        **options,  # type: ignore[arg-type]
    ).to(torch.get_default_device())


def random_mask(batch: int, tokens: int, *, keep: float = 0.6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, tokens, generator=generator, device="cpu") < keep
    return mask.to(torch.get_default_device())


def load_example(name: str) -> ModuleType:
    """The module examples/`name`.py."""
    return importlib.import_module(name)


Attention = Callable[..., tuple[Tensor, LatentState]]


def library_attention(*args: Tensor, **options: object) -> tuple[Tensor, LatentState]:
    return latent_attention(*args, **options, return_state=True)  # type: ignore[call-overload]


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, *, state: LatentState | None, **options: object
) -> tuple[Tensor, LatentState]:
    triple = None if state is None else state.tensors()
    y, final = reference.latent_attention(q, k, v, state=triple, **options)  # type: ignore[arg-type]
    return y, LatentState(*final)


def solve(problem: Problem, attention: Attention = library_attention) -> Solution:
    """Outputs and gradients of one call; the tensors keep their strides."""
    inputs = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    state = None
    if problem.state is not None:
        maximum, *carried = (x.detach() for x in problem.state)
        state = LatentState(maximum, *(x.requires_grad_() for x in carried))
        inputs += [state.norm, state.mean]
    y, final = attention(
        *inputs[:3],
        causal=problem.causal,
        scale=problem.scale,
        key_mask=problem.key_mask,
        cu_seqlens=problem.cu_seqlens,
        state=state,
    )
    values = (y, final.max, final.norm, final.mean)
    outputs = [(y, problem.dy), (final.norm, problem.d_norm), (final.mean, problem.d_mean)]
    outputs = [(output, cotangent) for output, cotangent in outputs if output.requires_grad]
    gradients = torch.autograd.grad(
        [output for output, _ in outputs],
        inputs,
        [cotangent for _, cotangent in outputs],
        allow_unused=True,
        materialize_grads=True,
    )
    return Solution(*(value.detach() for value in values), *gradients)


def quadratic_attention(
    q: Tensor, k: Tensor, v: Tensor, *, state: LatentState | None, **options: object
) -> tuple[Tensor, LatentState]:
    triple = None if state is None else state.tensors()
    y, final = reference.latent_attention_quadratic(q, k, v, state=triple, **options)  # type: ignore[arg-type]
    return y, LatentState(*final)


def solve_reference(problem: Problem) -> Solution:
    """The float64 solution of the problem exactly as stored in its own dtypes.

    From the definition while its O(T^2) memory is small, which takes fewer calls of torch.
    """
    batch, heads, tokens, latents = problem.q.shape
    small = batch * heads * tokens**2 * (latents + problem.v.shape[3]) < 2**22
    attention = quadratic_attention if small else reference_attention
    # Its many small operations only lose by sharing, and have no deterministic form on CUDA.
    with threads(1), torch.device("cpu"):
        return solve(problem.to("cpu").map(Tensor.double), attention)


def assert_same_solution(
    actual: Solution, expected: Solution, problem: Problem, *, factor: float = 1.0
) -> None:
    """Compares all values and gradients, each with its natural scale.

    A gradient's natural scale is the size that its terms have before they cancel: a logit's
    gradient is a difference of inner products of v and dy, so an error of
    eps * rms(v) * rms(dy) * sqrt(D) stays even where the true gradient vanishes.
    """
    actual, expected = actual.cpu(), expected.cpu()
    allowed = tolerances(problem.q, problem.k, problem.v)
    value, gradient = factor * allowed.value, factor * allowed.gradient
    carried = [] if problem.state is None else [problem.state[2]]
    v_size = max(map(rms, (problem.v, *carried)))
    g_size = max(map(rms, (problem.dy, problem.d_mean)))
    logit_size = v_size * g_size * math.sqrt(problem.v.shape[-1])

    assert_close(actual.y, expected.y, tolerance=value, scale=v_size, name="y")
    limit = 0.0 if problem.scale == 1 else expected.max.abs().nan_to_num(posinf=0.0)
    finite = expected.max.isfinite()
    assert torch.equal(actual.max.isfinite(), finite), "max: not empty where it has to be"
    for name, size in (("max", limit), ("norm", expected.norm.abs())):
        assert_close(
            getattr(actual, name)[finite],
            getattr(expected, name)[finite],
            tolerance=value,
            scale=size[finite] if isinstance(size, Tensor) else size,
            name=name,
        )
    assert (actual.norm[~finite] == 0).all(), "norm of the empty set"
    assert (actual.mean[~finite] == 0).all(), "mean of the empty set"
    assert_close(actual.mean, expected.mean, tolerance=value, scale=v_size, name="mean")

    sizes = {"dq": logit_size, "dk": logit_size, "dv": g_size}
    sizes |= {"d_norm0": logit_size, "d_mean0": g_size}
    for name, size in sizes.items():
        got, want = getattr(actual, name), getattr(expected, name)
        if want is None:
            assert got is None
        elif want.numel():
            scale = max(size, want.abs().max().item())
            assert_close(got, want, tolerance=gradient, scale=scale, name=name)


def assert_identical(actual: Solution, expected: Solution) -> None:
    """Bitwise equality of all values and gradients."""
    for (name, got), (_, want) in zip(actual.named(), expected.named(), strict=True):
        assert torch.equal(got, want), f"{name} differs"


def check(problem: Problem) -> Solution:
    """Solves a problem, compares with float64 and checks the dtypes; returns the solution."""
    solution = solve(problem)
    assert_same_solution(solution, solve_reference(problem), problem)
    wide = compute_dtype(problem.q.dtype)
    assert solution.y.dtype == problem.v.dtype
    for gradient, x in (("dq", problem.q), ("dk", problem.k), ("dv", problem.v)):
        assert getattr(solution, gradient).dtype == x.dtype
    assert {solution.max.dtype, solution.norm.dtype, solution.mean.dtype} == {wide}
    return solution


def time_major(x: Tensor) -> Tensor:
    """(B,H,T,C) stored as (B,T,H,C): the transposed view that a projection gives."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
