# SPDX-License-Identifier: Apache-2.0
"""Layer by layer beside full attention: what a window costs a layer, and a warm start for latents.

Each layer gets the input that the pretrained model gives it, so that all are measured, or trained,
in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ..window import sliding_window_attention
from .attention import Given, Kernel, Plan, Rows, padding_mask
from .convert import attention_layers, find_rotations, own_window
from .evaluation import implementation

_NAME = "latte_layerwise"
_Error = Callable[[Any, Rows, Tensor, float | None, float | None], None]
_current: list[_Error] = []


def _beside(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    latte_given: Given | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The pretrained layer's attention, shown to whoever is measuring."""
    window = own_window(module) or query.shape[2]
    full = sliding_window_attention(
        query, key, value, window=window, scale=scaling, softcap=softcap
    )
    position = torch.arange(query.shape[2], device=query.device)[None]
    hidden = query.new_empty(0) if latte_given is None else latte_given.hidden
    rows = Rows(hidden, query, key, value, position, None, None)
    _current[-1](module, rows, full, scaling, softcap)
    return full.transpose(1, 2), None


AttentionInterface.register(_NAME, _beside)
AttentionMaskInterface.register(_NAME, padding_mask)


@contextmanager
def _measuring(model: Any, error: _Error) -> Any:
    _current.append(error)
    try:
        with implementation(model, _NAME):
            yield
    finally:
        _current.pop()


def relative_error(got: Tensor, want: Tensor) -> Tensor:
    """Sum of squares of the difference over that of `want`."""
    return (got.float() - want.float()).square().sum() / want.float().square().sum()


@torch.no_grad()
def window_errors(model: Any, ids: Tensor, *, window: int = 512, sinks: int = 4) -> list[float]:
    """What each layer's attention loses when it sees a window and sinks instead of everything.

    Args:
        model: a causal one, converted or not.
        ids: (B,T) of texts, T above the window.

    Returns:
        Per layer the relative squared error of the output of attention; 0 for a layer whose own
        window is shorter.
    """
    if ids.dim() != 2 or ids.shape[1] <= window:
        raise ValueError(
            f"[window_errors] ids has shape {tuple(ids.shape)}, expected (B, T) with T above the "
            f"window of {window}"
        )
    layers = attention_layers(model)
    rotations = find_rotations(model, layers)
    errors = [0.0] * len(layers)

    def error(
        module: Any, rows: Rows, full: Tensor, scale: float | None, softcap: float | None
    ) -> None:
        if own_window(module) is None:
            plan = Plan(window, sinks, True, rotations[module.layer_idx])
            local = Kernel(plan, None, scale, softcap)(rows)
            errors[module.layer_idx] = float(relative_error(local, full))

    model.eval()
    with _measuring(model, error):
        model(input_ids=ids, use_cache=False)
    return errors


def suggest_layers(
    model: Any, ids: Tensor, *, window: int = 512, sinks: int = 4, above: float = 0.02
) -> list[int]:
    """The layers that lose the most to a window, for `convert(..., layers=...)`.

    Args:
        above: the relative squared error (see `window_errors`) from which a layer is suggested.
    """
    errors = window_errors(model, ids, window=window, sinks=sinks)
    return [index for index, error in enumerate(errors) if error > above]


def warm_start_loss(model: Any, ids: Tensor) -> Tensor:
    """The mean relative squared error of a converted model's layers to full attention, each on the
    input that the pretrained model gives it; differentiable in the latents' weights alone."""
    errors: list[Tensor] = []

    def error(
        module: Any, rows: Rows, full: Tensor, scale: float | None, softcap: float | None
    ) -> None:
        if module.latte is not None:
            with torch.enable_grad():
                y = Kernel(module.latte_plan, module.latte, scale, softcap)(rows)
                errors.append(relative_error(y, full))

    with _measuring(model, error), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return torch.stack(errors).mean()
