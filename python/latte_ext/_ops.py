# SPDX-License-Identifier: Apache-2.0
"""The operators `torch.ops.latte_ext.*`: schema, CPU kernel, fake kernel, autograd, autocast.

Registered with `torch.library.Library`, since `custom_op` costs two to five times as much per call.
Shapes and dtypes are checked by the core, whose messages name the argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _core
from ._checks import check_cu_seqlens, check_rank

_LIBRARY = torch.library.Library("latte_ext", "DEF")

_LIBRARY.define(
    "latent_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? cu_seqlens, "
    "Tensor? max, Tensor? norm, Tensor? mean, bool causal, float scale)"
    " -> (Tensor y, Tensor max, Tensor norm, Tensor mean)",
    tags=[torch.Tag.pt2_compliant_tag],
)
_LIBRARY.define(
    "latent_attention_backward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, "
    "Tensor? cu_seqlens, Tensor? max, Tensor? norm, Tensor? mean, Tensor dy, Tensor d_final_norm, "
    "Tensor d_final_mean, bool causal, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_norm, Tensor d_mean)",
    tags=[torch.Tag.pt2_compliant_tag],
)
_LIBRARY.define(
    "latent_attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) max, Tensor(b!) norm, "
    "Tensor(c!) mean, float scale) -> Tensor y",
    tags=[torch.Tag.pt2_compliant_tag],
)

_OPS = torch.ops.latte_ext


def _state_shapes(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[Any]:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return [sequences, k.shape[1], q.shape[3], v.shape[3]]


def _empty_state(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    n, heads, latents, dim = _state_shapes(q, k, v, cu_seqlens)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    return (
        v.new_empty((n, heads, latents), dtype=dtype),
        v.new_empty((n, heads, latents), dtype=dtype),
        v.new_empty((n, heads, latents, dim), dtype=dtype),
    )


def _output(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _forward_outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rank("latent_attention", 4, q=q, k=k, v=v)
    check_cu_seqlens("latent_attention", cu_seqlens)
    return (_output(q, v), *_empty_state(q, k, v, cu_seqlens))


def _forward_cpu(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _forward_outputs(q, k, v, cu_seqlens)
    y, final_max, final_norm, final_mean = outputs
    _core.latent_attention_forward(
        q, k, v, key_mask, cu_seqlens, max, norm, mean, y, final_max, final_norm,
        final_mean, causal, scale, torch.get_num_threads(),
    )  # fmt: skip
    return outputs


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(q, k, v, cu_seqlens)


def _contiguous_like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]


def _backward_outputs(
    q: Tensor, k: Tensor, v: Tensor, norm: Tensor | None, mean: Tensor | None
) -> list[Tensor]:
    if norm is None or mean is None:
        return [*_contiguous_like(q, k, v), q.new_empty(0), q.new_empty(0)]
    return _contiguous_like(q, k, v, norm, mean)


def _backward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    dy: Tensor,
    d_final_norm: Tensor,
    d_final_mean: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    outputs = _backward_outputs(q, k, v, norm, mean)
    d_norm, d_mean = (None, None) if norm is None else (outputs[3], outputs[4])
    _core.latent_attention_backward(
        q, k, v, key_mask, cu_seqlens, max, norm, mean, dy, d_final_norm, d_final_mean,
        outputs[0], outputs[1], outputs[2], d_norm, d_mean, causal, scale, torch.get_num_threads(),
    )  # fmt: skip
    return tuple(outputs)


def _backward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max: Tensor | None,
    norm: Tensor | None,
    mean: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    return tuple(_backward_outputs(q, k, v, norm, mean))


def _step_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    check_rank("latent_attention_step", 3, q=q, k=k, v=v)
    return v.new_empty((q.shape[0], q.shape[1], v.shape[2]))


def _mark_updated(*state: Tensor) -> None:
    # Autograd refuses a backward pass that saved the state before this update.
    for tensor in state:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _step_cpu(
    q: Tensor, k: Tensor, v: Tensor, max: Tensor, norm: Tensor, mean: Tensor, scale: float
) -> Tensor:
    y = _step_output(q, k, v)
    _core.latent_attention_step(q, k, v, max, norm, mean, y, scale, torch.get_num_threads())
    _mark_updated(max, norm, mean)
    return y


def _step_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return _step_output(q, k, v)


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.latent_attention.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.causal, ctx.scale = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor, d_norm: Tensor, d_mean: Tensor) -> Any:
        q, k, v, key_mask, cu_seqlens, max, norm, mean = ctx.saved_tensors
        dq, dk, dv, d_initial_norm, d_initial_mean = _OPS.latent_attention_backward.default(
            q, k, v, key_mask, cu_seqlens, max, norm, mean, dy, d_norm, d_mean,
            ctx.causal, ctx.scale,
        )  # fmt: skip
        if norm is None:
            d_initial_norm = d_initial_mean = None
        return dq, dk, dv, None, None, None, d_initial_norm, d_initial_mean, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            "[latent_attention] got a forward-mode tangent, expected reverse mode: use "
            'backend="reference" for forward-mode AD'
        )


def _refuse_transforms(op: str) -> None:
    # An autograd.Function below the dispatcher is invisible to torch.func.
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"[{op}] got a torch.func transform, expected plain autograd: use "
            'backend="reference" under torch.func'
        )


def _forward_autograd(*args: Any) -> Any:
    _refuse_transforms("latent_attention")
    return _LatentAttention.apply(*args)  # type: ignore[no-untyped-call]


class _LatentAttentionBackward(torch.autograd.Function):
    """Stands behind the backward operator so that a second derivative raises by name."""

    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.latent_attention_backward.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "[latent_attention_backward] got a second derivative, expected first order: use "
            'backend="reference" for double backward'
        )


def _backward_autograd(*args: Any) -> Any:
    return _LatentAttentionBackward.apply(*args)  # type: ignore[no-untyped-call]


def _step_autograd(*args: Any) -> Any:
    _refuse_transforms("latent_attention_step")
    tangents = torch.autograd.forward_ad._current_level >= 0
    for name, tensor in zip(("q", "k", "v", "max", "norm", "mean"), args, strict=False):
        if torch.is_grad_enabled() and tensor.requires_grad:
            found = "that requires grad"
        elif tangents and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            found = "that carries a tangent"
        else:
            continue
        raise RuntimeError(
            f"[latent_attention_step] got {name} {found}, expected none: the state is updated in "
            "place. Use latent_attention for training, or no_grad()"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return _OPS.latent_attention_step.default(*args)


def _unbuilt_cuda(op: str) -> Any:
    def raise_unbuilt(*args: Any) -> Any:
        raise RuntimeError(f"[{op}] built without CUDA: got a CUDA tensor, expected a CPU tensor")

    return raise_unbuilt


_LIBRARY.impl("latent_attention", _forward_cpu, "CPU")
_LIBRARY.impl("latent_attention_backward", _backward_cpu, "CPU")
_LIBRARY.impl("latent_attention_step", _step_cpu, "CPU")
for _name in ("latent_attention", "latent_attention_backward", "latent_attention_step"):
    _LIBRARY.impl(_name, _unbuilt_cuda(_name), "CUDA")
_LIBRARY.impl("latent_attention", _forward_autograd, "Autograd")
_LIBRARY.impl("latent_attention_backward", _backward_autograd, "Autograd")
_LIBRARY.impl("latent_attention_step", _step_autograd, "Autograd")
torch.library.register_fake("latte_ext::latent_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("latte_ext::latent_attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_fake("latte_ext::latent_attention_step", _step_fake, lib=_LIBRARY)

latent_attention = _OPS.latent_attention.default
latent_attention_step = _OPS.latent_attention_step.default


# What tells a call that the dispatcher is needed. Private to torch, so it may go: then no call is
# direct.
_PROBES = (
    (torch._C, "_len_torch_dispatch_stack"),
    (torch._C, "_len_torch_function_stack"),
    (torch._C, "_are_functorch_transforms_active"),
    (torch._C, "_get_tracing_state"),
    (torch._C._autograd, "_profiler_enabled"),
    (torch.autograd.forward_ad, "_current_level"),
)
_CAN_BE_DIRECT = all(hasattr(module, name) for module, name in _PROBES)


def latent_attention_step_direct(
    q: Tensor, k: Tensor, v: Tensor, max: Tensor, norm: Tensor, mean: Tensor, scale: float
) -> Tensor | None:
    """The step without the dispatcher, whose 5 to 10 us are more than the kernel of one sequence.

    None, with nothing done, wherever the dispatcher would do more than call the kernel, and
    wherever an argument is not what the kernel takes: then the operator has to answer.
    """
    if (
        not _CAN_BE_DIRECT
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
        # A subclass may define __torch_dispatch__ or __torch_function__.
        or not (type(q) is type(k) is type(v) is type(max) is type(norm) is type(mean) is Tensor)
        or type(scale) is not float
    ):
        return None
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad
        or max.requires_grad or norm.requires_grad or mean.requires_grad
    ):  # fmt: skip
        return None
    # The core refuses what only it can see: devices, layouts, dtypes, lazy negation, shapes.
    y = _core.latent_attention_step_plain(q, k, v, max, norm, mean, scale, torch.get_num_threads())
    if y is not None:
        _mark_updated(max, norm, mean)
    return y
