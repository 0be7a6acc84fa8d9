# SPDX-License-Identifier: Apache-2.0
from torch import Tensor

def latent_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    y: Tensor,
    final_max: Tensor | None,
    final_norm: Tensor | None,
    final_mean: Tensor | None,
    causal: bool,
    scale: float,
    threads: int,
) -> None: ...
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
def latent_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    dy: Tensor,
    d_final_norm: Tensor | None,
    d_final_mean: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_norm: Tensor | None,
    d_mean: Tensor | None,
    causal: bool,
    scale: float,
    threads: int,
) -> None: ...
def latent_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max: Tensor,
    norm: Tensor,
    mean: Tensor,
    y: Tensor,
    scale: float,
    threads: int,
) -> None: ...
def latent_attention_step_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max: Tensor,
    norm: Tensor,
    mean: Tensor,
    scale: float,
    threads: int,
) -> Tensor | None: ...
def version() -> str: ...
def cpu_isa() -> str: ...
def cuda_built() -> bool: ...
def fma_rate(threads: int, seconds: float) -> float: ...
