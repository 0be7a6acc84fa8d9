# SPDX-License-Identifier: Apache-2.0
"""`LatentBranch`: the weights that a conversion adds to an attention layer.

Notation: B batch, T tokens, E model width, H query heads, Hk key/value heads, Hl latent heads, L
latents per head, D channels per head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.recurrent import RGLRU, RecurrentState, ShortConv
from .settings import LatteSettings

MixerState = Tensor | RecurrentState


class AttentionShape(NamedTuple):
    """Sizes of an attention layer: E, H, Hk, D."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int


class LatentBranch(nn.Module):
    """Logits of the latents, and what else is trained in a converted layer.

    Weights are float32, products are in the type of the layer's input, logits float32::

        q_latent = x W_q + b      b starts at c + log L for the window, 0 for the latents
        k_latent = x W_k + rate * position

    Args:
        settings: see `LatteSettings`.
        shape: of the layer.
    """

    def __init__(
        self,
        settings: LatteSettings,
        shape: AttentionShape,
        *,
        causal: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.shape = settings, shape
        if settings.decay and not causal:
            raise ValueError(
                "[convert] decay is True for a layer that attends in both directions, expected "
                "False"
            )
        latents, choices = settings.latents, 1 + settings.latents
        self.latent_heads = settings.latent_heads or shape.kv_heads
        if shape.heads % self.latent_heads:
            raise ValueError(
                f"[convert] latent_heads is {self.latent_heads}, expected a divisor of the "
                f"{shape.heads} query heads"
            )
        if settings.features == "heads" and self.latent_heads not in (1, shape.kv_heads):
            raise ValueError(
                f"[convert] latent_heads is {self.latent_heads} with features='heads', expected 1 "
                f"or the {shape.kv_heads} key/value heads"
            )

        def weight(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*sizes, device=device))

        if settings.features == "hidden":
            self.q_weight = weight(shape.heads * choices, shape.width)
            self.k_weight = weight(self.latent_heads * latents, shape.width)
        else:
            self.q_weight = weight(shape.heads, shape.head_dim, choices)
            self.k_weight = weight(shape.kv_heads, shape.head_dim, latents)
        self.q_bias = weight(shape.heads, choices)
        if settings.decay:
            self.log_rate = weight(self.latent_heads, latents)
        self.mixer: ShortConv | RGLRU | None = None
        if settings.mixer == "conv":
            self.mixer = ShortConv(
                shape.width, settings.conv_width, causal=causal, bias=False, device=device
            )
        elif settings.mixer == "rglru":
            self.mixer = RGLRU(shape.width, causal=causal, device=device)
            self.mixer_scale = weight(shape.width)
        if settings.value_gain:
            self.value_gain = weight(shape.kv_heads, shape.head_dim)
        if settings.output_rank:
            self.output_a = weight(settings.output_rank, shape.heads * shape.head_dim)
            self.output_b = weight(shape.width, settings.output_rank)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start that leaves the model as it was, up to the 1 - p(0|t) of the gate."""
        settings = self.settings
        std = settings.init_std
        if settings.features == "heads":
            # Queries and keys have about unit entries per channel, a layer's input after its norm
            # too, but D channels instead of E.
            std *= math.sqrt(self.shape.width / self.shape.head_dim)
        nn.init.normal_(self.q_weight, std=std)
        nn.init.normal_(self.k_weight, std=std)
        self.q_bias.zero_()
        self.q_bias[:, 0] = settings.gate + math.log(max(settings.latents, 1))
        if settings.decay:
            # Horizons of 1 to 64 windows, and one that is as good as infinite.
            span = torch.linspace(0, math.log(64), max(settings.latents - 1, 1))
            self.log_rate.copy_(F.pad(-math.log(settings.window) - span, (0, 1), value=-20.0)[
                : settings.latents
            ])  # fmt: skip
        if isinstance(self.mixer, ShortConv):
            self.mixer.weight.zero_()
            self.mixer.weight[:, -1 if self.mixer.causal else (self.mixer.width - 1) // 2] = 1
        elif self.mixer is not None:
            self.mixer.reset_parameters()
            self.mixer_scale.zero_()
        if settings.value_gain:
            self.value_gain.fill_(1)
        if settings.output_rank:
            nn.init.normal_(self.output_a, std=1 / math.sqrt(self.output_a.shape[1]))
            self.output_b.zero_()

    def extra_repr(self) -> str:
        shape, settings = self.shape, self.settings
        return (
            f"heads={shape.heads}, latent_heads={self.latent_heads}, latents={settings.latents}, "
            f"features={settings.features!r}"
        )

    def mixed(
        self,
        x: Tensor,
        state: MixerState | None,
        *,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, MixerState | None]:
        """The layer's input (B,T,E) as the latents see it, and the mixer's state after it."""
        if self.mixer is None:
            return x, None
        mixed: Tensor
        after: MixerState | None = None
        wide = x.float()
        if return_state:
            mixed, after = self.mixer(
                wide, key_mask=key_mask, cu_seqlens=cu_seqlens, state=state, return_state=True
            )
        else:
            mixed = self.mixer(wide, key_mask=key_mask, cu_seqlens=cu_seqlens, state=state)
        if isinstance(self.mixer, RGLRU):
            mixed = wide + self.mixer_scale * mixed
        return mixed.to(x.dtype), after

    def logits(
        self, x: Tensor, q: Tensor | None, k: Tensor | None, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """q_latent (B,H,T,1+L) and k_latent (B,Hl,T,L).

        Args:
            x: (B,T,E), of `mixed`. q: (B,H,T,D), k: (B,Hk,T,D), not rotated, for
                features="heads".
            position: (B,T) or (1,T) of the tokens in their sequence.
        """
        q_weight, k_weight = self.q_weight.to(x.dtype), self.k_weight.to(x.dtype)
        if self.settings.features == "hidden":
            q_latent = F.linear(x, q_weight).unflatten(2, (self.shape.heads, -1)).transpose(1, 2)
            k_latent = F.linear(x, k_weight).unflatten(2, (self.latent_heads, -1)).transpose(1, 2)
        else:
            assert q is not None
            assert k is not None
            q_latent = q @ q_weight
            k_latent = k @ k_weight
            if self.latent_heads == 1:
                k_latent = k_latent.sum(1, keepdim=True)
        # The sum with a float32 bias is float32: half precision would round the gate's logit.
        q_latent = q_latent + self.q_bias[:, None]
        if self.settings.decay:
            rate = self.log_rate.exp()[:, None]
            k_latent = torch.addcmul(k_latent.float(), position[:, None, :, None].float(), rate)
        return q_latent, k_latent

    def values(self, v: Tensor) -> Tensor | None:
        """The values (B,Hk,T,D) that the latents average; None: v."""
        if not self.settings.value_gain:
            return None
        return v * self.value_gain[:, None].to(v.dtype)

    def project(self, y: Tensor, projected: Tensor) -> Tensor:
        """`projected` (B,T,E), the layer's output projection of y (B,T,H D), and the addition."""
        if not self.settings.output_rank:
            return projected
        a, b = self.output_a.to(y.dtype), self.output_b.to(y.dtype)
        return projected + F.linear(F.linear(y, a), b)
