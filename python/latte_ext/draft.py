# SPDX-License-Identifier: Apache-2.0
"""Drafts: several tokens are looked at while the state stays, and some of them enter it later.

Notation as in `functional`, and w drafted tokens. A draft computes the very steps that decoding
would take, on a copy of the state, so its outputs have their bits (theorem T6). Not differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import _core
from ._autograd import is_differentiated
from ._checks import (
    check_backend,
    check_by_core,
    check_rank,
    check_scale,
    check_shape,
    check_tensors,
    check_type,
    reported_as,
)
from ._drafts import LatentDraft, MacchiatoDraft, WindowDraft
from ._window_inputs import check_cache, check_softcap, check_window, sink_tensors
from .functional import check_state, latent_attention_step
from .macchiato import check_latents, macchiato_attention_step, match_heads
from .macchiato import check_state as check_macchiato_state
from .state import LatentState
from .window import sliding_window_attention_step
from .window_cache import MacchiatoState, WindowCache, WindowSinks


def latent_attention_draft(
    q: Tensor, k: Tensor, v: Tensor, state: LatentState, *, scale: float = 1.0
) -> tuple[Tensor, LatentDraft]:
    """w tokens per sequence; `state` is left as it is. `state.commit(draft, accepted)` goes on.

    Args:
        q: (N,H,w,L), dtypes as in `latent_attention`.
        k: (N,Hk,w,L).
        v: (N,Hk,w,D).
        state: the tokens before these: N sequences, Hk heads.
        scale: multiplies the logits q and k.

    Returns:
        y (N,H,w,D) in v's dtype, bit for bit that of w calls of `latent_attention_step` (T6), and
        the draft: k and v, without a copy.

    Raises:
        ValueError: shapes or values.
        TypeError: dtypes.
        RuntimeError: devices, or an input that requires grad while grad mode is on.
    """
    op = "latent_attention_draft"
    check_tensors(op, {"q": q, "k": k, "v": v})
    check_scale(op, scale)
    check_type(op, "state", state, LatentState)
    check_state(op, q, state)
    check_backend(op, "q", q, None)
    with reported_as(op, "latent_attention"):
        check_by_core(
            lambda _: _core.latent_attention_check(
                q, k, v, None, None, state.max, state.norm, state.mean, True, float(scale)
            ),
            None,
        )
    _refuse_gradients(op, q, k, v, *state)
    scratch = state.clone()

    def step(i: int) -> Tensor:
        return latent_attention_step(
            q[:, :, i], k[:, :, i], v[:, :, i], scratch, scale=float(scale)
        )

    return _in_steps(q, v, step), LatentDraft(k, v, float(scale))


def sliding_window_attention_draft(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: WindowCache,
    *,
    scale: float | None = None,
    sinks: WindowSinks | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, WindowDraft]:
    """w tokens per sequence; `cache` is left as it is. `cache.commit(draft, accepted)` goes on.

    Args:
        q: (N,H,w,Dk), dtypes as in `sliding_window_attention`.
        k: (N,Hk,w,Dk).
        v: (N,Hk,w,D).
        cache: N sequences, Hk heads; its window is the window.
        scale: multiplies q . k; None is 1/sqrt(Dk).
        sinks: as in `sliding_window_attention`, with q (N,H,w,Dk).
        softcap: as in `sliding_window_attention`.

    Returns:
        y (N,H,w,D) in v's dtype, bit for bit that of w steps (T6), and the draft: k and v, without
        a copy.

    Raises:
        ValueError: shapes or values.
        TypeError: types and dtypes.
        RuntimeError: devices, or an input that requires grad while grad mode is on.
    """
    op = "sliding_window_attention_draft"
    scale, softcap_given = _check_window(op, q, k, v, cache, scale, sinks, softcap)
    scratch = cache.clone()

    def step(i: int) -> Tensor:
        return sliding_window_attention_step(
            q[:, :, i], k[:, :, i], v[:, :, i], scratch, scale=scale, sinks=_sinks_of(sinks, i),
            softcap=softcap_given,
        )  # fmt: skip

    with reported_as(op, "sliding_window_attention_step"):
        return _in_steps(q, v, step), WindowDraft(k, v)


def macchiato_attention_draft(
    q_latent: Tensor,
    k_latent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: MacchiatoState,
    *,
    scale: float | None = None,
    latent_scale: float = 1.0,
    sinks: WindowSinks | None = None,
    v_latent: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, MacchiatoDraft]:
    """w tokens per sequence; `state` is left as it is. `state.commit(draft, accepted)` goes on.

    Args:
        q_latent: (N,H,w,1+L), dtypes as in `macchiato_attention`.
        k_latent: (N,Hl,w,L).
        q: (N,H,w,Dk).
        k: (N,Hk,w,Dk).
        v: (N,Hk,w,D).
        state: N sequences; its window is the window.
        scale: multiplies q . k; None is 1/sqrt(Dk).
        latent_scale: multiplies q_latent and k_latent.
        softcap: as in `sliding_window_attention`.
        sinks: as in `macchiato_attention`, with q (N,H,w,Dk).
        v_latent: (N,Hk,w,D), as in `macchiato_attention`.

    Returns:
        y (N,H,w,D) in v's dtype, bit for bit that of w steps (T6), and the draft: the rows of keys
        and values.

    Raises:
        ValueError: shapes or values.
        TypeError: types and dtypes.
        RuntimeError: devices, or an input that requires grad while grad mode is on.
    """
    op = "macchiato_attention_draft"
    check_tensors(op, {"q": q, "k": k, "v": v})
    check_rank(op, 4, q=q, k=k, v=v)
    check_latents(op, q, k, v, q_latent, k_latent, v_latent)
    check_scale(op, latent_scale)
    check_type(op, "state", state, MacchiatoState)
    window = 0 if state.window is None else state.window.window
    check_macchiato_state(op, q, window, k_latent.shape[3], state)
    if state.window is not None:
        _check_window(op, q, k, v, state.window, scale, sinks, softcap)
    _refuse_gradients(op, q_latent, k_latent, q, k, v, v_latent)
    scratch = state.clone()

    def step(i: int) -> Tensor:
        return macchiato_attention_step(
            q_latent[:, :, i], k_latent[:, :, i], q[:, :, i], k[:, :, i], v[:, :, i], scratch,
            scale=scale, latent_scale=latent_scale, sinks=_sinks_of(sinks, i), softcap=softcap,
            v_latent=None if v_latent is None else v_latent[:, :, i],
        )  # fmt: skip

    with reported_as(op, "macchiato_attention_step"), reported_as(op, "latent_attention_step"):
        y = _in_steps(q, v, step)
    latent = None
    if state.latent is not None:
        k_latent, v_latent = match_heads(k_latent, v, v_latent)
        latent = LatentDraft(k_latent, v if v_latent is None else v_latent, float(latent_scale))
    return y, MacchiatoDraft(latent, None if state.window is None else WindowDraft(k, v))


def _in_steps(q: Tensor, v: Tensor, step: Callable[[int], Tensor]) -> Tensor:
    """y (N,H,w,D) in v's dtype, of which step(i) computes row i."""
    y = v.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    for i in range(q.shape[2]):
        y[:, :, i] = step(i)
    return y


def _sinks_of(sinks: WindowSinks | None, token: int) -> WindowSinks | None:
    return None if sinks is None else sinks._replace(q=sinks.q[:, :, token])


def _check_window(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: WindowCache,
    scale: float | None,
    sinks: WindowSinks | None,
    softcap: float | None,
) -> tuple[float, float | None]:
    check_tensors(op, {"q": q, "k": k, "v": v})
    check_rank(op, 4, q=q, k=k, v=v)
    scale = check_window(op, q, 1, scale, True, minimum=1)
    cap = check_softcap(op, softcap)
    check_cache(op, q, cache)
    given = sink_tensors(op, q, sinks)
    with reported_as(op, "sliding_window_attention"):
        check_by_core(
            lambda _: _core.sliding_window_check(
                q, k, v, None, None, *given, cache.window, 0, True, float(scale), cap
            ),
            None,
        )
    for name, x, rows in (("key", cache.key, k), ("value", cache.value, v)):
        shape = (q.shape[0], k.shape[1], cache.window, rows.shape[3])
        check_shape(op, f"cache.{name}", x, *shape)
    _refuse_gradients(op, q, k, v, *cache)
    return scale, softcap


def _refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    if is_differentiated(*tensors):
        raise RuntimeError(
            f"[{op}] got an input that requires grad, expected none: a draft is not "
            f"differentiable. Use {op.removesuffix('_draft')} for training, or no_grad()"
        )
