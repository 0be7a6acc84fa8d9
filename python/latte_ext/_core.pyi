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
def linear_recurrence_forward(
    a: Tensor,
    b: Tensor,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    h: Tensor,
    final: Tensor | None,
    reverse: bool,
    threads: int,
) -> None: ...
def linear_recurrence_backward(
    a: Tensor,
    h: Tensor,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    dh: Tensor,
    d_final: Tensor | None,
    da: Tensor,
    db: Tensor,
    d_h0: Tensor | None,
    reverse: bool,
    threads: int,
) -> None: ...
def rg_lru_forward(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    fresh: Tensor | None,
    y: Tensor,
    final: Tensor | None,
    reverse: bool,
    threads: int,
) -> None: ...
def rg_lru_backward(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    h0: Tensor | None,
    fresh: Tensor | None,
    y: Tensor,
    dy: Tensor,
    d_final: Tensor | None,
    dx: Tensor,
    d_gate_a: Tensor,
    d_gate_x: Tensor,
    d_log_lambda: Tensor,
    d_h0: Tensor | None,
    reverse: bool,
    threads: int,
) -> None: ...
def short_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    y: Tensor,
    final: Tensor | None,
    causal: bool,
    threads: int,
) -> None: ...
def short_conv_backward(
    x: Tensor,
    weight: Tensor,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    dy: Tensor,
    d_final: Tensor | None,
    dx: Tensor,
    d_weight: Tensor,
    d_bias: Tensor | None,
    d_state: Tensor | None,
    causal: bool,
    threads: int,
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
def fma_rate(threads: int, seconds: float) -> float: ...
