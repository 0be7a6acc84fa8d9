# SPDX-License-Identifier: Apache-2.0
"""Modules around `latte_ext.latent_attention`: the attention layer, small models, a replacement."""

from .attention import LatentAttention as LatentAttention
from .attention import MultiheadLatentAttention as MultiheadLatentAttention
from .attention import replace_attention as replace_attention
from .model import LatteBlock as LatteBlock
from .model import LatteEncoder as LatteEncoder
from .model import LatteLM as LatteLM
from .model import LayerCache as LayerCache

__all__ = [
    "LatentAttention",
    "LatteBlock",
    "LatteEncoder",
    "LatteLM",
    "LayerCache",
    "MultiheadLatentAttention",
    "replace_attention",
]
