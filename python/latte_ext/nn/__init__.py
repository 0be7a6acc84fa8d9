# SPDX-License-Identifier: Apache-2.0
"""Modules around `latte_ext.latent_attention`: the attention layer, small models, a replacement."""

from .attention import LatentAttention as LatentAttention
from .block import LatteBlock as LatteBlock
from .block import LayerCache as LayerCache
from .model import LatteEncoder as LatteEncoder
from .model import LatteLM as LatteLM
from .multihead import MultiheadLatentAttention as MultiheadLatentAttention
from .multihead import replace_attention as replace_attention

__all__ = [
    "LatentAttention",
    "LatteBlock",
    "LatteEncoder",
    "LatteLM",
    "LayerCache",
    "MultiheadLatentAttention",
    "replace_attention",
]
