# SPDX-License-Identifier: Apache-2.0
"""What a user of a GPU would call instead: softmax attention, and gated linear attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference

# A peer makes a call of (B,H,T,*) inputs, with gradients if asked for.
Peer = Callable[[Tensor, Tensor, Tensor, bool], Callable[[], object]]
# Largest error over the largest value, of bfloat16 results.
ALLOWED = 3e-2
CHECKED_TOKENS = 256


def _call(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradients: bool
) -> Callable[[], object]:
    if not gradients:
        return lambda: function(*inputs)

    def both() -> object:
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return both


def flash(q: Tensor, k: Tensor, v: Tensor, gradients: bool) -> Callable[[], object]:
    """torch's softmax attention by FlashAttention: quadratic, and another function of q and k."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return _call(function, (q, k, v), gradients)


def gated_inputs(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latent attention as gated linear attention: q, k and the log decay of every latent.

    With z the running logarithm of sum exp k: softmax(q), exp(k - z) and z[t-1] - z[t], the first
    of which is 0. All are (B,T,H,L), the order of that library.
    """
    z = k.float().logcumsumexp(1)
    decay = torch.cat([z[:, :1], z[:, :-1]], 1) - z
    return q.float().softmax(-1).to(q.dtype), (k.float() - z).exp().to(k.dtype), decay


def gated(q: Tensor, k: Tensor, v: Tensor, gradients: bool) -> Callable[[], object]:
    """chunk_gla of flash-linear-attention on transformed inputs, which is the same function."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from fla.ops.gla import chunk_gla  # type: ignore[import-not-found]

        p, w, decay = gated_inputs(q, k)
        y: Tensor = chunk_gla(p, w, v, g=decay, scale=1.0)[0]
        return y

    inputs = tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))
    checked: list[bool] = []
    call = _call(function, inputs, gradients)

    def check_first() -> object:
        if not checked:
            _check(function, inputs)
            checked.append(True)
        return call()

    return check_first


def _check(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Raises ValueError for a peer that computes something else: its time would mean nothing."""
    part = [x[:1, :CHECKED_TOKENS, :1].contiguous() for x in inputs]
    expected, _ = reference.latent_attention(*(x.transpose(1, 2).double() for x in part))
    got = function(*part).transpose(1, 2).double()
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error <= ALLOWED:
        raise ValueError(f"is off by {error:.1e} of the largest value, expected {ALLOWED:.0e}")


PEERS: dict[str, Peer] = {"flash": flash, "chunk_gla": gated}
