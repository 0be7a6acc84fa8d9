# SPDX-License-Identifier: Apache-2.0
"""Latent attention in the place of nn.MultiheadAttention: same call, and a swap inside a model.

Notation: B batch, T tokens, E model width, L latents per head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_type
from .attention import LatentAttention


class MultiheadLatentAttention(nn.Module):
    """`LatentAttention` with the call signature of a batch_first nn.MultiheadAttention.

    It works as the `self_attn` of nn.TransformerEncoderLayer and nn.TransformerDecoderLayer. Their
    fused inference path reads a softmax attention's weights, so the attributes that choose it say
    no. nn.TransformerEncoder needs enable_nested_tensor=False (`replace_attention` sees to it).

    Args: those of `LatentAttention`, with causal=False by default. Whether the layer is causal is
    decided here; a mask in the call can only confirm it.
    """

    batch_first = True
    # None and True are what nn.TransformerEncoderLayer takes as "no fused path for this layer".
    in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_latents: int,
        *,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        latent_dropout: float = 0.0,
        scale: float = 1.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.attention = LatentAttention(
            embed_dim,
            num_heads,
            num_latents,
            head_dim=head_dim,
            kv_heads=kv_heads,
            causal=causal,
            dropout=dropout,
            latent_dropout=latent_dropout,
            scale=scale,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Self-attention of query (B,T,E); returns (y (B,T,E), None).

        Args:
            query: (B,T,E), from which q and k are projected.
            key: the same tensor as query.
            value: (B,T,E), usually the same tensor too.
            key_padding_mask: (B,T), true (or -inf) for a token to ignore.
            need_weights: must be false: there is no T x T matrix of weights.
            attn_mask: None, or for a causal layer the causal mask (T,T), bool or float.
            average_attn_weights: ignored, concerns the weights.
            is_causal: a promise that attn_mask is the causal one, which is then not looked at.

        Raises:
            ValueError: anything that latent attention cannot honour.
        """
        op = "[MultiheadLatentAttention]"
        given = {"query": query, "key": key, "value": value}
        for name, x in (given | {"key_padding_mask": key_padding_mask}).items():
            if x is not None or name in given:
                check_type("MultiheadLatentAttention", name, x, Tensor)
        if query.is_nested:
            raise ValueError(
                f"{op} query is a nested tensor, expected (B, T, E): build nn.TransformerEncoder "
                "with enable_nested_tensor=False"
            )
        if query is not key:
            raise ValueError(f"{op} key is another tensor than query, expected self-attention")
        if need_weights:
            raise ValueError(
                f"{op} need_weights is True, expected False: there are no T x T weights"
            )
        if value.shape != query.shape:
            raise ValueError(
                f"{op} value has shape {tuple(value.shape)}, expected {tuple(query.shape)} as query"
            )
        if attn_mask is not None or is_causal:
            self._check_causal(attn_mask, is_causal, query.shape[1])
        key_mask = None
        if key_padding_mask is not None:
            key_mask = _key_mask(key_padding_mask)
        y: Tensor = self.attention(value, x_qk=query, key_mask=key_mask)
        return y, None

    def _check_causal(self, attn_mask: Tensor | None, is_causal: bool, tokens: int) -> None:
        op = "[MultiheadLatentAttention]"
        if not self.attention.causal:
            got = "is_causal=True" if is_causal else "attn_mask"
            raise ValueError(
                f"{op} got {got}, expected none: the layer was built with causal=False"
            )
        if is_causal or attn_mask is None:
            return
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=attn_mask.device).triu(1)
        if attn_mask.dtype != torch.bool:
            future = torch.zeros_like(future, dtype=attn_mask.dtype).masked_fill(future, -torch.inf)
        if not torch.equal(attn_mask, future):
            raise ValueError(
                f"{op} attn_mask of shape {tuple(attn_mask.shape)} is not the causal mask, "
                f"expected the causal mask ({tokens}, {tokens}) or None"
            )


def _key_mask(key_padding_mask: Tensor) -> Tensor:
    """True for a real token, from true or -inf for a token to ignore."""
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    real = key_padding_mask == 0
    if not bool((real | (key_padding_mask == -torch.inf)).all()):
        raise ValueError(
            "[MultiheadLatentAttention] key_padding_mask has other values than 0 and -inf, "
            "expected a mask: a weight per key is not supported"
        )
    return real


def replace_attention(
    model: nn.Module,
    num_latents: int,
    *,
    causal: bool = False,
    latent_dropout: float | None = None,
    scale: float = 1.0,
) -> list[str]:
    """Replace, in place, every self-attention nn.MultiheadAttention of `model` by latent attention.

    The value and output projections keep their weights, the projections of the latent logits are
    new: train the model further. The `multihead_attn` of nn.TransformerDecoderLayer, which is
    cross-attention, stays. A layer used in two places stays shared.

    Args:
        model: any module that has batch_first nn.MultiheadAttention layers inside.
        num_latents: L, the number of latents of each head.
        causal: whether a token sees only its past. Decided here, not by the masks of the calls.
        latent_dropout: rate on p(l|t); None: each layer's rate on its attention weights.
        scale: positive factor on the latent logits.

    Returns:
        The names of the replaced modules, in the order of model.named_modules().

    Raises:
        ValueError: no layer to replace, or one that cannot be: batch_first=False, kdim or vdim
            other than embed_dim, add_bias_kv, add_zero_attn. `model` is unchanged then.
    """
    op = "[replace_attention]"
    places: list[tuple[str, nn.Module, str, nn.MultiheadAttention]] = []
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            cross = attribute == "multihead_attn" and isinstance(parent, nn.TransformerDecoderLayer)
            if isinstance(child, nn.MultiheadAttention) and not cross:
                name = f"{prefix}.{attribute}" if prefix else attribute
                _check_replaceable(op, name, child)
                places.append((name, parent, attribute, child))
    if not places:
        raise ValueError(
            f"{op} model has no nn.MultiheadAttention inside, expected at least one self-attention"
        )
    replacements: dict[int, MultiheadLatentAttention] = {}
    for _, parent, attribute, old in places:
        if id(old) not in replacements:
            rate = old.dropout if latent_dropout is None else latent_dropout
            replacements[id(old)] = _convert(old, num_latents, causal, rate, scale)
        setattr(parent, attribute, replacements[id(old)])
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(layer, MultiheadLatentAttention) for layer in module.modules()
        ):
            # Decided when the encoder was built; nested tensors are for the fused softmax path.
            module.enable_nested_tensor = module.use_nested_tensor = False
    return [name for name, *_ in places]


def _check_replaceable(op: str, name: str, layer: nn.MultiheadAttention) -> None:
    if not layer.batch_first:
        raise ValueError(f"{op} {name} has batch_first=False, expected batch_first=True")
    if not layer._qkv_same_embed_dim:
        raise ValueError(
            f"{op} {name} has kdim={layer.kdim}, vdim={layer.vdim}, "
            f"expected embed_dim={layer.embed_dim}"
        )
    if layer.bias_k is not None or layer.add_zero_attn:
        raise ValueError(f"{op} {name} has add_bias_kv or add_zero_attn, expected neither")


def _convert(
    old: nn.MultiheadAttention, num_latents: int, causal: bool, latent_dropout: float, scale: float
) -> MultiheadLatentAttention:
    weight = old.out_proj.weight
    new = MultiheadLatentAttention(
        old.embed_dim,
        old.num_heads,
        num_latents,
        causal=causal,
        latent_dropout=latent_dropout,
        scale=scale,
        bias=old.in_proj_bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    attention = new.attention
    values = slice(2 * old.embed_dim, 3 * old.embed_dim)
    copies = [
        (attention.v_proj.weight, old.in_proj_weight, values),
        (attention.out_proj.weight, weight, slice(None)),
    ]
    if old.in_proj_bias is not None:
        copies += [
            (attention.v_proj.bias, old.in_proj_bias, values),
            (attention.out_proj.bias, old.out_proj.bias, slice(None)),
        ]
    with torch.no_grad():
        for target, source, rows in copies:
            target.copy_(source[rows])
            target.requires_grad_(source.requires_grad)
    return new.train(old.training)
