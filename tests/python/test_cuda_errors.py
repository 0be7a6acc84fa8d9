# SPDX-License-Identifier: Apache-2.0
"""What a CUDA call says that cannot run.

Tensors of a device cannot be made without one, so the kernels behind the CUDA key are called.
"""

from typing import Any

import latte_ext
import pytest
import torch
from latte_ext import __main__ as command
from latte_ext import _core, _device
from latte_ext._device import on_cuda, unusable, version_text, where

CUDA_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

# As an operator's kernel would be called.
OPERATORS = torch.ops.latte_ext
X, WEIGHT = torch.zeros(1, 5, 3), torch.zeros(3, 4)


def info(**changes: Any) -> dict[str, Any]:
    found = {
        "architectures": "90-real", "emulated": False, "runtime": 13000, "driver": 13000,
        "devices": ["one"], "error": "",
    }  # fmt: skip
    return found | changes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the core says of this machine."""

    def change(**changes: Any) -> None:
        monkeypatch.setattr(_core, "cuda_info", lambda: info(**changes))
        monkeypatch.setattr(_core, "cuda_built", lambda: True)
        unusable.cache_clear()

    yield change
    unusable.cache_clear()


UNBUILT = {"architectures": "", "error": "built without CUDA", "devices": []}


def test_a_build_without_cuda_says_so(machine: Any) -> None:
    machine(**UNBUILT)
    with pytest.raises(RuntimeError, match=r"^\[short_conv\] built without CUDA: got a CUDA"):
        OPERATORS.short_conv.default.redispatch(CUDA_KEY, X, WEIGHT, None, None, None, True)


def test_a_machine_without_a_driver_says_what_cuda_says(machine: Any) -> None:
    machine(error="cudaGetDeviceCount: no CUDA-capable device is detected", driver=0, devices=[])
    with pytest.raises(
        RuntimeError,
        match=r"^\[short_conv\] built for CUDA, but without a device \(cudaGetDeviceCount: no CUDA-"
        r"capable device is detected; driver none, runtime 13\.0\): got a CUDA tensor, expected",
    ):
        OPERATORS.short_conv.default.redispatch(CUDA_KEY, X, WEIGHT, None, None, None, True)


@pytest.mark.parametrize(
    "name",
    [
        name.removeprefix("latte_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("latte_ext::")
    ],
)
def test_every_operator_answers_to_cuda_by_name(name: str, machine: Any) -> None:
    machine(**UNBUILT)
    operator = getattr(OPERATORS, name).default
    arguments = [X] * len(operator._schema.arguments)
    for i, argument in enumerate(operator._schema.arguments):
        kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
        arguments[i] = {"Tensor": X, "bool": True, "float": 1.0, "int": 1, "SymInt": 1}[kind]
    with pytest.raises(RuntimeError, match=rf"^\[{name}\] built without CUDA"):
        operator.redispatch(CUDA_KEY, *arguments)


def test_devices_are_not_mixed(machine: Any) -> None:
    machine()
    kernel = on_cuda("op", ["x", "key_mask", "causal", "state"], lambda *args: args)
    elsewhere = torch.zeros(2, device="meta")
    with pytest.raises(RuntimeError, match=r"^\[op\] state is on meta, expected cpu as x$"):
        kernel(X, None, True, elsewhere)
    with pytest.raises(RuntimeError, match=r"^\[op\] state is on cpu, expected meta as x$"):
        kernel(elsewhere, None, False, X)


def test_errors_of_the_runtime_carry_the_name_of_the_operator(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    monkeypatch.setattr(_device, "EMULATED", True)

    def kernel(x: torch.Tensor) -> None:
        raise RuntimeError("[cuda] launch of a kernel: no kernel image is available")

    with pytest.raises(RuntimeError, match=r"^\[op\] launch of a kernel: no kernel image"):
        on_cuda("op", ["x"], kernel)(X)

    def other(x: torch.Tensor) -> None:
        raise RuntimeError("[op] got something else")

    with pytest.raises(RuntimeError, match=r"^\[op\] got something else$"):
        on_cuda("op", ["x"], other)(X)


@pytest.mark.skipif(_core.cuda_built(), reason="of a build without CUDA")
def test_the_core_refuses_a_stream_that_it_cannot_use() -> None:
    """What stands behind the checks above, should they ever be passed by."""
    stream = _core.Stream(0, 0, X.new_empty)
    with pytest.raises(RuntimeError, match=r"^\[cuda\] built without CUDA$"):
        _core.short_conv(X, WEIGHT, None, None, None, True, stream, None)


def test_cpu_tensors_take_the_threads_of_torch() -> None:
    assert where(X) == torch.get_num_threads()


@pytest.mark.parametrize(
    ("machine_info", "expected"),
    [
        ({}, "built for 90-real; runtime 13.0, driver 13.0"),
        ({"driver": 0}, "runtime 13.0, driver none"),
        ({"architectures": "emulated", "emulated": True}, "EMULATED on the CPU"),
    ],
)
def test_info_says_what_is_built(
    machine: Any,
    machine_info: dict[str, Any],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine(**machine_info)
    assert command.main(["info"]) == 0
    assert expected in capsys.readouterr().out


def test_info_says_why_there_is_no_device(machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    machine(error="cudaGetDeviceCount: driver too old", devices=[])
    assert command.main(["info"]) == 0
    assert "devices          none (cudaGetDeviceCount: driver too old)" in capsys.readouterr().out


def test_versions() -> None:
    assert [version_text(v) for v in (0, 12040, 13000)] == ["none", "12.4", "13.0"]


def test_backend_has_to_fit_the_device() -> None:
    q = torch.zeros(1, 1, 2, 3)
    with pytest.raises(ValueError, match=r"^\[latent_attention\] backend is 'cuda', expected one"):
        latte_ext.latent_attention(q, q, q, backend="cuda")
