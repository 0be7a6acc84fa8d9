# SPDX-License-Identifier: Apache-2.0
"""Reads a sequence in pieces, then token by token: the state carries everything, the result is one.

python examples/stream.py
"""

import argparse

import latte_ext
import torch

B, H, T, L, D = 1, 8, 4096, 64, 64


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    q, k, v = torch.randn(B, H, T, L), torch.randn(B, H, T, L), torch.randn(B, H, T, D)
    whole = latte_ext.latent_attention(q, k, v)

    state, pieces = None, []
    for start in range(0, T - 100, 1000):
        piece = slice(start, min(start + 1000, T - 100))
        y, state = latte_ext.latent_attention(
            q[:, :, piece], k[:, :, piece], v[:, :, piece], state=state, return_state=True
        )
        pieces.append(y)
    assert state is not None
    for t in range(T - 100, T):
        y = latte_ext.latent_attention_step(q[:, :, t], k[:, :, t], v[:, :, t], state)
        pieces.append(y.unsqueeze(2))

    error = (torch.cat(pieces, dim=2) - whole).abs().max().item()
    print(f"{T} tokens in pieces and steps: largest difference {error:.1e}")
    print(f"the state of all of them: {state.nbytes / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
