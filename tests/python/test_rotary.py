# SPDX-License-Identifier: Apache-2.0
"""Rotations against the reference in float64, and the operator inside torch.

Notation: B batch, H heads, T tokens, D channels per head.
"""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_close, compute_dtype, threads
from latte_ext import reference
from latte_ext.rotary import positions, rotate
from torch import Tensor
from torch.autograd import forward_ad

B, H, T, D = 2, 3, 9, 22
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-15}
OPERATOR = torch.ops.latte_ext.rotate.default

OPTIONS: dict[str, dict[str, Any]] = {
    "halves": {},
    "neighbours": {"interleaved": True},
    "inverse": {"inverse": True},
    "partial": {"dim": 10, "base": 500.0},
    "partial_neighbours": {"dim": 10, "interleaved": True, "inverse": True},
    "nothing": {"dim": 0},
    "rates": {"rates": torch.linspace(1.5, -0.1, D // 2)},
    "double_rates": {"rates": torch.linspace(1.5, 0, D // 2).double(), "inverse": True},
    "integer_base": {"base": 100},
}
OPTION = pytest.mark.parametrize("option", OPTIONS)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def options_of(option: str) -> dict[str, Any]:
    """OPTIONS with its tensors on the device under test."""
    device = torch.get_default_device()
    return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in OPTIONS[option].items()}


def ramp(*first: int, tokens: int = T) -> Tensor:
    return torch.tensor(first)[:, None] + torch.arange(tokens)


def check(x: Tensor, position: Tensor, **options: Any) -> Tensor:
    """Compares values and gradient with float64 and checks dtype and order of memory."""
    leaf = x.detach().requires_grad_()
    y = rotate(leaf, position, **options)
    assert y.dtype == x.dtype
    assert y.stride() == torch.empty_like(x).stride()
    dy = torch.randn(x.shape).to(x.dtype)
    (dx,) = torch.autograd.grad(y, leaf, dy)
    wide = x.detach().double().requires_grad_()
    want = reference.rotate(wide, position, **options)
    (d_want,) = torch.autograd.grad(want, wide, dy.double())
    tolerance = TOLERANCE[compute_dtype(x.dtype)]
    for name, got, expected in (("y", y, want), ("dx", dx, d_want)):
        largest = expected.detach().abs().max().item() if expected.numel() else 0.0
        assert_close(got, expected, tolerance=tolerance, scale=largest, name=name)
    return y.detach()


@pytest.mark.devices
@OPTION
@DTYPE
def test_against_reference(option: str, dtype: torch.dtype) -> None:
    x = torch.randn(B, H, T, D).to(dtype)
    check(x, positions(T, offset=-4), **options_of(option))
    y = check(x, ramp(-1000, 70), **options_of(option))
    dim = OPTIONS[option].get("dim", D)
    assert torch.equal(y[..., dim:], x[..., dim:])


@pytest.mark.devices
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 30, 32, 64, 66, 128])
def test_widths(dim: int, interleaved: bool) -> None:
    for rest in (0, 3):
        x = torch.randn(1, 2, 5, dim + rest)
        check(x, positions(5), dim=dim, interleaved=interleaved)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens_before_heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels_before_tokens": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "slice": lambda x: torch.cat([x, x], 3)[..., 3 : 3 + x.shape[3]],
    "every_other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:1, :1].expand(*x.shape),
}


@pytest.mark.devices
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("view", VIEWS)
@DTYPE
def test_strides(view: str, dtype: torch.dtype, interleaved: bool) -> None:
    x = VIEWS[view](torch.randn(B, H, T, D).to(dtype))
    wide = ramp(3, -9).repeat_interleave(2, 1)[:, ::2]
    rates = torch.randn(D)[::2]
    check(x, wide, rates=rates, interleaved=interleaved)


@pytest.mark.devices
@pytest.mark.parametrize("shape", [(0, H, T, D), (B, 0, T, D), (B, H, 0, D), (B, H, T, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert check(torch.randn(shape), positions(shape[2])).shape == shape
    assert check(torch.randn(shape), torch.zeros(shape[0], shape[2]).long()).shape == shape


@pytest.mark.devices
@DTYPE
def test_infinities_and_nan(dtype: torch.dtype) -> None:
    """Where the reference has them, and nowhere else."""
    x = torch.randn(B, H, T, D).to(dtype)
    x[0, 0, 1, 3], x[0, 1, 2, 4], x[1, 2, 3, D - 1] = torch.inf, -torch.inf, torch.nan
    torch.testing.assert_close(
        rotate(x, positions(T)), reference.rotate(x, positions(T)), equal_nan=True
    )
    rates = torch.randn(D // 2)
    rates[1], rates[5] = torch.nan, torch.inf
    torch.testing.assert_close(
        rotate(x, positions(T), rates=rates),
        reference.rotate(x, positions(T), rates=rates),
        equal_nan=True,
    )


@pytest.mark.devices
@DTYPE
@pytest.mark.parametrize("position", [1_000_003, -1_000_003, 1_700_000, 1 << 40])
def test_far_positions(position: int, dtype: torch.dtype) -> None:
    """Angles are float64: a float32 angle would be off by 0.03 at 1,000,000."""
    check(torch.randn(1, 2, 3, 64).to(dtype), positions(3, offset=position))


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_outputs(dtype: torch.dtype, interleaved: bool) -> None:
    """What goes past the caches has the bits of what does not."""
    x = torch.randn(1, 2, (1 << 16) + 5, 64, dtype=dtype)
    position = positions(x.shape[2])
    y = rotate(x, position, interleaved=interleaved)
    for part in (slice(0, 70), slice(30_000, 30_300), slice(-5, None)):
        small = rotate(x[:, :, part], position[part], interleaved=interleaved)
        assert torch.equal(y[:, :, part], small)


def test_token_by_token_and_thread_by_thread() -> None:
    x, position = torch.randn(B, H, 300, 64), ramp(5, -7, tokens=300)
    with threads(1):
        y = rotate(x, position)
    assert torch.equal(rotate(x, position), y)
    for t in (0, 1, 127, 128, 299):
        part = slice(t, t + 1)
        assert torch.equal(rotate(x[:, :, part], position[:, part]), y[:, :, part])


@pytest.mark.devices
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 4, 0])
def test_rotation(interleaved: bool, dim: int | None) -> None:
    """Complex multiplication by exp(i angle); undone by its inverse; scores see distances only."""
    x = torch.randn(2, 3, T, 8, dtype=torch.float64)
    position = positions(T, offset=torch.tensor([0, 1000]))
    y = rotate(x, position, dim=dim, interleaved=interleaved)
    size = 8 if dim is None else dim
    torch.testing.assert_close(
        rotate(y, position, dim=dim, interleaved=interleaved, inverse=True), x
    )
    rates = 10000.0 ** (-torch.arange(0, size, 2).double() / max(size, 1))
    turn = torch.polar(torch.ones(()).double(), position[:, None, :, None] * rates)

    def pairs(z: Tensor) -> Tensor:
        z = z[..., :size]
        if interleaved:
            return torch.complex(z[..., ::2], z[..., 1::2])
        return torch.complex(*z.chunk(2, -1))

    torch.testing.assert_close(pairs(y), pairs(x) * turn)
    shifted = rotate(x, position + 77, dim=dim, interleaved=interleaved)
    torch.testing.assert_close(y @ y.transpose(2, 3), shifted @ shifted.transpose(2, 3))


def test_positions() -> None:
    assert positions(3, offset=4).tolist() == [4, 5, 6]
    assert positions(2, offset=torch.tensor([0, 9])).tolist() == [[0, 1], [9, 10]]
    borders = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert positions(5, cu_seqlens=borders).tolist() == [0, 1, 0, 1, 2]
    offset = torch.tensor([7, 50, 1])
    assert positions(5, offset=offset, cu_seqlens=borders).tolist() == [7, 8, 1, 2, 3]


# Inside torch ------------------------------------------------------------------------------------


@pytest.mark.devices
@OPTION
def test_gradients(option: str) -> None:
    """To any order: the gradient is a rotation, too."""
    x = torch.randn(B, 1, 3, D, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return rotate(x, ramp(2, -6, tokens=3), **options_of(option))

    assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


@pytest.mark.supports("opcheck", "rotate")
@OPTION
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(option: str, requires_grad: bool) -> None:
    defaults = {"base": 10000.0, "rates": None, "dim": None, "interleaved": False, "inverse": False}
    options = defaults | OPTIONS[option]
    x = torch.randn(B, T, H, D).transpose(1, 2).requires_grad_(requires_grad)
    arguments = (
        x, positions(T), options["rates"], float(options["base"]), options["dim"],
        options["interleaved"], options["inverse"],
    )  # fmt: skip
    torch.library.opcheck(OPERATOR, arguments)


@pytest.mark.parametrize("backend", [None, "reference"])
@OPTION
def test_compile(option: str, backend: str | None) -> None:
    """The same results as eager, forward and backward."""

    def function(x: Tensor, position: Tensor) -> Tensor:
        return rotate(x, position, backend=backend, **OPTIONS[option]).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (T, 5):
        x = torch.randn(B, H, tokens, D, requires_grad=True)
        position = positions(tokens)
        (got,) = torch.autograd.grad(compiled(x, position).sum(), x)
        (want,) = torch.autograd.grad(function(x, position).sum(), x)
        assert torch.equal(got, want)


class Model(torch.nn.Module):
    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return rotate(x, position, dim=4)


def test_export() -> None:
    """With dynamic dimensions; saved, loaded and run."""
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    program = torch.export.export(
        Model(), (torch.randn(B, H, T, D), ramp(0, 3)),
        dynamic_shapes=({0: batch, 2: tokens}, {0: batch, 1: tokens}),
    )  # fmt: skip
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x, position = torch.randn(3, H, 5, D), ramp(0, 3, 9, tokens=5)
    assert torch.equal(torch.export.load(buffer).module()(x, position), Model()(x, position))


@DTYPE
def test_autocast_and_meta(dtype: torch.dtype) -> None:
    """dtypes are kept."""
    x = torch.randn(B, H, T, D).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotate(x, positions(T)), rotate(x, positions(T)))
        assert rotate(x, positions(T)).dtype == dtype
    meta = rotate(x.to("meta"), positions(T).to("meta"))
    assert (meta.shape, meta.dtype, meta.device.type) == (x.shape, dtype, "meta")


def test_transforms() -> None:
    """Linear in x: forward mode and second derivatives by the operator itself."""
    x, position = torch.randn(B, H, T, D), positions(T)

    def loss(x: Tensor, backend: str | None = None) -> Tensor:
        return rotate(x, position, backend=backend).sin().sum()  # type: ignore[arg-type]

    with forward_ad.dual_level():
        dual = rotate(forward_ad.make_dual(x, x.cos()), position)
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, rotate(x.cos(), position))
    for transform in (
        torch.func.grad,
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sin().sum()),
        lambda f: lambda x: torch.func.jvp(torch.func.grad(f), (x,), (x,))[1],
    ):
        torch.testing.assert_close(transform(loss)(x), transform(lambda x: loss(x, "reference"))(x))


def test_rates_are_constants() -> None:
    rates = torch.randn(D // 2, requires_grad=True)
    x = torch.randn(B, H, T, D)
    with pytest.raises(RuntimeError, match=r"\[rotate\] got rates that require grad, expected"):
        rotate(x, positions(T), rates=rates)
    with torch.no_grad():
        rotate(x, positions(T), rates=rates)
    rotate(x, positions(T), rates=rates, backend="reference").sum().backward()
    assert rates.grad is not None


# Calls that must fail ----------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x_list": ({"x": [1.0]}, TypeError, r"x is a list, expected a torch.Tensor"),
    "x_integers": ({"x": torch.zeros(B, H, T, D).long()}, TypeError, "x has dtype torch.int64"),
    "x_rank": ({"x": torch.zeros(H, T, D)}, ValueError, r"x has shape \(3, 9, 22\), expected 4"),
    "x_sparse": (
        {"x": torch.zeros(B, H, T, D).to_sparse()}, TypeError, "x has layout torch.sparse_coo"
    ),
    "position_none": ({"position": None}, TypeError, "position is a NoneType, expected"),
    "position_floats": (
        {"position": torch.zeros(T)}, TypeError,
        "position has dtype torch.float32, expected torch.int64",
    ),
    "position_shape": (
        {"position": positions(4)}, ValueError, r"position has shape \(4,\), expected \(9,\)"
    ),
    "position_batch": (
        {"position": ramp(1, 2, 3)}, ValueError,
        r"position has shape \(3, 9\), expected \(2, 9\)",
    ),
    "position_rank": (
        {"position": torch.zeros(B, 1, T).long()}, ValueError, r"position has shape \(2, 1, 9\)"
    ),
    "dim_odd": ({"dim": 7}, ValueError, "dim is 7, expected an even number of at most 22"),
    "dim_large": ({"dim": 24}, ValueError, "dim is 24, expected an even number of at most 22"),
    "dim_negative": ({"dim": -2}, ValueError, "dim is -2, expected an even number"),
    "dim_float": ({"dim": 4.0}, TypeError, "dim is a float, expected a int"),
    "base_zero": ({"base": 0.0}, ValueError, "base is 0.0*, expected a positive number"),
    "base_infinite": ({"base": float("inf")}, ValueError, "base is inf, expected a positive"),
    "base_text": ({"base": "10000"}, TypeError, "base is a str, expected a float"),
    "both": (
        {"base": 500.0, "rates": torch.zeros(D // 2)}, ValueError,
        "got base and rates, expected one of them",
    ),
    "rates_list": ({"rates": [1.0] * 11}, TypeError, "rates is a list, expected a torch.Tensor"),
    "rates_half": (
        {"rates": torch.zeros(D // 2).half()}, TypeError,
        "rates has dtype torch.float16, expected torch.float32 or torch.float64",
    ),
    "rates_shape": (
        {"rates": torch.zeros(D)}, ValueError, r"rates has shape \(22,\), expected \(11,\)"
    ),
    "flag": ({"interleaved": 1}, TypeError, "interleaved is a int, expected a bool"),
    "backend": ({"backend": "abacus"}, ValueError, "backend is 'abacus', expected None"),
    "cuda": ({"backend": "cuda"}, ValueError, "backend is 'cuda', expected one for"),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str, backend: str | None) -> None:
    change, error, text = BAD[bad]
    arguments = {"x": torch.zeros(B, H, T, D), "position": positions(T), "backend": backend}
    with pytest.raises(error, match=rf"^\[rotate\] .*{text}") as caught:
        rotate(**arguments | change)
    assert "expected" in str(caught.value)


def test_devices_must_agree() -> None:
    with pytest.raises(RuntimeError, match=r"\[rotate\] position is on cpu, expected meta as x"):
        rotate(torch.zeros(B, H, T, D, device="meta"), positions(T))
