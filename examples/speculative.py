# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: a small model proposes tokens, a large one checks them all in one pass.

Every sequence keeps as many as are right, so after a pass the sequences stand at different
positions. The tokens are those of greedy decoding, whatever the small model proposes.

python examples/speculative.py
"""

import argparse
from typing import NamedTuple

import torch
from latte_ext.nn import LatteConfig, LatteLM, LayerCache
from torch import Tensor


class Speculated(NamedTuple):
    """tokens (N,T+max_new_tokens), prompts included; passes of the large model after the prompts.

    accepted: proposals that were right, of `proposed`.
    """

    tokens: Tensor
    passes: int
    accepted: int
    proposed: int


@torch.no_grad()
def generate(
    model: LatteLM, small: LatteLM, prompt: Tensor, max_new_tokens: int, *, width: int = 4
) -> Speculated:
    """Greedy continuations of prompts (N,T), `width` tokens drafted at a time."""
    logits, cache = model.prefill(prompt)
    _, small_cache = small.prefill(prompt)
    token = logits.argmax(1)
    texts = [[*row, first] for row, first in zip(prompt.tolist(), token.tolist(), strict=True)]
    length = prompt.shape[1] + max_new_tokens
    passes = accepted_total = proposed_total = 0
    while min(map(len, texts)) < length:
        tokens = torch.cat([token[:, None], _propose(small, small_cache, token, width - 1)], 1)
        logits, draft = model.draft(tokens, cache)
        choice = logits.argmax(2)
        # A proposal is right if the large model, having read all before it, would have taken it.
        right = (tokens[:, 1:] == choice[:, :-1]).int().cumprod(1).sum(1)
        accepted = right + 1
        model.commit(cache, draft, accepted)
        small.commit(small_cache, small.draft(tokens, small_cache)[1], accepted)
        token = choice.gather(1, right[:, None]).squeeze(1)
        for text, row, count in zip(texts, choice.tolist(), accepted.tolist(), strict=True):
            text += row[:count]
        passes += 1
        accepted_total += int(right.sum())
        proposed_total += right.numel() * (width - 1)
    rows = torch.tensor([text[:length] for text in texts])
    return Speculated(rows, passes, accepted_total, proposed_total)


def _propose(small: LatteLM, cache: list[LayerCache], token: Tensor, count: int) -> Tensor:
    """The small model's next tokens (N,count) after `token` (N,); its cache stays as it is."""
    scratch, tokens = [layer.clone() for layer in cache], []
    for _ in range(count):
        token = small.step(token, scratch).argmax(1)
        tokens.append(token)
    return torch.stack(tokens, 1) if tokens else token.new_empty(token.shape[0], 0)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    sizes = {"vocab_size": 64, "num_heads": 4, "num_latents": 16}
    large = LatteLM(LatteConfig.named("latte-conv-swa++", embed_dim=64, num_layers=4, **sizes))
    # The first of the large model's layers, as a small model that agrees with it now and then.
    small = LatteLM(LatteConfig.named("latte-conv-swa++", embed_dim=64, num_layers=1, **sizes))
    small.load_state_dict(large.state_dict(), strict=False)
    prompt = torch.randint(64, (3, 20))
    result = generate(large.eval(), small.eval(), prompt, 60)
    greedy = large.generate(prompt, 60, temperature=0)
    print(f"same tokens as greedy decoding: {torch.equal(result.tokens, greedy)}")
    print(
        f"{result.passes} passes instead of 59, {result.accepted} of {result.proposed} proposals "
        "were right"
    )


if __name__ == "__main__":
    main()
