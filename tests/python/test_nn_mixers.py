# SPDX-License-Identifier: Apache-2.0
"""nn.RGLRU and nn.ShortConv."""

from typing import Any

import pytest
import torch
from latte_ext import rg_lru
from latte_ext.nn import RGLRU, ShortConv
from torch import nn

TOKENS, CHANNELS = 17, 12


def modules(causal: bool = True) -> list[Any]:
    conv = ShortConv(CHANNELS, causal=causal)
    nn.init.normal_(conv.bias)
    return [RGLRU(CHANNELS, 3, causal=causal), conv]


MODULE = pytest.mark.parametrize("which", [0, 1], ids=["rglru", "conv"])


@MODULE
def test_whole_split_and_step_agree(which: int) -> None:
    module, x = modules()[which], torch.randn(2, TOKENS, CHANNELS)
    whole, final = module(x, return_state=True)
    stepped = module.empty_state(2)
    for t in range(TOKENS):
        torch.testing.assert_close(module.step(x[:, t], stepped), whole[:, t])
    for got, want in zip(stepped, final, strict=True):
        torch.testing.assert_close(got, want)
    for cut in (0, 1, 9):
        head, state = module(x[:, :cut], return_state=True)
        tail, last = module(x[:, cut:], state=state, return_state=True)
        torch.testing.assert_close(torch.cat([head, tail], 1), whole)
        for got, want in zip(last, final, strict=True):
            torch.testing.assert_close(got, want)


@MODULE
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_are_each_alone(which: int, causal: bool) -> None:
    module, x = modules(causal)[which], torch.randn(1, TOKENS, CHANNELS)
    packed = module(x, cu_seqlens=torch.tensor([0, 7, 7, TOKENS]))
    alone = torch.cat([module(x[:, :7]), module(x[:, 7:])], 1)
    torch.testing.assert_close(packed, alone)


@MODULE
@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_absent(which: int, causal: bool) -> None:
    """Sequences of several lengths in one batch, padded on the right or on the left."""
    module, x = modules(causal)[which], torch.randn(3, TOKENS, CHANNELS)
    lengths = (TOKENS, 1, 9)
    for right in (True, False):
        mask = torch.zeros(3, TOKENS, dtype=torch.bool)
        for n, length in enumerate(lengths):
            mask[n, slice(length) if right else slice(TOKENS - length, None)] = True
        dirty = x.masked_fill(~mask.unsqueeze(2), torch.nan)
        if which == 0:  # whose gates are linear maps of x
            dirty = x
        y = module(dirty, key_mask=mask)
        for n in range(3):
            torch.testing.assert_close(y[n, mask[n]], module(x[n : n + 1, mask[n]])[0])


@MODULE
def test_states_after_padding(which: int) -> None:
    """A batch padded on the right goes on from where each sequence ended, some before a token."""
    module, x = modules()[which], torch.randn(3, TOKENS, CHANNELS)
    lengths, more = (TOKENS, 1, 0), torch.randn(3, CHANNELS)
    mask = torch.arange(TOKENS) < torch.tensor(lengths).unsqueeze(1)
    _, state = module(x, key_mask=mask, return_state=True)
    y = module.step(more, state)
    for n, length in enumerate(lengths):
        alone = torch.cat([x[n, :length], more[n : n + 1]])[None]
        torch.testing.assert_close(y[n], module(alone)[0, -1])


def test_state_after_packed_and_masked() -> None:
    module, x = RGLRU(CHANNELS), torch.randn(1, 6, CHANNELS)
    borders = torch.tensor([0, 2, 2, 4, 6])
    _, state = module(x, cu_seqlens=borders, return_state=True)
    assert state.fresh.tolist() == [False, True, False, False]
    mask = torch.tensor([[True, False, False, False, False, True]])
    _, state = module(x, cu_seqlens=borders, key_mask=mask, return_state=True)
    assert state.fresh.tolist() == [False, True, True, False]


def test_rglru_without_causality_is_a_sum() -> None:
    module, x = RGLRU(CHANNELS, 3, causal=False), torch.randn(2, TOKENS, CHANNELS)
    expected = torch.zeros_like(x)
    for direction in (0, 1):
        weight = [torch.block_diag(*w) for w in module.gate_weight[direction]]
        gates = [x @ w + b for w, b in zip(weight, module.gate_bias[direction], strict=True)]
        decay = module.log_lambda[direction]
        expected += rg_lru(x, *gates, decay, reverse=direction == 1, backend="reference")
    torch.testing.assert_close(module(x), expected)


def test_rglru_initial_decays() -> None:
    softplus = nn.functional.softplus(RGLRU(4096).log_lambda.double())
    a = torch.exp(-8 * softplus)
    assert 0.9 <= a.min() < 0.901
    assert 0.998 < a.max() <= 0.99901
    assert a.square().mean().item() == pytest.approx((0.81 + 0.998) / 2, abs=0.01)


def test_state_object() -> None:
    module = RGLRU(CHANNELS)
    _, state = module(torch.randn(3, 4, CHANNELS), return_state=True)
    copy = state.clone()
    picked = state.select(torch.tensor([2, 0, 2]))
    module.step(torch.randn(3, CHANNELS), state)
    assert not torch.equal(copy.h, state.h)
    assert torch.equal(picked.h, copy.h[[2, 0, 2]])
    assert copy.nbytes == 3 * CHANNELS * 4 + 3


@MODULE
def test_gradients_reach_all_parameters(which: int) -> None:
    module = modules()[which]
    module(torch.randn(2, TOKENS, CHANNELS)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@MODULE
def test_modules_compile(which: int) -> None:
    module, x = modules()[which], torch.randn(2, TOKENS, CHANNELS)
    function = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(function(x), module(x))
    torch.compiler.reset()


@MODULE
def test_bfloat16(which: int) -> None:
    module = modules()[which].bfloat16()
    x = torch.randn(2, TOKENS, CHANNELS, dtype=torch.bfloat16)
    y, final = module(x, return_state=True)
    assert y.dtype == torch.bfloat16
    state = module.empty_state(2)
    for t in range(TOKENS):
        torch.testing.assert_close(module.step(x[:, t], state), y[:, t], atol=0.05, rtol=0.05)
    assert final[0].dtype == state[0].dtype


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"\[RGLRU\] channels is 5 with num_blocks = 2, expected"):
        RGLRU(5, 2)
    with pytest.raises(ValueError, match=r"\[RGLRU\] min_decay.*expected"):
        RGLRU(4, min_decay=1.0)
    with pytest.raises(ValueError, match=r"\[ShortConv\] channels is 4 and width is 9, expected"):
        ShortConv(4, 9)
    x = torch.randn(1, 3, 5)
    with pytest.raises(ValueError, match=r"\[RGLRU\] x has shape.*C = 4"):
        RGLRU(4)(x)
    with pytest.raises(TypeError, match=r"^\[RGLRU\] state is a Tensor, expected a RecurrentState"):
        RGLRU(5)(x, state=torch.zeros(1, 5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^\[ShortConv\] key_mask has shape \(1, 3\), expected"):
        ShortConv(5)(x.expand(2, -1, -1), key_mask=torch.ones(1, 3).bool())
    for kind in (RGLRU, ShortConv):
        with pytest.raises(TypeError, match=r"channels is a float, expected an int"):
            kind(4.0)  # type: ignore[arg-type]
    for module in modules(causal=False):
        with pytest.raises(ValueError, match="causal=False, expected"):
            module(torch.randn(1, 3, CHANNELS), return_state=True)
        with pytest.raises(ValueError, match="step got causal=False, expected"):
            module.step(torch.randn(1, CHANNELS), module.empty_state(1))
    with pytest.raises(ValueError, match=r"\[ShortConv\] got return_state with key_mask and cu"):
        ShortConv(5)(
            x, key_mask=torch.ones(1, 3).bool(), cu_seqlens=torch.tensor([0, 3]), return_state=True
        )
