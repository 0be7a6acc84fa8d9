# SPDX-License-Identifier: Apache-2.0
"""backend="reference" where the operators send people, and the step's place in autograd."""

import pytest
import torch
from latte_ext import LatentState, latent_attention, latent_attention_step
from torch import Tensor


def inputs(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(*batch, 1, 2, 5, 3, dtype=torch.float64) for _ in range(3))
    return q, k, v


def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return latent_attention(q, k, v, backend="reference").sin().sum()


def eager_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(latent_attention(q, k, v).sin().sum(), q)
    return gradient


def test_func_grad_equals_the_operator() -> None:
    q, k, v = inputs()
    torch.testing.assert_close(torch.func.grad(loss)(q, k, v), eager_gradient(q, k, v))


def test_vmap_of_grad_equals_a_loop() -> None:
    q, k, v = inputs(3)
    expected = torch.stack([eager_gradient(*one) for one in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(q, k, v), expected)


def test_jvp_equals_the_gradient_along_the_tangent() -> None:
    q, k, v = inputs()
    tangent = torch.randn_like(q)
    _, derivative = torch.func.jvp(lambda x: loss(x, k, v), (q,), (tangent,))
    torch.testing.assert_close(derivative, (eager_gradient(q, k, v) * tangent).sum())


def test_compiles_as_one_graph() -> None:
    q, k, v = inputs()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), loss(q, k, v))


def test_runs_on_meta_tensors_and_still_checks_shapes() -> None:
    q, k, v = (x.to("meta") for x in inputs())
    assert latent_attention(q, k, v, backend="reference").shape == v.shape
    with pytest.raises(ValueError, match=r"\[latent_attention\] k has shape"):
        latent_attention(q, k[..., :2], v, backend="reference")


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_backward_refuses_a_state_that_a_step_has_changed(no_grad: type) -> None:
    q, k, v = (x.float() for x in inputs())
    state = LatentState(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.ones(1, 2, 3, 3))
    y = latent_attention(q.requires_grad_(), k, v, state=state)
    with no_grad():
        latent_attention_step(q.detach()[:, :, 0], k[:, :, 0], v[:, :, 0], state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
