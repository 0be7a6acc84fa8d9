# SPDX-License-Identifier: Apache-2.0
"""Calls that must fail: exception type, and a message with op, argument, got and expected."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from latte_ext import LatentState, latent_attention, latent_attention_step
from torch import Tensor

HERE = "(cpu|cuda)"
B, H, HK, T, L, D = 2, 4, 2, 5, 3, 6


def arguments() -> dict[str, Any]:
    return {
        "q": torch.randn(B, H, T, L),
        "k": torch.randn(B, HK, T, L),
        "v": torch.randn(B, HK, T, D),
    }


def packed(borders: list[int], dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    rows = {name: x[:1] for name, x in arguments().items()}
    return rows | {"cu_seqlens": torch.tensor(borders, dtype=dtype)}


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def empty_state(*shape: int, dtype: torch.dtype = torch.float32) -> LatentState:
    return LatentState.empty(*(shape or (B, HK, L, D)), dtype=dtype)


def replaced_state(max: Tensor | None) -> LatentState:
    state = empty_state()
    state.max = max  # type: ignore[assignment]
    return state


@dataclasses.dataclass(frozen=True)
class Bad:
    """A change of the good arguments and what has to be said about it."""

    change: Callable[[], dict[str, Any]]
    error: type[Exception]
    argument: str
    got: str
    expected: str

    def check(self, op: str, call: Callable[[], object]) -> None:
        with pytest.raises(self.error) as caught:
            call()
        text = str(caught.value)
        assert text.startswith(f"[{op}] "), text
        for part in (self.argument, self.got, "expected", self.expected):
            assert re.search(part, text), f"{part!r} is not in {text!r}"
        # "got" comes before "expected", and one line says it all.
        assert "\n" not in text


FORWARD: dict[str, Bad] = {
    # Shapes
    "q_rank_3": Bad(lambda: {"q": zeros(H, T, L)}, ValueError, "q has", r"\(4, 5, 3\)", "4 dim"),
    "q_rank_5": Bad(
        lambda: {"q": zeros(1, B, H, T, L)}, ValueError, "q has", r"\(1, 2, 4, 5, ", "4 dim"
    ),
    "k_rank_3": Bad(lambda: {"k": zeros(HK, T, L)}, ValueError, "k has", r"\(2, 5, 3\)", "4 dim"),
    "v_rank_2": Bad(lambda: {"v": zeros(T, D)}, ValueError, "v has", r"\(5, 6\)", "4 dimensions"),
    "v_rank_0": Bad(lambda: {"v": torch.tensor(1.0)}, ValueError, "v has", r"\(\)", "4 dimensions"),
    "k_batch": Bad(
        lambda: {"k": zeros(3, HK, T, L)}, ValueError, "k has", r"\(3, 2, 5, 3\)", r"\(2, 2, 5, 3\)"
    ),
    "k_tokens": Bad(
        lambda: {"k": zeros(B, HK, 8, L)}, ValueError, "k has", r"\(2, 2, 8, 3\)", r"\(2, 2, 5, 3\)"
    ),
    "k_latents": Bad(
        lambda: {"k": zeros(B, HK, T, 4)}, ValueError, "k has", r"\(2, 2, 5, 4\)", r"\(2, 2, 5, 3\)"
    ),
    "v_batch": Bad(
        lambda: {"v": zeros(1, HK, T, D)}, ValueError, "v has", r"\(1, 2, 5, 6\)", r"\(2, 2, 5, 6\)"
    ),
    "v_heads": Bad(
        lambda: {"v": zeros(B, H, T, D)}, ValueError, "v has", r"\(2, 4, 5, 6\)", r"\(2, 2, 5, 6\)"
    ),
    "v_tokens": Bad(
        lambda: {"v": zeros(B, HK, 4, D)}, ValueError, "v has", r"\(2, 2, 4, 6\)", r"\(2, 2, 5, 6\)"
    ),
    "heads_not_a_multiple": Bad(
        lambda: {"k": zeros(B, 3, T, L), "v": zeros(B, 3, T, D)},
        ValueError,
        "q has",
        "4 heads",
        "multiple of the 3",
    ),
    "more_heads_in_k": Bad(
        lambda: {"k": zeros(B, 8, T, L), "v": zeros(B, 8, T, D)},
        ValueError,
        "q has",
        "4 heads",
        "multiple of the 8",
    ),
    "no_query_heads": Bad(
        lambda: {"q": zeros(B, 0, T, L)}, ValueError, "q, k, v", "0 heads", "at least 1"
    ),
    "no_key_heads": Bad(
        lambda: {"k": zeros(B, 0, T, L), "v": zeros(B, 0, T, D)},
        ValueError,
        "k",
        "0 key/value heads",
        "at least 1",
    ),
    "no_latents": Bad(
        lambda: {"q": zeros(B, H, T, 0), "k": zeros(B, HK, T, 0)},
        ValueError,
        "q, k",
        "0 latents",
        "at least 1",
    ),
    "no_channels": Bad(
        lambda: {"v": zeros(B, HK, T, 0)}, ValueError, "v have", "0 channels", "at least 1"
    ),
    # Types
    "q_array": Bad(
        lambda: {"q": zeros(B, H, T, L).cpu().numpy()}, TypeError, "q is", "ndarray", "Tensor"
    ),
    "q_none": Bad(lambda: {"q": None}, TypeError, "q is", "NoneType", "Tensor"),
    "k_list": Bad(lambda: {"k": [1.0]}, TypeError, "k is", "list", "Tensor"),
    "v_float": Bad(lambda: {"v": 1.0}, TypeError, "v is", "float", "Tensor"),
    "q_integers": Bad(
        lambda: {"q": zeros(B, H, T, L).long()}, TypeError, "q has dtype", "int64", "float32"
    ),
    "k_bool": Bad(
        lambda: {"k": zeros(B, HK, T, L).bool()}, TypeError, "k has dtype", "bool", "float32"
    ),
    "v_complex": Bad(
        lambda: {"v": zeros(B, HK, T, D).cfloat()}, TypeError, "v has dtype", "complex64", "float32"
    ),
    "q_float8": Bad(
        lambda: {"q": zeros(B, H, T, L).to(torch.float8_e4m3fn)},
        TypeError,
        "q has dtype",
        "float8_e4m3fn",
        "float32",
    ),
    "one_float64": Bad(
        lambda: {"v": zeros(B, HK, T, D).double()},
        TypeError,
        "q, k, v have dtypes",
        "float32, float32, float64",
        "all three or",
    ),
    "float64_and_bfloat16": Bad(
        lambda: {"q": zeros(B, H, T, L).double(), "k": zeros(B, HK, T, L).bfloat16()},
        TypeError,
        "q, k, v have dtypes",
        "float64, bfloat16, float32",
        "all three or",
    ),
    "k_sparse": Bad(
        lambda: {"k": zeros(B, HK, T, L).to_sparse()}, TypeError, "k has", "sparse", "strided"
    ),
    "q_nested": Bad(
        lambda: {"q": torch.nested.nested_tensor([zeros(H, T, L)] * B, layout=torch.jagged)},
        TypeError,
        "q is",
        "nested",
        "plain",
    ),
    # Mask
    "mask_list": Bad(lambda: {"key_mask": [[True]]}, TypeError, "key_mask is", "list", "Tensor"),
    "mask_float": Bad(
        lambda: {"key_mask": torch.ones(B, T)}, TypeError, "key_mask has", "float32", "bool"
    ),
    "mask_int64": Bad(
        lambda: {"key_mask": torch.ones(B, T).long()}, TypeError, "key_mask has", "int64", "bool"
    ),
    "mask_uint8": Bad(
        lambda: {"key_mask": torch.ones(B, T).byte()}, TypeError, "key_mask has", "uint8", "bool"
    ),
    "mask_sparse": Bad(
        lambda: {"key_mask": torch.ones(B, T).bool().to_sparse()},
        TypeError,
        "key_mask has",
        "sparse",
        "strided",
    ),
    "mask_transposed": Bad(
        lambda: {"key_mask": torch.ones(T, B).bool()},
        ValueError,
        "key_mask has",
        r"\(5, 2\)",
        r"\(2, 5\)",
    ),
    "mask_per_head": Bad(
        lambda: {"key_mask": torch.ones(B, 1, 1, T).bool()},
        ValueError,
        "key_mask has",
        r"\(2, 1, 1, 5\)",
        r"\(2, 5\)",
    ),
    "mask_rank_9": Bad(
        lambda: {"key_mask": torch.ones(9 * (1,)).bool()},
        ValueError,
        "key_mask has",
        r"\(1, 1, 1, 1, \.\.\.\)",
        r"\(2, 5\)",
    ),
    "mask_broadcast": Bad(
        lambda: {"key_mask": torch.ones(1, T).bool()},
        ValueError,
        "key_mask has",
        r"\(1, 5\)",
        r"\(2, 5\)",
    ),
    # Packed sequences
    "borders_list": Bad(
        lambda: packed([0, 5]) | {"cu_seqlens": [0, 5]},
        TypeError,
        "cu_seqlens is",
        "list",
        "Tensor",
    ),
    "borders_float": Bad(
        lambda: packed([0, 5], torch.float32), TypeError, "cu_seqlens has", "float32", "int32"
    ),
    "borders_int16": Bad(
        lambda: packed([0, 5], torch.int16), TypeError, "cu_seqlens has", "int16", "int32"
    ),
    "borders_of_a_batch": Bad(
        lambda: {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        "q has batch",
        "2",
        "1 with cu_seq",
    ),
    "borders_none": Bad(lambda: packed([]), ValueError, "cu_seqlens has", r"\(0,\)|0 elem", "seq"),
    "borders_2d": Bad(
        lambda: packed([0, 5]) | {"cu_seqlens": torch.tensor([[0, 5]])},
        ValueError,
        "cu_seqlens has",
        r"\(1, 2\)",
        "sequences",
    ),
    "borders_start": Bad(lambda: packed([1, 5]), ValueError, r"cu_seqlens\[0\] is", "1", "0"),
    "borders_negative": Bad(lambda: packed([0, -1, 5]), ValueError, r"cu_seqlens\[1\]", "-1", "0"),
    "borders_fall": Bad(lambda: packed([0, 4, 3, 5]), ValueError, r"cu_seqlens\[2\] is", "3", "4"),
    "borders_short": Bad(
        lambda: packed([0, 4], torch.int32), ValueError, "cu_seqlens ends", "4", "5, the number"
    ),
    "borders_long": Bad(
        lambda: packed([0, 6]), ValueError, "cu_seqlens ends", "6", "5, the number"
    ),
    "borders_overflow": Bad(
        lambda: packed([0, 2**62, 5]), ValueError, r"cu_seqlens\[2\]", "5", str(2**62)
    ),
    # State
    "state_tuple": Bad(
        lambda: {"state": empty_state().tensors()}, TypeError, "state is", "tuple", "LatentState"
    ),
    "state_not_causal": Bad(
        lambda: {"state": empty_state(), "causal": False},
        ValueError,
        "state",
        "causal=False",
        "causal=True",
    ),
    "state_batch": Bad(
        lambda: {"state": empty_state(1, HK, L, D)},
        ValueError,
        "state.max",
        r"\(1, 2, 3",
        r"\(2, 2, 3",
    ),
    "state_heads": Bad(
        lambda: {"state": empty_state(B, H, L, D)},
        ValueError,
        "state.max",
        r"\(2, 4, 3",
        r"\(2, 2, 3",
    ),
    "state_latents": Bad(
        lambda: {"state": empty_state(B, HK, 7, D)},
        ValueError,
        "state.max",
        r"\(2, 2, 7",
        r"\(2, 2, 3",
    ),
    "state_channels": Bad(
        lambda: {"state": empty_state(B, HK, L, 7)},
        ValueError,
        "state.mean",
        r"\(2, 2, 3, 7\)",
        r"\(2, 2, 3, 6\)",
    ),
    "state_dtype": Bad(
        lambda: {"state": empty_state(dtype=torch.float64)},
        TypeError,
        "state.max has dtype",
        "float64",
        "float32",
    ),
    "state_of_float32_for_float64": Bad(
        lambda: {n: x.double() for n, x in arguments().items()} | {"state": empty_state()},
        TypeError,
        "state.max has dtype",
        "float32",
        "float64",
    ),
    "state_sequences": Bad(
        lambda: packed([0, 2, 5]) | {"state": empty_state(1, HK, L, D)},
        ValueError,
        "state.max",
        r"\(1, 2, 3\)",
        r"\(2, 2, 3\)",
    ),
    "state_replaced": Bad(
        lambda: {"state": replaced_state(empty_state().max.to("meta"))},
        RuntimeError,
        "state.max is on",
        "meta",
        HERE,
    ),
    "state_part_none": Bad(
        lambda: {"state": replaced_state(None)}, TypeError, "state.max is", "NoneType", "Tensor"
    ),
    # Options
    "scale_nan": Bad(lambda: {"scale": torch.nan}, ValueError, "scale is", "nan", "finite"),
    "scale_infinite": Bad(lambda: {"scale": torch.inf}, ValueError, "scale is", "inf", "finite"),
    "scale_text": Bad(lambda: {"scale": "1"}, TypeError, "scale is", "str", "number|float"),
    "scale_none": Bad(lambda: {"scale": None}, TypeError, "scale is", "NoneType", "number|float"),
    "causal_none": Bad(lambda: {"causal": None}, TypeError, "causal is", "NoneType", "bool"),
    "causal_text": Bad(lambda: {"causal": "yes"}, TypeError, "causal is", "str", "bool"),
    "backend_unknown": Bad(lambda: {"backend": "tpu"}, ValueError, "backend is", "'tpu'", "'cpu'"),
    "backend_other_device": Bad(
        lambda: {"backend": "cpu" if zeros(0).is_cuda else "cuda"},
        ValueError,
        "backend is",
        "'(cpu|cuda)'",
        "on (cpu|cuda)",
    ),
    # Devices
    "k_elsewhere": Bad(
        lambda: {"k": zeros(B, HK, T, L).to("meta")}, RuntimeError, "k is on", "meta", HERE
    ),
    "mask_elsewhere": Bad(
        lambda: {"key_mask": torch.ones(B, T, device="meta").bool()},
        RuntimeError,
        "key_mask is on",
        "meta",
        HERE,
    ),
    "state_elsewhere": Bad(
        lambda: {"state": empty_state().to("meta")}, RuntimeError, "state is on", "meta", HERE
    ),
}


# Values in the memory of a device are not looked at.
VALUES = [case for case in FORWARD if r"cu_seqlens[" in FORWARD[case].argument.replace("\\", "")]
VALUES += [case for case in FORWARD if FORWARD[case].argument == "cu_seqlens ends"]


@pytest.mark.devices
@pytest.mark.parametrize("case", [case for case in FORWARD if case not in VALUES])
def test_latent_attention(case: str) -> None:
    bad = FORWARD[case]
    call = functools.partial(latent_attention, **arguments() | bad.change())
    bad.check("latent_attention", call)


@pytest.mark.parametrize("case", VALUES)
def test_border_values(case: str) -> None:
    bad = FORWARD[case]
    bad.check("latent_attention", functools.partial(latent_attention, **bad.change()))


@pytest.mark.parametrize("case", [case for case in FORWARD if "backend" not in case])
def test_backend_reference(case: str) -> None:
    """Held to the same contract."""
    bad = FORWARD[case]
    options = arguments() | bad.change() | {"backend": "reference"}
    bad.check("latent_attention", functools.partial(latent_attention, **options))


def overlapping_state() -> LatentState:
    """Each latent's mean begins with the last channel of the one before."""
    state = empty_state()
    state.mean = state.mean.as_strided((B, HK, L, D), (HK * L * D, L * D, D - 1, 1))
    return state


STEP: dict[str, Bad] = {
    "q_rank": Bad(
        lambda: {"q": zeros(B, H, 1, L)}, ValueError, "q has", r"\(2, 4, 1, 3\)", "3 dim"
    ),
    "k_batch": Bad(
        lambda: {"k": zeros(1, HK, L)}, ValueError, "k has", r"\(1, 2, 3\)", r"\(2, 2, 3"
    ),
    "k_latents": Bad(
        lambda: {"k": zeros(B, HK, 9)}, ValueError, "k has", r"\(2, 2, 9\)", r"\(2, 2, 3\)"
    ),
    "v_heads": Bad(
        lambda: {"v": zeros(B, 1, D)}, ValueError, "v has", r"\(2, 1, 6\)", r"\(2, 2, 6"
    ),
    "heads": Bad(
        lambda: {"q": zeros(B, 3, L)}, ValueError, "q has", "3 heads", "multiple of the 2"
    ),
    "no_channels": Bad(lambda: {"v": zeros(B, HK, 0)}, ValueError, "v have", "0 channels", "1"),
    "q_dtype": Bad(
        lambda: {"q": zeros(B, H, L).int()}, TypeError, "q has dtype", "int32", "float32"
    ),
    "q_list": Bad(lambda: {"q": [1.0]}, TypeError, "q is", "list", "Tensor"),
    "float64": Bad(
        lambda: {"q": zeros(B, H, L).double()},
        TypeError,
        "q, k, v have dtypes",
        "float64, float32, float32",
        "all three or",
    ),
    "state_none": Bad(lambda: {"state": None}, TypeError, "state is", "NoneType", "LatentState"),
    "state_batch": Bad(
        lambda: {"state": empty_state(1, HK, L, D)}, ValueError, "state.max", r"\(1, 2", r"\(2, 2"
    ),
    "state_channels": Bad(
        lambda: {"state": empty_state(B, HK, L, 1)}, ValueError, "state.mean", r"3, 1\)", r"3, 6\)"
    ),
    "state_dtype": Bad(
        lambda: {"state": empty_state(dtype=torch.float64)},
        TypeError,
        "state.max has dtype",
        "float64",
        "float32",
    ),
    "state_negated": Bad(
        lambda: {"state": LatentState(*map(torch._neg_view, empty_state()))},
        RuntimeError,
        "max",
        "negated lazily",
        "memory",
    ),
    "state_of_one_memory": Bad(
        lambda: {"state": LatentState(*[zeros(B, HK, L)] * 2, zeros(B, HK, L, D))},
        ValueError,
        "state.max has",
        "the memory of state.norm",
        "of its own",
    ),
    "state_expanded": Bad(
        lambda: {"state": LatentState(*(x[:1].expand_as(x) for x in empty_state()))},
        ValueError,
        "state.max has stride",
        "0 in dimension 0",
        "each element once",
    ),
    "state_overlapping": Bad(
        lambda: {"state": overlapping_state()},
        ValueError,
        "state.mean has stride",
        "5 in dimension 2",
        "each element once",
    ),
    "scale": Bad(lambda: {"scale": torch.nan}, ValueError, "scale is", "nan", "finite"),
    "scale_text": Bad(lambda: {"scale": "1"}, TypeError, "scale is", "str", "number|float"),
    "k_elsewhere": Bad(
        lambda: {"k": zeros(B, HK, L).to("meta")}, RuntimeError, "k is on", "meta", HERE
    ),
    "state_elsewhere": Bad(
        lambda: {"state": empty_state().to("meta")}, RuntimeError, "state is on", "meta", HERE
    ),
    "q_requires_grad": Bad(
        lambda: {"q": zeros(B, H, L).requires_grad_()},
        RuntimeError,
        "q",
        "requires grad",
        "none|no_grad",
    ),
}


@pytest.mark.devices
@pytest.mark.parametrize("case", STEP)
def test_latent_attention_step(case: str) -> None:
    """The state survives a refused call."""
    bad = STEP[case]
    good = {name: x[:, :, 0] for name, x in arguments().items()}
    state = empty_state()
    bad.check(
        "latent_attention_step",
        functools.partial(latent_attention_step, **good | {"state": state} | bad.change()),
    )
    assert (state.norm == 0).all()
    assert (state.max == -torch.inf).all()


BACKWARD: dict[str, Bad] = {
    "dy_shape": Bad(
        lambda: {"dy": zeros(B, H, T, 1)},
        ValueError,
        "dy has",
        r"\(2, 4, 5, 1\)",
        r"\(2, 4, 5, 6\)",
    ),
    "dy_dtype": Bad(
        lambda: {"dy": zeros(B, H, T, D).double()}, TypeError, "dy has dtype", "float64", "float32"
    ),
    "d_final_norm": Bad(
        lambda: {"d_final_norm": zeros(B, HK, 1)},
        ValueError,
        "d_final.norm has",
        r"\(2, 2, 1\)",
        r"\(2, 2, 3\)",
    ),
    "d_final_mean": Bad(
        lambda: {"d_final_mean": zeros(B, HK, L, D).double()},
        TypeError,
        "d_final.mean has dtype",
        "float64",
        "float32",
    ),
    "k": Bad(
        lambda: {"k": zeros(B, HK, 9, L)}, ValueError, "k has", r"\(2, 2, 9, 3\)", r"\(2, 2, 5, 3\)"
    ),
}


@pytest.mark.devices
@pytest.mark.parametrize("case", BACKWARD)
def test_latent_attention_backward(case: str) -> None:
    bad = BACKWARD[case]
    good = arguments() | {
        **dict.fromkeys(("key_mask", "cu_seqlens", "max", "norm", "mean")),
        "dy": zeros(B, H, T, D),
        "d_final_norm": zeros(B, HK, L),
        "d_final_mean": zeros(B, HK, L, D),
        "causal": True,
        "scale": 1.0,
    }
    op = torch.ops.latte_ext.latent_attention_backward
    bad.check("latent_attention_backward", functools.partial(op, **good | bad.change()))


@pytest.mark.devices
@pytest.mark.parametrize("missing", ["max", "norm", "mean"])
def test_operator_with_part_of_a_state(missing: str) -> None:
    state = dict(zip(("max", "norm", "mean"), empty_state(), strict=True)) | {missing: None}
    options = {"key_mask": None, "cu_seqlens": None, "causal": True, "scale": 1.0}
    with pytest.raises(ValueError, match=rf"^\[latent_attention\] .*state.*{missing}.*expected"):
        torch.ops.latte_ext.latent_attention(**arguments(), **state, **options)


def test_enough_cases() -> None:
    assert len(FORWARD) + len(STEP) + len(BACKWARD) >= 45
    assert len(VALUES) == 6


@pytest.mark.devices
def test_good_arguments_are_good() -> None:
    """What the cases above change."""
    assert latent_attention(**arguments()).shape == (B, H, T, D)
    assert latent_attention(**packed([0, 0, 5], torch.int32)).shape == (1, H, T, D)
    row = {name: x[:, :, 0] for name, x in arguments().items()}
    assert latent_attention_step(**row, state=empty_state()).shape == (B, H, D)
