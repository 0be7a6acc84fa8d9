# SPDX-License-Identifier: Apache-2.0
"""Attention of a converted model, through the interfaces that transformers has for it.

A converted attention layer is its family's own class with one more base: projections, norms,
rotations and scales stay the family's code, which calls `attend` where softmax attention was.

Notation: B batch, T tokens, E model width, H query heads, Hk key/value heads, L latents per head, D
channels per head, N sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..functional import latent_attention
from ..macchiato import macchiato_attention, macchiato_attention_step
from ..state import LatentState
from ..window import sliding_window_attention, sliding_window_attention_step
from ..window_cache import MacchiatoState, WindowCache, WindowSinks
from .cache import Call, LatteLayer, Past
from .families import Derived
from .latents import LatentBranch
from .rotation import Rotation
from .sinks import Sinks, first_of_packed

IMPLEMENTATION = "latte"
_OP = "[latte_ext.hf]"


@dataclass(frozen=True)
class Plan:
    """What a layer attends to: `window` tokens and the first `sinks`, and how it rotates.

    The last two are for measurements: whether the layer's latents take part, and after how many
    tokens they forget all.
    """

    window: int
    sinks: int
    causal: bool
    rotation: Rotation | None
    latents: bool = True
    reset: int | None = None


class ConvertedAttention(Derived, nn.Module):
    """The base that `convert` gives to the class of an attention layer."""

    layer_idx: int
    latte_plan: Plan
    latte: LatentBranch | None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The family's forward pass; attention learns what its interface does not pass on."""
        cache = kwargs.get("cache")
        given = Given(hidden_states, cache, kwargs.get("position_ids"))
        return super().forward(hidden_states, *args, latte_given=given, **kwargs)


class Given(NamedTuple):
    hidden: Tensor
    cache: Any
    position_ids: Tensor | None


class Rows(NamedTuple):
    """The tokens of one call: B rows, or N packed sequences in one.

    Args:
        x: (B,T,E). q: (B,H,T,D). k, v: (B,Hk,T,D), q and k rotated.
        position: (B,T) or (1,T). key_mask: (B,T) bool.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    position: Tensor
    key_mask: Tensor | None
    cu_seqlens: Tensor | None

    def first(self, tokens: int) -> Rows:
        """The first tokens of every row."""
        mask = None if self.key_mask is None else self.key_mask[:, :tokens]
        return Rows(
            self.x[:, :tokens], self.q[:, :, :tokens], self.k[:, :, :tokens],
            self.v[:, :, :tokens], self.position[:, :tokens], mask, None,
        )  # fmt: skip


def attend(
    module: ConvertedAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    latte_given: Given | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What stands in the place of softmax attention: y (B,T,H,D), and no weights.

    Raises:
        ValueError: dropout, or a mask that is not the padding's.
        TypeError: another cache.
    """
    if latte_given is None:
        raise TypeError(
            f"{_OP} {type(module).__name__} was called with attn_implementation="
            f"{IMPLEMENTATION!r}, expected a layer that convert() has converted"
        )
    if dropout:
        raise ValueError(f"{_OP} attention_dropout is {dropout}, expected 0")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"{_OP} attention_mask has shape {tuple(attention_mask.shape)}, expected (B, T): "
            "windows and latents take the mask of a padding only"
        )
    rows, packed = _rows(latte_given, query, key, value, attention_mask, kwargs)
    layer = _layer_of(module, latte_given.cache)
    branch = module.latte if module.latte_plan.latents else None
    kernel = Kernel(module.latte_plan, branch, scaling, softcap)
    y = kernel(rows) if layer is None else _with_cache(kernel, rows, layer)
    y = y.transpose(1, 2)
    return (y.unflatten(1, packed).squeeze(0) if packed else y), None


def _rows(
    given: Given,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Rows, tuple[int, int] | None]:
    """The tokens, and (B,T) if rows of them were packed into one."""
    batch, _, tokens, _ = q.shape
    position = given.position_ids
    if position is None:
        start = 0 if given.cache is None else given.cache.get_seq_length()
        position = torch.arange(start, start + tokens, device=q.device)[None]
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        return Rows(given.hidden, q, k, v, position, key_mask, cu_seqlens), None
    if given.cache is None and key_mask is None and given.position_ids is not None:
        # Positions that do not go on by one are another sequence's.
        starts = position.diff(dim=1) != 1
        if bool(starts.any()):
            starts = torch.nn.functional.pad(starts.expand(batch, -1), (1, 0), value=True)
            ends = torch.full((1,), batch * tokens, device=q.device)
            cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), ends])

            def one_row(x: Tensor) -> Tensor:
                return x.transpose(0, 1).flatten(1, 2)[None]

            position = position.expand(batch, -1).reshape(1, -1)
            rows = Rows(
                given.hidden.flatten(0, 1)[None], one_row(q), one_row(k), one_row(v), position,
                None, cu_seqlens,
            )  # fmt: skip
            return rows, (batch, tokens)
    return Rows(given.hidden, q, k, v, position, key_mask, None), None


def _layer_of(module: ConvertedAttention, cache: Any) -> LatteLayer | None:
    if cache is None:
        return None
    if not module.latte_plan.causal:
        raise ValueError(f"{_OP} got a cache, expected none: the layer attends in both directions")
    layer = cache.layers[module.layer_idx] if len(cache.layers) > module.layer_idx else None
    if not isinstance(layer, LatteLayer):
        raise TypeError(
            f"{_OP} cache is a {type(cache).__name__}, expected LatteCache(model.config)"
        )
    return layer


class Kernel:
    """The operators of one layer, with the weights of its latents, if it has any."""

    def __init__(
        self, plan: Plan, branch: LatentBranch | None, scale: float | None, softcap: float | None
    ) -> None:
        self.plan, self.branch = plan, branch
        self.options: dict[str, Any] = {"scale": scale, "softcap": softcap}

    def __call__(self, rows: Rows) -> Tensor:
        """y (B,H,T,D) of whole sequences."""
        sinks = None
        count = self.plan.sinks
        if count and rows.q.shape[2] > self.plan.window:
            if rows.cu_seqlens is not None:
                sinks = first_of_packed(rows.k, rows.v, rows.cu_seqlens, count)
            else:
                sinks = Sinks.empty(rows.q.shape[0], count, rows.k, rows.v)
                sinks = sinks.extended(rows.k, rows.v, rows.key_mask, 0)
        return self._attend(rows, sinks, None, None)[0]

    def _attend(
        self, rows: Rows, sinks: Sinks | None, past: Past | None, mixer: Any
    ) -> tuple[Tensor, MacchiatoState, Any]:
        """y, the state and the mixer's after it; the latter two of use only with a past."""
        plan = self.plan
        shared: dict[str, Any] = {
            **self.options, "window": plan.window, "causal": plan.causal,
            "key_mask": rows.key_mask, "cu_seqlens": rows.cu_seqlens,
            "sinks": self._window_sinks(rows, sinks),
        }  # fmt: skip
        if self.branch is None:
            if past is None:
                y = sliding_window_attention(rows.q, rows.k, rows.v, **shared)
                return y, MacchiatoState(None, None), None
            y, window = sliding_window_attention(
                rows.q, rows.k, rows.v, cache=past.window, return_cache=True, **shared
            )
            return y, MacchiatoState(None, window), None
        x, mixer = self.branch.mixed(
            rows.x, mixer, key_mask=rows.key_mask, cu_seqlens=rows.cu_seqlens,
            return_state=past is not None,
        )  # fmt: skip
        q_latent, k_latent = self.branch.logits(x, *self._still(rows), rows.position)
        v_latent = self.branch.values(rows.v)
        if plan.reset is not None:
            local = sliding_window_attention(rows.q, rows.k, rows.v, **shared)
            v_latent = rows.v if v_latent is None else v_latent
            y = _with_resets(q_latent, k_latent, v_latent, local, plan.reset)
            return y, MacchiatoState(None, None), None
        arguments = (q_latent, k_latent, rows.q, rows.k, rows.v)
        shared["v_latent"] = v_latent
        if past is None:
            y = macchiato_attention(*arguments, **shared)
            return y, MacchiatoState(None, None), None
        y, state = macchiato_attention(
            *arguments, state=past.attention, return_state=True, **shared
        )
        return y, state, mixer

    def prefill(self, rows: Rows, past: Past) -> tuple[Tensor, Past]:
        """y and the past after the tokens; `past` is left as it is."""
        sinks = past.sinks
        if sinks is not None:
            sinks = sinks.extended(rows.k, rows.v, rows.key_mask, past.tokens)
        y, state, mixer = self._attend(rows, sinks, past, past.mixer)
        return y, Past(past.tokens + rows.q.shape[2], state, sinks, mixer)

    def step(self, rows: Rows, past: Past) -> tuple[Tensor, Past]:
        """The same for one token; `past` is used up."""
        sinks = past.sinks
        if sinks is not None:
            sinks = sinks.extended(rows.k, rows.v, None, past.tokens)
        q, k, v = (x.squeeze(2) for x in (rows.q, rows.k, rows.v))
        seen = self._window_sinks(rows, sinks)
        if seen is not None:
            seen = seen._replace(q=seen.q.squeeze(2))
        mixer = past.mixer
        if self.branch is None:
            y = sliding_window_attention_step(q, k, v, past.window, sinks=seen, **self.options)
        else:
            x, mixer = self.branch.mixed(
                rows.x, mixer, key_mask=None, cu_seqlens=None, return_state=True
            )
            q_latent, k_latent = self.branch.logits(x, *self._still(rows), rows.position)
            v_latent = self.branch.values(rows.v)
            y = macchiato_attention_step(
                q_latent.squeeze(2), k_latent.squeeze(2), q, k, v, past.attention, sinks=seen,
                v_latent=None if v_latent is None else v_latent.squeeze(2), **self.options,
            )  # fmt: skip
        return y.unsqueeze(2), Past(past.tokens + 1, past.attention, sinks, mixer)

    def empty(self, rows: Rows) -> Past:
        """The past of sequences without tokens."""
        batch, kv_heads, _, dim = rows.k.shape
        window = WindowCache.empty(
            batch, kv_heads, self.plan.window, dim, rows.v.shape[3], device=rows.k.device,
            dtype=rows.k.dtype,
        )  # fmt: skip
        sinks = None
        if self.plan.sinks:
            sinks = Sinks.empty(batch, self.plan.sinks, rows.k, rows.v)
        latent = None
        if self.branch is not None:
            latent = LatentState.empty(
                batch, math.lcm(self.branch.latent_heads, kv_heads), self.branch.settings.latents,
                rows.v.shape[3], device=rows.k.device,
                dtype=torch.promote_types(rows.v.dtype, torch.float32),
            )  # fmt: skip
        return Past(0, MacchiatoState(latent, window), sinks, None)

    def _window_sinks(self, rows: Rows, sinks: Sinks | None) -> WindowSinks | None:
        """The sinks with queries that stand as far behind them as when they left the window."""
        if sinks is None:
            return None
        q = rows.q
        if self.plan.rotation is not None:
            last = self.plan.window + sinks.place.shape[1] - 1
            q = self.plan.rotation.turn(q, rows.position.clamp(max=last) - rows.position)
        return WindowSinks(q, sinks.key, sinks.value, sinks.place)

    def _still(self, rows: Rows) -> tuple[Tensor | None, Tensor | None]:
        """Queries and keys without their rotation, if the latents want them."""
        assert self.branch is not None
        if self.branch.settings.features == "hidden":
            return None, None
        if self.plan.rotation is None:
            return rows.q, rows.k
        return tuple(self.plan.rotation.turn(x, -rows.position) for x in (rows.q, rows.k))  # type: ignore[return-value]


def _with_cache(kernel: Kernel, rows: Rows, layer: LatteLayer) -> Tensor:
    before = layer.past
    past = kernel.empty(rows) if before is None else before
    tokens = rows.q.shape[2]
    call = None
    if layer.record_past:
        kept = past.clone()
        call = Call(before and kept, tokens, lambda n: kernel.prefill(rows.first(n), kept)[1])
    if tokens == 1 and rows.key_mask is None and not torch.is_grad_enabled():
        y, after = kernel.step(rows, past)
    else:
        y, after = kernel.prefill(rows, past)
    layer.advance(after, call)
    return y


def _with_resets(
    q_latent: Tensor, k_latent: Tensor, v: Tensor, local: Tensor, every: int
) -> Tensor:
    """`macchiato_attention` of one sequence whose latents forget all every so many tokens."""
    tokens = v.shape[2]
    borders = torch.arange(0, tokens + every, every, device=v.device).clamp(max=tokens)
    heads = max(k_latent.shape[1], v.shape[1])
    k_latent, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_latent, v))
    latents = latent_attention(q_latent[..., 1:], k_latent, v.float(), cu_seqlens=borders)
    gate = q_latent.softmax(-1)[..., :1]
    return (gate * local + (1 - gate) * latents).to(local.dtype)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The padding of the new tokens (B,T), or None; transformers would build a T x T mask.

    Raises:
        ValueError: a mask function of the caller's own, or a mask of another length.
    """
    if use_vmap:
        raise ValueError(f"{_OP} got a mask function, expected the mask of a padding only")
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < q_length:
        raise ValueError(
            f"{_OP} attention_mask has shape {tuple(attention_mask.shape)}, expected a mask of at "
            f"least the {q_length} new tokens"
        )
    mask = attention_mask[:, -q_length:].to(torch.bool)
    return None if bool(mask.all()) else mask


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, padding_mask)
