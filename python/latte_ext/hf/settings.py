# SPDX-License-Identifier: Apache-2.0
"""What a conversion adds to a model. Notation: L latents per head, D channels per head."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from .._checks import check_fields

Features = Literal["hidden", "heads"]
Mixer = Literal["none", "conv", "rglru"]


@dataclass(frozen=True)
class LatteSettings:
    """The window that replaces full attention, and the latents beside it.

    Args:
        window: tokens that a token attends to, itself included, in an encoder to each side. Layers
            whose own window is shorter keep theirs, and get neither sinks nor latents.
        latents: L of each head; 0: the window and the sinks alone.
        sinks: the first tokens of a sequence, which stay visible when they have left the window, at
            the rotary distance that they had when they left it (attention sinks, arXiv 2309.17453).
        layers: indices of the layers with latents; None: all that see everything.
        latent_heads: heads of the latents' keys, a divisor of the query heads; None: as many as the
            layer's key/value heads.
        features: what the latents' logits are computed from: the layer's input ("hidden"), or the
            pretrained queries and keys before their rotation ("heads"), which takes D (1 + L)
            weights per head.
        mixer: what stands before that: nothing ("none"), a short convolution ("conv") or RG-LRU
            ("rglru"). Both start as the identity.
        conv_width: K of the convolution.
        decay: a rate of forgetting per latent, trained: the key logit of token s grows by the rate
            per token, so that old tokens weigh less. They start between 1/window and
            1/(64 window), the last latent of each head at almost 0. Causal models only.
        gate: c; a layer starts with p(0|t) = 1 / (1 + exp(-c)) for its window.
        value_gain: train a factor per channel on the values that the latents average.
        output_rank: rank of a trained addition to the output projection (LoRA, arXiv 2106.09685).
        init_std: standard deviation of the new projections' weights.
        positions: rows that a table of learned positions shall have; those beyond the pretrained
            ones repeat its first half (`extended_rows`). None: the table as it is, if there is one.

    Raises:
        TypeError: an option that there is not, or of another type.
        ValueError: values out of range.
    """

    window: int = 512
    latents: int = 64
    sinks: int = 4
    layers: tuple[int, ...] | None = None
    latent_heads: int | None = None
    features: Features = "hidden"
    mixer: Mixer = "none"
    conv_width: int = 4
    decay: bool = False
    gate: float = 5.0
    value_gain: bool = False
    output_rank: int = 0
    init_std: float = 0.02
    positions: int | None = None

    def __post_init__(self) -> None:
        check_fields("LatteSettings", self)
        for name, least in (
            ("window", 1), ("latents", 0), ("sinks", 0), ("latent_heads", 1), ("conv_width", 1),
            ("output_rank", 0), ("init_std", 0), ("positions", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(
                    f"[LatteSettings] {name} is {value}, expected a number of at least {least}"
                )
        for name, kinds in (("features", Features), ("mixer", Mixer)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"[LatteSettings] {name} is {getattr(self, name)!r}, "
                    f"expected one of {get_args(kinds)}"
                )
        if self.features == "heads" and self.mixer != "none":
            raise ValueError(
                f"[LatteSettings] mixer is {self.mixer!r} with features='heads', expected "
                "features='hidden': a mixer stands between the layer's input and the latents"
            )
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(int(i) for i in self.layers))

    @classmethod
    def create(cls, options: dict[str, Any]) -> LatteSettings:
        """From the options of `convert`.

        Raises:
            TypeError: one that there is not.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise TypeError(f"[LatteSettings] got {name!r}, expected one of {known}")
        return cls(**options)

    @classmethod
    def from_config(cls, latte: dict[str, Any]) -> LatteSettings:
        """From what a converted model's configuration or an adapter holds."""
        return cls(
            **{field.name: latte[field.name] for field in fields(cls) if field.name in latte}
        )

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        values = asdict(self)
        values["layers"] = None if self.layers is None else list(self.layers)
        return values
