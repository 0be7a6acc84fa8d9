# SPDX-License-Identifier: Apache-2.0
"""Latent attention for PyTorch (Latte, arXiv 2402.17512): linear time, constant-memory decoding."""

import importlib.util
from typing import Any

if importlib.util.find_spec("torch") is not None:
    # First, so that the core shares torch's OpenMP runtime instead of starting its own.
    import torch  # noqa: F401

    from . import reference, storage
    from ._drafts import LatentDraft as LatentDraft
    from ._drafts import MacchiatoDraft as MacchiatoDraft
    from ._drafts import WindowDraft as WindowDraft
    from ._drafts import linear_recurrence_commit as linear_recurrence_commit
    from ._drafts import rg_lru_commit as rg_lru_commit
    from ._drafts import short_conv_commit as short_conv_commit
    from .convolution import short_conv as short_conv
    from .convolution import short_conv_step as short_conv_step
    from .draft import latent_attention_draft as latent_attention_draft
    from .draft import macchiato_attention_draft as macchiato_attention_draft
    from .draft import sliding_window_attention_draft as sliding_window_attention_draft
    from .functional import latent_attention as latent_attention
    from .functional import latent_attention_step as latent_attention_step
    from .macchiato import macchiato_attention as macchiato_attention
    from .macchiato import macchiato_attention_step as macchiato_attention_step
    from .prefix_cache import PrefixCache as PrefixCache
    from .quantisation import QuantisedState as QuantisedState
    from .quantisation import dequantise as dequantise
    from .quantisation import quantisation_error as quantisation_error
    from .quantisation import quantise as quantise
    from .recurrence import linear_recurrence as linear_recurrence
    from .recurrence import rg_lru as rg_lru
    from .recurrence import rg_lru_step as rg_lru_step
    from .state import LatentState as LatentState
    from .window import sliding_window_attention as sliding_window_attention
    from .window import sliding_window_attention_step as sliding_window_attention_step
    from .window_cache import MacchiatoState as MacchiatoState
    from .window_cache import WindowCache as WindowCache
    from .window_cache import WindowSinks as WindowSinks
else:
    # The C++ files of this package serve programs that have no torch.
    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(f"[latte_ext] {name} needs torch, expected `pip install torch`")
        raise AttributeError(f"module 'latte_ext' has no attribute {name!r}")


from ._core import version as _version

__version__ = _version()
__all__ = [
    "LatentDraft",
    "LatentState",
    "MacchiatoDraft",
    "MacchiatoState",
    "PrefixCache",
    "QuantisedState",
    "WindowCache",
    "WindowDraft",
    "WindowSinks",
    "__version__",
    "dequantise",
    "latent_attention",
    "latent_attention_draft",
    "latent_attention_step",
    "linear_recurrence",
    "linear_recurrence_commit",
    "macchiato_attention",
    "macchiato_attention_draft",
    "macchiato_attention_step",
    "quantisation_error",
    "quantise",
    "reference",
    "rg_lru",
    "rg_lru_commit",
    "rg_lru_step",
    "short_conv",
    "short_conv_commit",
    "short_conv_step",
    "sliding_window_attention",
    "sliding_window_attention_draft",
    "sliding_window_attention_step",
    "storage",
]
