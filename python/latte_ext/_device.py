# SPDX-License-Identifier: Apache-2.0
"""Where an operator runs: on so many threads of the CPU, or on the current stream of a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from . import _core

# A build for tests, in which CPU tensors stand for CUDA tensors: `-DLATTE_CUDA=EMULATED`.
EMULATED = _core.cuda_info()["emulated"]


def on_device(x: Tensor) -> bool:
    """Whether a kernel on x is a CUDA kernel."""
    return x.is_cuda or EMULATED


def where(x: Tensor) -> _core.Where:
    """For a kernel on x and other tensors of its device."""
    if not on_device(x):
        return torch.get_num_threads()
    index, handle = 0, 0
    if x.is_cuda:
        index = x.device.index
        # What Inductor emits: torch.cuda.current_stream() would take longer than a launch.
        handle = torch._C._cuda_getCurrentRawStream(index)
    # Memory of torch's allocator is reused in the order of the stream, and belongs to a CUDA graph
    # that is being captured.
    return _core.Stream(index, handle, partial(x.new_empty, dtype=torch.uint8))


def on_cuda(name: str, arguments: Sequence[str], kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of an operator behind the checks of a device: RuntimeError by name."""

    def run(*args: Any) -> Any:
        reason = unusable()
        if reason:
            raise RuntimeError(f"[{name}] {reason}: got a CUDA tensor, expected a CPU tensor")
        device = _common_device(name, arguments, args)
        try:
            with _current(device):
                return kernel(*args)
        except RuntimeError as error:
            text = str(error)
            if not text.startswith("[cuda] "):
                raise
            raise RuntimeError(f"[{name}] {text.removeprefix('[cuda] ')}") from None

    return run


@cache
def unusable() -> str:
    """Why this process cannot run CUDA kernels; empty if it can."""
    info = _core.cuda_info()
    if not info["error"] or not info["architectures"]:
        return info["error"]
    versions = f"driver {version_text(info['driver'])}, runtime {version_text(info['runtime'])}"
    return f"built for CUDA, but without a device ({info['error']}; {versions})"


def version_text(version: int) -> str:
    """13000 as "13.0"; 0 as "none"."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else "none"


def _common_device(name: str, arguments: Sequence[str], args: Sequence[Any]) -> torch.device:
    tensors = [
        (argument, value)
        for argument, value in zip(arguments, args, strict=True)
        if isinstance(value, Tensor)
    ]
    first, device = tensors[0][0], tensors[0][1].device
    for argument, tensor in tensors:
        if tensor.device != device:
            raise RuntimeError(
                f"[{name}] {argument} is on {tensor.device}, expected {device} as {first}"
            )
    return device


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if EMULATED else torch.cuda.device(device)
