# SPDX-License-Identifier: Apache-2.0
"""LatentState as a pytree node: through tree_map, torch.compile, torch.export and torch.func."""

import io

import pytest
import torch
from latte_ext import LatentState, reference
from torch import Tensor
from torch.utils import _pytree as pytree


def make_state() -> LatentState:
    return LatentState.from_lse(torch.randn(3, 2, 5), torch.randn(3, 2, 5, 4))


class Continue(torch.nn.Module):
    """Takes and returns a state, using what a model's decoding loop uses."""

    def forward(
        self, x: dict[str, Tensor], state: LatentState, beam: Tensor
    ) -> tuple[Tensor, LatentState]:
        y, final = reference.latent_attention(**x, state=state.select(beam).tensors())
        return y + LatentState(*final).lse.sum(), LatentState(*final).merge(state.detach()).clone()


def make_inputs() -> tuple[dict[str, Tensor], LatentState, Tensor]:
    x = {
        "q": torch.randn(3, 4, 2, 5),
        "k": torch.randn(3, 2, 2, 5),
        "v": torch.randn(3, 2, 2, 4),
    }
    return x, make_state(), torch.tensor([2, 0, 0])


def assert_same_outputs(got: tuple[Tensor, LatentState], want: tuple[Tensor, LatentState]) -> None:
    assert isinstance(got[1], LatentState)
    for a, b in zip((got[0], *got[1]), (want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b)


def test_flatten_and_unflatten() -> None:
    state = make_state()
    leaves, spec = pytree.tree_flatten({"cache": [state, 1]})
    assert len(leaves) == 4
    again = pytree.tree_unflatten(leaves, spec)["cache"][0]
    assert isinstance(again, LatentState)
    assert all(x is y for x, y in zip(again, state, strict=True))
    doubled = pytree.tree_map(lambda x: 2 * x, state)
    assert torch.equal(doubled.mean, 2 * state.mean)
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(state)[0]]
    assert keys == [".max", ".norm", ".mean"]


def test_leaves_need_not_be_tensors() -> None:
    placeholders = pytree.tree_map(lambda _: None, make_state())
    assert placeholders.tensors() == (None, None, None)


def test_spec_is_serialisable() -> None:
    _, spec = pytree.tree_flatten(make_state())
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(backend: str) -> None:
    model, inputs = Continue(), make_inputs()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same_outputs(compiled(*inputs), model(*inputs))


def test_export_save_load() -> None:
    model, inputs = Continue(), make_inputs()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, inputs), file)
    file.seek(0)
    assert_same_outputs(torch.export.load(file).module()(*inputs), model(*inputs))


def test_load_weights_only() -> None:
    state, file = make_state(), io.BytesIO()
    torch.save({"cache": state}, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)["cache"]
    assert all(map(torch.equal, again, state))


def test_func_grad_is_a_state() -> None:
    x, state, beam = make_inputs()
    gradient = torch.func.grad(lambda state: Continue()(x, state, beam)[0].sum())(state)
    assert isinstance(gradient, LatentState)
    assert (gradient.max == 0).all()
    assert (gradient.mean[0] != 0).any()
    assert (gradient.mean[1] == 0).all()
