# SPDX-License-Identifier: Apache-2.0
"""Training of what a conversion added: next-token loss, and the pretrained model as a teacher.

Notation: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, distributed

from .convert import check_converted
from .evaluation import full_attention
from .layerwise import warm_start_loss


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        steps: of the optimiser.
        tokens: T of each text. batch: texts per step.
        rate: the highest learning rate (AdamW), after `warmup` steps; then a cosine down to
            rate * floor.
        layerwise: of the steps, how many are a warm start: each layer learns the output of full
            attention on the pretrained model's own input. Cheaper than the others.
        teacher: weight of KL(full attention || converted), by token over all of V; the next-token
            loss has the rest. Only as far as the pretrained model was trained for T tokens.
        clip: of the gradient's norm.
        seed: of the texts.
        checkpoint: recompute each layer in the backward pass, for less memory.
    """

    steps: int = 100
    tokens: int = 2048
    batch: int = 1
    rate: float = 5e-3
    warmup: int = 10
    floor: float = 0.1
    layerwise: int = 0
    teacher: float = 0.0
    clip: float = 1.0
    seed: int = 0
    checkpoint: bool = False

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)


class Training:
    """A run that can be saved and gone on with: the same losses to the last bit.

    Args:
        model: a converted one; its `latte_parameters()` are trained.
        texts: (M,) token ids of the texts, one after the other.
        recipe: see `Recipe`.

    In a process group (torchrun) each process takes its part of `recipe.batch` texts per process,
    and gradients are averaged; all start from the weights of process 0.
    """

    def __init__(self, model: Any, texts: Tensor, recipe: Recipe) -> None:
        check_converted("Training", model)
        if texts.shape[0] <= recipe.tokens:
            raise ValueError(
                f"[Training] texts has {texts.shape[0]} tokens, expected more than tokens="
                f"{recipe.tokens}"
            )
        self.model, self.texts, self.recipe = model, texts, recipe
        self.parameters = list(model.latte_parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.99), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.step_index, self.losses = 0, list[float]()
        self.rank, self.processes = 0, 1
        if distributed.is_available() and distributed.is_initialized():
            self.rank, self.processes = distributed.get_rank(), distributed.get_world_size()
            for parameter in self.parameters:
                distributed.broadcast(parameter.data, 0)
        if recipe.checkpoint:
            model.activation_checkpointing_enable()

    @property
    def done(self) -> bool:
        return self.step_index >= self.recipe.steps

    def step(self) -> float:
        """One step; the next-token loss of its texts, in a warm start the layers' error."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate_at(self.step_index)
        self.model.train()
        last = self.texts.shape[0] - recipe.tokens
        # All processes draw the same numbers and take their own.
        starts = torch.randint(last, (self.processes, recipe.batch), generator=self.generator)
        texts = [self.texts[i : i + recipe.tokens + 1] for i in starts[self.rank].tolist()]
        ids = torch.stack(texts).to(self.model.device)
        if self.step_index < recipe.layerwise:
            loss = warm_start_loss(self.model, ids[:, :-1])
            shown = float(loss.detach())
        else:
            loss, shown = losses_of(self.model, ids, recipe.teacher)
        loss.backward()
        for parameter in self.parameters:
            if self.processes > 1 and parameter.grad is not None:
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.processes
        torch.nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_index += 1
        self.losses.append(shown)
        return shown

    def save(self, path: str | PathLike[str]) -> None:
        """Everything that `load` needs to go on."""
        torch.save(
            {
                "recipe": vars(self.recipe),
                "parameters": [p.detach() for p in self.parameters],
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "losses": self.losses,
            },
            path,
        )

    def load(self, path: str | PathLike[str]) -> None:
        """Goes on where a run with the same recipe was saved.

        Raises:
            ValueError: it was another recipe.
        """
        saved = torch.load(path, weights_only=True)
        if saved["recipe"] != vars(self.recipe):
            raise ValueError(
                f"[Training] saved recipe is {saved['recipe']}, expected {vars(self.recipe)}"
            )
        with torch.no_grad():
            for parameter, value in zip(self.parameters, saved["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        self.losses = saved["losses"]
        self.step_index = len(self.losses)


def losses_of(model: Any, ids: Tensor, teacher: float) -> tuple[Tensor, float]:
    """The loss to train with, and the next-token loss, for texts (B,T+1)."""
    inputs, targets = ids[:, :-1], ids[:, 1:].flatten()
    guide = None
    if teacher > 0:
        with torch.no_grad(), full_attention(model):
            guide = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
    logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
    loss, next_token = _Loss.apply(  # type: ignore[no-untyped-call]
        logits, targets, guide, teacher
    )
    return loss, float(next_token)


# 64 rows of V = 49,152 float32 values are 12 MB, which most machines keep in cache.
_ROWS = 64


class _Loss(torch.autograd.Function):
    """(1 - w) next-token loss + w KL(guide || logits), summed over rows; keeps the gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, guide: Tensor | None, weight: float
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits)
        loss = likelihoods = 0.0
        for first in range(0, logits.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            x, column = logits[rows].float(), targets[rows, None]
            log_p = x.log_softmax(-1)
            likelihood = -float(log_p.gather(1, column).sum())
            likelihoods += likelihood
            if guide is None:
                loss += likelihood
                slope = log_p.exp_().scatter_add_(1, column, -torch.ones_like(x[:, :1]))
            else:
                log_g = guide[rows].float().log_softmax(-1)
                g = log_g.exp()
                divergence = float(torch.linalg.vecdot(g, log_g.sub_(log_p)).sum())
                loss += (1 - weight) * likelihood + weight * divergence
                slope = log_p.exp_().sub_(g, alpha=weight)
                slope.scatter_add_(1, column, torch.full_like(x[:, :1], weight - 1))
            gradient[rows] = slope
        ctx.save_for_backward(gradient)
        count = logits.shape[0]
        result = logits.new_tensor([loss / count, likelihoods / count], dtype=torch.float32)
        next_token = result[1].clone()
        ctx.mark_non_differentiable(next_token)
        return result[0].clone(), next_token

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * (d_loss / gradient.shape[0]).to(gradient.dtype), None, None, None
