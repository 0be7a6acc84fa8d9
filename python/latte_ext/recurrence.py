# SPDX-License-Identifier: Apache-2.0
"""Linear recurrences. Notation: B batch, T tokens, C channels, N sequences (B, or
len(cu_seqlens) - 1 when packed)."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from . import _core, _mixer_ops
from . import _reference_mixers as reference
from ._checks import Backend, check_backend, check_by_core, check_flags, check_tensors


@overload
def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    h0: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    return_state: Literal[False] = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    h0: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    return_state: Literal[True],
    backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    h0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h[t] = a[t] h[t-1] + b[t], channel by channel.

    Args:
        a: (B,T,C), any values. float32, bfloat16, float16, or float64 (then b and h0 too).
        b: (B,T,C). Any strides are accepted.
        h0: (N,C) float32 (float64 for float64 inputs), h before the first token; None: zero.
        cu_seqlens: (N+1,) int32 or int64 borders of N sequences packed along T, with B == 1.
        reverse: from the last token to the first, h[t] = a[t] h[t+1] + b[t]; h0 is then what
            follows the last token.
        return_state: also return the last h of every sequence, (N,C) in the dtype of h0.
        backend: None chooses by device; "cpu", "cuda", or "reference" (plain torch).

    Returns:
        h (B,T,C) in b's dtype, and the state if asked for. Gradients reach a, b and h0.

    Raises:
        ValueError: shapes, values or combinations.
        TypeError: dtypes.
        RuntimeError: devices.
    """
    if backend is None:
        results = _mixer_ops.linear_recurrence_direct(
            a, b, cu_seqlens, h0, reverse, extras=return_state
        )
        if results is not None:
            return results if return_state else results[0]  # type: ignore[no-any-return]
    check_linear_recurrence(
        a, b, h0=h0, cu_seqlens=cu_seqlens, reverse=reverse, backend=backend,
        shapes=backend == "reference",
    )  # fmt: skip
    if backend == "reference":
        h, final = reference.linear_recurrence(a, b, h0=h0, cu_seqlens=cu_seqlens, reverse=reverse)
    else:
        h, final = _mixer_ops.linear_recurrence(a, b, cu_seqlens, h0, reverse)
    return (h, final) if return_state else h


@overload
def rg_lru(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    *,
    h0: Tensor | None = ...,
    fresh: Tensor | None = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    return_state: Literal[False] = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def rg_lru(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    *,
    h0: Tensor | None = ...,
    fresh: Tensor | None = ...,
    key_mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ...,
    reverse: bool = ...,
    return_state: Literal[True],
    backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...
def rg_lru(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    *,
    h0: Tensor | None = None,
    fresh: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    return_state: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The real-gated linear recurrent unit of Griffin (arXiv 2402.19427, section 2.4).

        r, i  = sigmoid(gate_a), sigmoid(gate_x)
        log a = -8 r softplus(log_lambda)              a = (1 + lambda)^(-8 r)
        h[t]  = a[t] h[t-1] + sqrt(1 - a[t]^2) i[t] x[t]

    The square root is 1 at the first token of a sequence, and its derivative is at most 1000, as
    in the public Griffin code, whose parameter `a_param` log_lambda is.

    Args:
        x: (B,T,C). float32, bfloat16, float16, or float64 (then all others too).
        gate_a: (B,T,C), the recurrence gate before the sigmoid. Any strides are accepted.
        gate_x: (B,T,C), the input gate before the sigmoid.
        log_lambda: (C,), the decay per channel.
        h0: (N,C) float32 (float64 for float64 inputs), the state of sequences that go on; None:
            every sequence starts here.
        fresh: (N,) bool with h0, true for a sequence of which h0 (zeros) holds no token yet: it
            starts here.
        key_mask: (B,T) bool, true for a real token; at the others the state stays as it is.
        cu_seqlens: (N+1,) int32 or int64 borders of N sequences packed along T, with B == 1.
        reverse: from the last token to the first.
        return_state: also return the last h of every sequence, (N,C) in the dtype of h0.
        backend: None chooses by device; "cpu", "cuda", or "reference" (plain torch).

    Returns:
        h (B,T,C) in x's dtype, and the state if asked for. Gradients reach x, the gates,
        log_lambda and h0.

    Raises:
        ValueError: shapes, values or combinations.
        TypeError: dtypes.
        RuntimeError: devices.
    """
    if backend is None:
        results = _mixer_ops.rg_lru_direct(
            x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, reverse,
            extras=return_state,
        )  # fmt: skip
        if results is not None:
            return results if return_state else results[0]  # type: ignore[no-any-return]
    check_rg_lru(
        x, gate_a, gate_x, log_lambda, h0=h0, fresh=fresh, key_mask=key_mask,
        cu_seqlens=cu_seqlens, reverse=reverse, backend=backend, shapes=backend == "reference",
    )  # fmt: skip
    if backend == "reference":
        h, final = reference.rg_lru(
            x, gate_a, gate_x, log_lambda, h0=h0, fresh=fresh, key_mask=key_mask,
            cu_seqlens=cu_seqlens, reverse=reverse,
        )  # fmt: skip
    else:
        h, final = _mixer_ops.rg_lru(
            x, gate_a, gate_x, log_lambda, key_mask, cu_seqlens, h0, fresh, reverse
        )
    return (h, final) if return_state else h


def check_linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: Backend | None,
    shapes: bool,
) -> None:
    """What `linear_recurrence` checks of its arguments, if `shapes` also what the operator does.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_recurrence`.
    """
    op = "linear_recurrence"
    check_tensors(op, {"a": a, "b": b}, h0=h0, cu_seqlens=cu_seqlens)
    check_flags(op, reverse=reverse)
    check_backend(op, "a", a, backend)
    if shapes:
        check_by_core(lambda borders: _core.linear_recurrence_check(a, b, borders, h0), cu_seqlens)


def check_rg_lru(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    *,
    h0: Tensor | None,
    fresh: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    backend: Backend | None,
    shapes: bool,
) -> None:
    """What `rg_lru` checks of its arguments, if `shapes` also what the operator does.

    Raises:
        ValueError, TypeError, RuntimeError: as `rg_lru`.
    """
    op = "rg_lru"
    check_tensors(
        op, {"x": x, "gate_a": gate_a, "gate_x": gate_x, "log_lambda": log_lambda},
        h0=h0, fresh=fresh, key_mask=key_mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    check_flags(op, reverse=reverse)
    check_backend(op, "x", x, backend)
    if shapes:
        check_by_core(
            lambda borders: _core.rg_lru_check(
                x, gate_a, gate_x, log_lambda, key_mask, borders, h0, fresh
            ),
            cu_seqlens,
        )


def rg_lru_step(
    x: Tensor,
    gate_a: Tensor,
    gate_x: Tensor,
    log_lambda: Tensor,
    state: Tensor,
    *,
    fresh: Tensor | None = None,
) -> Tensor:
    """One token per sequence: `state` is updated in place. Not differentiable.

    Args:
        x: (N,C), dtypes as in `rg_lru`.
        gate_a: (N,C).
        gate_x: (N,C).
        log_lambda: (C,).
        state: (N,C) float32 (float64 for float64 inputs).
        fresh: (N,) bool, true for a sequence without a token yet; left as it is. None: none.

    Returns:
        h (N,C) in x's dtype.

    Raises:
        ValueError: shapes.
        TypeError: dtypes.
        RuntimeError: devices, or an input that requires grad while grad mode is on.
    """
    y: Tensor | None = _mixer_ops.rg_lru_step_direct(x, gate_a, gate_x, log_lambda, state, fresh)
    if y is not None:
        return y
    op = "rg_lru_step"
    check_tensors(
        op,
        {"x": x, "gate_a": gate_a, "gate_x": gate_x, "log_lambda": log_lambda, "state": state},
        fresh=fresh,
    )
    return _mixer_ops.rg_lru_step(  # type: ignore[no-any-return]
        x, gate_a, gate_x, log_lambda, state, fresh
    )
