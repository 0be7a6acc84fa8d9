# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests come and go at every step, and one batch serves them all.

The caches of sequences at different positions are one batch, since a state has the same size at
any position: a request that comes is read into a cache of its own, which joins the batch
(`concat`), and one that is done leaves it (`select`).

python examples/continuous_batching.py
"""

import argparse
from dataclasses import dataclass, field

import torch
from latte_ext.nn import LatteConfig, LatteLM, LayerCache, sample_token
from torch import Tensor


@dataclass(eq=False)
class Request:
    """A prompt and what has been generated for it, up to `max_new_tokens`.

    cache: of the one sequence that the prompt goes on from, None at its beginning; once the request
    is complete, of all that the model has read, which is everything but the last of `tokens`.
    """

    prompt: Tensor
    max_new_tokens: int
    temperature: float = 0.0
    generator: torch.Generator | None = None
    cache: list[LayerCache] | None = None
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False

    @property
    def complete(self) -> bool:
        return len(self.tokens) >= self.max_new_tokens


class Scheduler:
    """Runs up to `max_batch` requests at once.

    Row n of the cache is that of running[n].
    """

    def __init__(self, model: LatteLM, max_batch: int) -> None:
        self.model, self.max_batch = model, max_batch
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.cache: list[LayerCache] = model.empty_cache(0)

    def submit(self, request: Request) -> Request:
        """Queue a request with a prompt (T,), T >= 1. Set its `cancelled` to be rid of it."""
        self.waiting.append(request)
        return request

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every running request, and the first one of those that are new."""
        self._retire()
        if self.running:
            last = torch.tensor([request.tokens[-1] for request in self.running])
            self._append(self.running, self.model.step(last, self.cache))
        self._admit()
        self._retire()

    def _admit(self) -> None:
        self.waiting = [request for request in self.waiting if not request.cancelled]
        room = self.max_batch - len(self.running)
        new, self.waiting = self.waiting[:room], self.waiting[room:]
        if not new:
            return
        # Packed, so that prompts of any lengths are read in one pass without padding.
        lengths = torch.tensor([0, *(request.prompt.shape[0] for request in new)])
        packed = torch.cat([request.prompt for request in new])[None]
        before = _concat([request.cache or self.model.empty_cache(1) for request in new])
        logits, cache = self.model.prefill(packed, before, cu_seqlens=lengths.cumsum(0))
        self._append(new, logits)
        self.cache = _concat([self.cache, cache])
        self.running += new

    def _retire(self) -> None:
        for row, request in enumerate(self.running):
            if request.complete:
                request.cache = [layer.select([row]) for layer in self.cache]
        keep = [not (request.complete or request.cancelled) for request in self.running]
        if not all(keep):
            self.cache = [layer.select(keep) for layer in self.cache]
            self.running = [r for r, kept in zip(self.running, keep, strict=True) if kept]

    @staticmethod
    def _append(requests: list[Request], logits: Tensor) -> None:
        for request, row in zip(requests, logits, strict=True):
            token = sample_token(
                row[None], temperature=request.temperature, generator=request.generator
            )
            request.tokens.append(int(token))


def _concat(caches: list[list[LayerCache]]) -> list[LayerCache]:
    """Caches of a model, sequence after sequence, as one."""
    return [LayerCache.concat(layers) for layers in zip(*caches, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    config = LatteConfig.named(
        "latte-conv-swa++", vocab_size=64, embed_dim=64, num_layers=2, num_heads=4, num_latents=16
    )
    model = LatteLM(config).eval()
    scheduler = Scheduler(model, max_batch=4)
    requests, steps = [], 0
    while scheduler.busy or len(requests) < 10:
        if len(requests) < 10:
            prompt = torch.randint(64, (int(torch.randint(1, 30, ())),))
            request = Request(prompt, int(torch.randint(1, 12, ())))
            requests.append(scheduler.submit(request))
        scheduler.step()
        steps += 1
    print(f"{sum(len(r.tokens) for r in requests)} tokens of 10 requests in {steps} steps")


if __name__ == "__main__":
    main()
