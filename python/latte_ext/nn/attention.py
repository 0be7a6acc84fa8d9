# SPDX-License-Identifier: Apache-2.0
"""Latent attention layers (Latte, arXiv 2402.17512), alone and in place of nn.MultiheadAttention.

Notation: B batch, T tokens, E model width, H query heads, Hk key/value heads, L latents per head,
D value channels per head, N sequences (B, or len(cu_seqlens) - 1 when packed).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import latent_attention, latent_attention_step
from ..state import LatentState

# Standard deviation of a unit normal distribution cut off at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978


def lecun_normal_(weight: Tensor) -> Tensor:
    """Fill weight (out, in) in place with the authors' initialisation, and return it.

    A normal distribution of variance 1 / in, cut off at two standard deviations (Flax's default).
    """
    std = math.sqrt(1 / weight.shape[1]) / _TRUNCATED_STD
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class LatentAttention(nn.Module):
    """Multi-head latent attention of a sequence over itself (arXiv 2402.17512).

    q = x Wq and k = x Wk are logits over L latents per head, v = x Wv are values; a latent is a
    column of Wq and a column of Wk, there is no further embedding of it. Then y = out(attention).

    Args:
        embed_dim: E.
        num_heads: H.
        num_latents: L, the number of latents of each head.
        head_dim: D; None: E / H, which must be a whole number.
        kv_heads: Hk, a divisor of H; None: H.
        causal: whether token t sees the tokens s <= t only.
        dropout: rate on the layer's output, in training.
        latent_dropout: rate on p(l|t), in training; what is left is not renormalised but divided
            by 1 - rate, as the authors do.
        scale: positive factor on the logits q and k.
        bias: add a bias to q, v and the output. k never has one: p(s|l) does not depend on it.

    Raises:
        ValueError: sizes that are not positive or do not divide, rates outside [0, 1), a scale
            that is not positive.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_latents: int,
        *,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        latent_dropout: float = 0.0,
        scale: float = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        op = "[LatentAttention]"
        sizes = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_latents": num_latents,
            "kv_heads": kv_heads,
            "head_dim": 1 if head_dim is None else head_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{op} {name} is {size}, expected a positive number")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"{op} embed_dim is {embed_dim}, expected a multiple of num_heads = {num_heads}, "
                "or head_dim given"
            )
        if num_heads % kv_heads:
            raise ValueError(
                f"{op} kv_heads is {kv_heads}, expected a divisor of num_heads = {num_heads}"
            )
        for name, rate in (("dropout", dropout), ("latent_dropout", latent_dropout)):
            if not 0 <= rate < 1:
                raise ValueError(f"{op} {name} is {rate}, expected a rate in [0, 1)")
        if not 0 < scale < math.inf:
            raise ValueError(f"{op} scale is {scale}, expected a positive number")

        self.embed_dim, self.num_heads, self.num_latents = embed_dim, num_heads, num_latents
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.kv_heads, self.causal, self.scale = kv_heads, causal, scale
        self.dropout, self.latent_dropout = dropout, latent_dropout

        def linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim, num_heads * num_latents, bias)
        self.k_proj = linear(embed_dim, kv_heads * num_latents, False)
        self.v_proj = linear(embed_dim, kv_heads * self.head_dim, bias)
        self.out_proj = linear(num_heads * self.head_dim, embed_dim, bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors do: lecun_normal weights, zero biases."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            lecun_normal_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"num_latents={self.num_latents}, head_dim={self.head_dim}, "
            f"kv_heads={self.kv_heads}, causal={self.causal}"
        )

    def empty_state(self, batch: int) -> LatentState:
        """The state of `batch` sequences without tokens, on the parameters' device."""
        weight = self.v_proj.weight
        return LatentState.empty(
            batch,
            self.kv_heads,
            self.num_latents,
            self.head_dim,
            device=weight.device,
            dtype=torch.promote_types(weight.dtype, torch.float32),
        )

    def forward(
        self,
        x: Tensor,
        *,
        x_qk: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: LatentState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LatentState]:
        """The layer's output (B,T,E) for x (B,T,E), and the state after it if `return_state`.

        Args:
            x: the sequence, or N of them packed along T with B == 1.
            x_qk: what q and k are projected from (B,T,E), such as a convolution of x; None: x.
            key_mask: (B,T) bool, true for a real token; the others are seen by no token.
            cu_seqlens: (N+1,) borders of the packed sequences.
            state: the tokens before these, N sequences (causal only).
            return_state: also return the `LatentState` of N sequences after the last token.

        Raises:
            ValueError: shapes or combinations; see `latte_ext.latent_attention` for the rest.
        """
        x_qk = x if x_qk is None else x_qk
        self._check("x", x, 3)
        self._check("x_qk", x_qk, 3)
        # (B,T,H,L) to (B,H,T,L) as views: the operator takes any strides.
        q = self.q_proj(x_qk).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k = self.k_proj(x_qk).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        kept = None
        if self.training and self.latent_dropout > 0:
            q, kept = self._drop_latents(q)
        y, final = latent_attention(
            q,
            k,
            v,
            causal=self.causal,
            scale=self.scale,
            key_mask=key_mask,
            cu_seqlens=cu_seqlens,
            state=state,
            return_state=True,
        )
        if kept is not None:
            y = y * kept.to(y.dtype)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        y = F.dropout(y, self.dropout, self.training)
        return (y, final) if return_state else y

    @torch.no_grad()
    def step(self, x: Tensor, state: LatentState, *, x_qk: Tensor | None = None) -> Tensor:
        """The output (N,E) for one more token x (N,E) per sequence; `state` is updated in place.

        Equals `forward` on a sequence of one token in evaluation mode: there is no dropout, and
        nothing is recorded for gradients.

        Raises:
            ValueError: shapes, or causal is false.
        """
        if not self.causal:
            raise ValueError("[LatentAttention] step got causal=False, expected causal=True")
        x_qk = x if x_qk is None else x_qk
        self._check("x", x, 2)
        self._check("x_qk", x_qk, 2)
        q = self.q_proj(x_qk).unflatten(1, (self.num_heads, -1))
        k = self.k_proj(x_qk).unflatten(1, (self.kv_heads, -1))
        v = self.v_proj(x).unflatten(1, (self.kv_heads, -1))
        y = latent_attention_step(q, k, v, state, scale=self.scale)
        projected: Tensor = self.out_proj(y.flatten(1))
        return projected

    def _check(self, name: str, x: Tensor, rank: int) -> None:
        if x.dim() != rank or x.shape[-1] != self.embed_dim:
            axes = "(B, T, E)" if rank == 3 else "(N, E)"
            raise ValueError(
                f"[LatentAttention] {name} has shape {tuple(x.shape)}, "
                f"expected {axes} with E = {self.embed_dim}"
            )

    def _drop_latents(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q with dropped latents at -inf, and the factor (B,H,T,1) that undoes the softmax.

        With keep in {0, 1} per token and latent, softmax over the kept ones is
        keep p / sum(keep p), so the attention's output times sum(keep p) / (1 - rate) is exactly
        sum over l of (keep_l p(l|t) / (1 - rate)) mean_l, also for the gradients.
        """
        keep = torch.empty(q.shape, dtype=torch.bool, device=q.device)
        keep.bernoulli_(1 - self.latent_dropout)
        p = torch.softmax(q.to(torch.promote_types(q.dtype, torch.float32)) * self.scale, dim=-1)
        kept = torch.where(keep, p, 0).sum(dim=-1, keepdim=True) / (1 - self.latent_dropout)
        return q.masked_fill(~keep, -torch.inf), kept


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
            query, key: the same tensor, from which q and k are projected.
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
        for attribute, child in parent.named_children():
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
