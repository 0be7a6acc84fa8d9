# SPDX-License-Identifier: Apache-2.0
"""Pretrained transformers with windows and latents: convert, train a little, read far.

Needs transformers (`pip install latte-ext[hf]`). Importing it teaches transformers to load what
`save_pretrained` of a converted model has written.
"""

from .cache import LatteCache
from .convert import convert, load_adapter, save_adapter
from .layerwise import suggest_layers, window_errors
from .settings import LatteSettings

__all__ = [
    "LatteCache",
    "LatteSettings",
    "convert",
    "load_adapter",
    "save_adapter",
    "suggest_layers",
    "window_errors",
]
