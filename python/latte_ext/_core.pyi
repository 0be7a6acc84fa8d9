# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any, TypedDict

from torch import Tensor

class Stream:
    def __init__(self, device: int, handle: int, allocate: Callable[[int], Tensor]) -> None: ...

# Threads of the CPU, or a stream of a CUDA device.
Where = int | Stream

class CudaInfo(TypedDict):
    architectures: str
    emulated: bool
    runtime: int
    driver: int
    devices: list[str]
    error: str

# Of every operator of torch.ops.latte_ext, by name.
SCHEMAS: dict[str, str]

# The arguments of its schema, then where: Where, and out: tuple[Tensor | None, ...] | None, memory
# for the results in their order (None for one that is not wanted). Returns the results.
Operator = Callable[..., Any]

latent_attention: Operator
latent_attention_backward: Operator
latent_attention_step: Operator
state_merge: Operator
linear_recurrence: Operator
linear_recurrence_backward: Operator
rg_lru: Operator
rg_lru_backward: Operator
rg_lru_step: Operator
short_conv: Operator
short_conv_backward: Operator
short_conv_step: Operator
sliding_window_attention: Operator
sliding_window_attention_backward: Operator
sliding_window_attention_step: Operator
macchiato_attention: Operator
macchiato_attention_backward: Operator
macchiato_attention_step: Operator
rotate: Operator

def latent_attention_check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    causal: bool,
    scale: float,
) -> None: ...
def linear_recurrence_check(
    a: Tensor, b: Tensor, cu_seqlens: Tensor | None, h0: Tensor | None
) -> None: ...
def rg_lru_check(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    fresh: Tensor | None,
) -> None: ...
def short_conv_check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    causal: bool,
) -> None: ...
def version() -> str: ...
def cpu_isa() -> str: ...
def cuda_built() -> bool: ...
def cuda_info() -> CudaInfo: ...
def cuda_tuning() -> tuple[int, int]: ...
def set_cuda_tuning(wanted_blocks: int, min_segment_tokens: int) -> None: ...
def fma_rate(threads: int, seconds: float) -> float: ...
def sliding_window_check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    q_sink: Tensor | None,
    k_sink: Tensor | None,
    v_sink: Tensor | None,
    sink_position: Tensor | None,
    window: int,
    past: int,
    causal: bool,
    scale: float,
    softcap: float,
) -> None: ...
def rotate_check(
    x: Tensor, position: Tensor, rates: Tensor | None, base: float, dim: int
) -> None: ...
