# SPDX-License-Identifier: Apache-2.0
"""`LatteConfig`: the sizes and parts of a model, and the names of the paper's variants."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from .._checks import check_fields

Mixer = Literal["none", "conv", "rglru"]
Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "silu"]

# "++" of the paper: RMSNorm before each part, a SiLU-gated MLP, no biases.
_PLUS: dict[str, Any] = {"norm": "rms", "mlp": "silu", "bias": False}
# Tokens of the authors' window.
_WINDOW = 128

VARIANTS: dict[str, dict[str, Any]] = {
    "latte": {},
    "latte-conv++": {"mixer": "conv", **_PLUS},
    "latte-rglru++": {"mixer": "rglru", **_PLUS},
    "latte-conv-swa++": {"mixer": "conv", "window": _WINDOW, **_PLUS},
    "latte-rglru-swa++": {"mixer": "rglru", "window": _WINDOW, **_PLUS},
    # Not of the paper: softmax attention to the last `window` tokens and nothing else.
    "softmax": {"num_latents": 0, "window": _WINDOW, **_PLUS},
}


@dataclasses.dataclass(frozen=True)
class LatteConfig:
    """What `LatteLM`, `LatteEncoder` and their blocks are made of (arXiv 2402.17512).

    Args:
        vocab_size: V.
        embed_dim: E.
        num_layers: number of blocks.
        num_heads: H.
        num_latents: L of each head; 0: the window alone.
        head_dim: D; None: E / H.
        kv_heads: Hk, heads of the keys and values; None: H.
        latent_heads: Hl, heads of the latents' keys; None: Hk.
        window: tokens of the local window, the token itself included; 0: latents alone.
        rotary_base: of the rotary embedding of the window's queries and keys; None: no rotation.
        mixer: what the latents' queries and keys are computed from: the block's normed input
            ("none"), its short convolution ("conv") or its RG-LRU ("rglru").
        conv_width: K of the convolution.
        norm: LayerNorm ("layer") or RMSNorm ("rms") before attention, before the MLP and at the
            end.
        mlp: GELU ("gelu") or SiLU-gated ("silu") MLP.
        mlp_dim: its hidden width; None: 4 E, or 8 E / 3 rounded up to a multiple of 8 where it is
            gated, which are as many weights.
        bias: biases in the MLP.
        dropout: rate on the embedding and on the output of attention and MLP, in training.
        latent_dropout: rate on p(l|t), in training.
        tie_head: the language model's head uses the embedding's weight.

    Raises:
        ValueError: a part of another name, or sizes out of range. TypeError: other types.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_latents: int
    head_dim: int | None = None
    kv_heads: int | None = None
    latent_heads: int | None = None
    window: int = 0
    rotary_base: float | None = 10_000.0
    mixer: Mixer = "none"
    conv_width: int = 4
    norm: Norm = "layer"
    mlp: Mlp = "gelu"
    mlp_dim: int | None = None
    bias: bool = True
    dropout: float = 0.0
    latent_dropout: float = 0.0
    tie_head: bool = True

    def __post_init__(self) -> None:
        for name, kinds in (("mixer", Mixer), ("norm", Norm), ("mlp", Mlp)):
            value = getattr(self, name)
            if value not in get_args(kinds):
                raise ValueError(
                    f"[LatteConfig] {name} is {value!r}, expected one of {get_args(kinds)}"
                )
        check_fields("LatteConfig", self)
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"[LatteConfig] {name} is {getattr(self, name)}, expected a positive number"
                )
        if self.mixer != "none" and self.num_latents == 0:
            raise ValueError(
                f"[LatteConfig] mixer is {self.mixer!r} with num_latents=0, expected 'none': "
                "it is the latents' queries and keys that a mixer is for"
            )

    @classmethod
    def named(cls, variant: str, **options: Any) -> LatteConfig:
        """The configuration of a variant of the paper, one of `VARIANTS`.

        Args:
            variant: "latte", "latte-conv++", "latte-rglru++", "latte-conv-swa++",
                "latte-rglru-swa++", or "softmax", the window alone.
            options: the other fields; they overrule the variant's.

        Raises:
            ValueError: an unknown variant; and as the constructor.
        """
        if variant not in VARIANTS:
            raise ValueError(
                f"[LatteConfig] variant is {variant!r}, expected one of {tuple(VARIANTS)}"
            )
        return cls(**{**VARIANTS[variant], **options})

    @property
    def hidden_dim(self) -> int:
        """Hidden width of the MLP."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        return 4 * self.embed_dim if self.mlp == "gelu" else -(-self.embed_dim // 3) * 8
