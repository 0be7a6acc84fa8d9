# SPDX-License-Identifier: Apache-2.0
"""Attention layers, the mixers in front of them, blocks and small models, a replacement."""

from .attention import LatentAttention as LatentAttention
from .block import LatteBlock as LatteBlock
from .block import LayerCache as LayerCache
from .block import LayerDraft as LayerDraft
from .checkpoint import load as load
from .checkpoint import save as save
from .config import VARIANTS as VARIANTS
from .config import LatteConfig as LatteConfig
from .macchiato import MacchiatoAttention as MacchiatoAttention
from .model import LatteEncoder as LatteEncoder
from .model import LatteLM as LatteLM
from .model import sample_token as sample_token
from .multihead import MultiheadLatentAttention as MultiheadLatentAttention
from .multihead import replace_attention as replace_attention
from .recurrent import RGLRU as RGLRU
from .recurrent import RecurrentState as RecurrentState
from .recurrent import ShortConv as ShortConv

__all__ = [
    "RGLRU",
    "VARIANTS",
    "LatentAttention",
    "LatteBlock",
    "LatteConfig",
    "LatteEncoder",
    "LatteLM",
    "LayerCache",
    "LayerDraft",
    "MacchiatoAttention",
    "MultiheadLatentAttention",
    "RecurrentState",
    "ShortConv",
    "load",
    "replace_attention",
    "sample_token",
    "save",
]
