# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: requests come and go at every step, and one batch serves them all.

The caches of sequences at different positions are one batch, since a state has the same size at
any position: a request that comes is read into a cache of its own, which joins the batch
(`concat`), and one that is done leaves it (`select`).

python examples/continuous_batching.py
"""

from dataclasses import dataclass, field

import torch
from latte_ext.nn import LatteConfig, LatteLM, LayerCache
from torch import Tensor


@dataclass
class Request:
    """A prompt and what has been generated for it, greedily, up to `max_new_tokens`."""

    prompt: Tensor
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
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

    def submit(self, prompt: Tensor, max_new_tokens: int) -> Request:
        """A request for the continuation of prompt (T,), T >= 1."""
        request = Request(prompt, max_new_tokens)
        self.waiting.append(request)
        return request

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every running request, and the first one of those that are new."""
        if self.running:
            last = torch.tensor([request.tokens[-1] for request in self.running])
            self._append(self.running, self.model.step(last, self.cache))
        self._admit()
        self._retire()

    def _admit(self) -> None:
        room = self.max_batch - len(self.running)
        new, self.waiting = self.waiting[:room], self.waiting[room:]
        if not new:
            return
        # Packed, so that prompts of any lengths are read in one pass without padding.
        lengths = torch.tensor([0, *(request.prompt.shape[0] for request in new)])
        packed = torch.cat([request.prompt for request in new])[None]
        logits, cache = self.model.prefill(packed, cu_seqlens=lengths.cumsum(0))
        self._append(new, logits)
        pairs = zip(self.cache, cache, strict=True)
        self.cache = [LayerCache.concat(pair) for pair in pairs]
        self.running += new

    def _retire(self) -> None:
        keep = [not request.done for request in self.running]
        if not all(keep):
            self.cache = [layer.select(keep) for layer in self.cache]
            self.running = [request for request in self.running if not request.done]

    @staticmethod
    def _append(requests: list[Request], logits: Tensor) -> None:
        for request, token in zip(requests, logits.argmax(1).tolist(), strict=True):
            request.tokens.append(token)


def main() -> None:
    torch.manual_seed(0)
    config = LatteConfig.named(
        "latte-conv-swa++", vocab_size=64, embed_dim=64, num_layers=2, num_heads=4, num_latents=16
    )
    model = LatteLM(config).eval()
    scheduler = Scheduler(model, max_batch=4)
    requests, steps = [], 0
    while scheduler.busy or len(requests) < 10:
        if len(requests) < 10:
            prompt = torch.randint(64, (int(torch.randint(1, 30, ())),))
            requests.append(scheduler.submit(prompt, int(torch.randint(1, 12, ()))))
        scheduler.step()
        steps += 1
    print(f"{sum(len(r.tokens) for r in requests)} tokens of 10 requests in {steps} steps")


if __name__ == "__main__":
    main()
