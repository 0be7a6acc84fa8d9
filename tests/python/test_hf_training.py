# SPDX-License-Identifier: Apache-2.0
"""Training and measuring a converted model."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from hf_helpers import logits, one_thread, tiny, tokens  # noqa: E402, F401
from latte_ext import hf  # noqa: E402
from latte_ext.__main__ import main  # noqa: E402
from latte_ext.hf import evaluation, layerwise  # noqa: E402
from latte_ext.hf.training import Recipe, Training, losses_of  # noqa: E402
from torch.nn import functional as F  # noqa: E402

OPTIONS: dict[str, Any] = {"window": 8, "latents": 5, "sinks": 2, "gate": 1.0}


def texts(count: int = 400) -> Tensor:
    return tokens(1, count)[0]


def recipe(**options: Any) -> Recipe:
    return Recipe(**{"steps": 6, "tokens": 32, "batch": 2, "warmup": 2, **options})


def trained(folder: Path | None = None, **options: Any) -> tuple[Training, Any]:
    torch.manual_seed(0)
    model = hf.convert(tiny(), **OPTIONS)
    run = Training(model, texts(), recipe(**options))
    while not run.done:
        run.step()
        if folder is not None and run.step_index == 3:
            run.save(folder / "run.pt")
    return run, model


@pytest.mark.parametrize("options", [{}, {"teacher": 1.0}, {"teacher": 0.5, "layerwise": 2}])
def test_resume_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    run, model = trained(tmp_path, **options)
    torch.manual_seed(7)
    other = hf.convert(tiny(), **OPTIONS)
    again = Training(other, texts(), recipe(**options))
    again.load(tmp_path / "run.pt")
    while not again.done:
        again.step()
    assert again.losses == run.losses
    for one, two in zip(other.latte_parameters(), model.latte_parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match=r"\[Training\] saved recipe"):
        Training(other, texts(), recipe(rate=1.0)).load(tmp_path / "run.pt")


@pytest.mark.parametrize("teacher", [0.0, 0.3, 1.0])
def test_loss_is_what_torch_computes(teacher: float) -> None:
    """Loss and gradient of a step against cross_entropy and kl_div."""
    model = hf.convert(tiny(), **OPTIONS)
    ids = tokens(2, 33)
    loss, next_token = losses_of(model, ids, teacher)
    loss.backward()
    got = [p.grad.clone() for p in model.latte_parameters()]
    model.zero_grad()
    targets = ids[:, 1:].flatten()
    with evaluation.full_attention(model):
        guide = logits(model, ids[:, :-1]).flatten(0, 1).log_softmax(-1)
    log_p = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    want = (1 - teacher) * F.nll_loss(log_p, targets)
    want = want + teacher * F.kl_div(log_p, guide, reduction="batchmean", log_target=True)
    want.backward()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    assert math.isclose(next_token, float(F.nll_loss(log_p.detach(), targets)), rel_tol=1e-5)
    for one, parameter in zip(got, model.latte_parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-5, rtol=1e-4)


def test_loss_falls() -> None:
    torch.manual_seed(0)
    model = hf.convert(tiny(), **OPTIONS)
    run = Training(model, texts(200), recipe(steps=60, rate=2e-2))
    while not run.done:
        run.step()
    assert sum(run.losses[-10:]) < sum(run.losses[:10])


def test_warm_start_nears_full_attention() -> None:
    torch.manual_seed(0)
    model = hf.convert(tiny(), **OPTIONS)
    before = float(layerwise.warm_start_loss(model, tokens(2, 64)).detach())
    run = Training(model, texts(), recipe(steps=40, layerwise=40, rate=2e-2))
    while not run.done:
        run.step()
    assert float(layerwise.warm_start_loss(model, tokens(2, 64)).detach()) < before


def test_rates() -> None:
    r = recipe(steps=12)
    rates = [r.rate_at(step) for step in range(12)]
    assert rates[0] == r.rate / 2
    assert max(rates) == r.rate == rates[2]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] >= r.rate * r.floor


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_window_errors(family: str) -> None:
    """Against what the layers' full and windowed attention give, each on the same input."""
    model, ids = tiny(family), tokens(2, 40)
    errors = layerwise.window_errors(model, ids, window=8, sinks=2)
    assert len(errors) == 3
    full = [index for index, error in enumerate(errors) if error > 0]
    assert full == ([0, 1, 2] if family == "llama" else [1, 2])
    wide = layerwise.window_errors(model, ids, window=39, sinks=0)
    assert all(wide[index] < errors[index] for index in full)
    chosen = hf.suggest_layers(model, ids, window=8, sinks=2, above=sorted(errors)[1])
    assert len(chosen) == 1
    hf.convert(model, **{**OPTIONS, "layers": chosen})
    assert layerwise.window_errors(model, ids, window=8, sinks=2) == errors
    with pytest.raises(ValueError, match=r"\[window_errors\] ids has shape"):
        layerwise.window_errors(model, ids[0])


def test_ways_to_read() -> None:
    """The pretrained model, the window alone, and latents that forget, from one set of weights."""
    ids = tokens(1, 64)
    want = logits(tiny(), ids)
    model = hf.convert(tiny(), **OPTIONS, output_rank=2)
    for parameter in model.latte_parameters():
        parameter.data += 0.1
    latents = logits(model, ids)
    with evaluation.full_attention(model):
        torch.testing.assert_close(logits(model, ids), want)
        generated = model.generate(ids, max_new_tokens=3, do_sample=False)
        assert torch.equal(generated[:, 64:65], want[:, -1:].argmax(-1))
    with evaluation.without_latents(model):
        alone = logits(hf.convert(tiny(), **{**OPTIONS, "latents": 0}), ids)
        torch.testing.assert_close(logits(model, ids), alone)
    with evaluation.forgetful_latents(model, 64):
        torch.testing.assert_close(logits(model, ids), latents)
    with evaluation.forgetful_latents(model, 16):
        forgets = logits(model, ids)
    torch.testing.assert_close(forgets[:, :16], latents[:, :16])
    assert (forgets - latents)[:, 20:].abs().max() > 1e-3


def test_token_losses() -> None:
    model, ids = hf.convert(tiny(), **OPTIONS), texts(70)
    whole = evaluation.token_losses(model, ids, chunk=None)
    torch.testing.assert_close(evaluation.token_losses(model, ids, chunk=16), whole)
    want = F.cross_entropy(logits(model, ids[None])[0, :-1], ids[1:])
    torch.testing.assert_close(whole.mean(), want)
    assert whole.shape == (69,)


def test_decode_costs() -> None:
    model = hf.convert(tiny(), **OPTIONS)
    near, far = evaluation.decode_costs(model, texts(300), (20, 280), steps=5)
    assert (near.position, far.position) == (20, 280)
    assert near.nbytes == far.nbytes > 0
    assert min(*near, *far) > 0
    with pytest.raises(ValueError, match=r"\[decode_costs\] model is a LlamaForCausalLM"):
        evaluation.decode_costs(tiny(), texts(), (20,))


def test_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6400, generator=generator)
    got = evaluation.difference(noise - 0.5, torch.zeros(6400), 0, 6400)
    assert abs(got.mean + 0.5) < 4 * got.error
    assert 0.5 / 80 < got.error < 2 / 80
    with pytest.raises(ValueError, match=r"\[difference\] 100 tokens"):
        evaluation.difference(noise, noise, 0, 100)


WORKER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from torch import distributed
distributed.init_process_group("gloo")
from test_hf_training import OPTIONS, recipe, texts
from hf_helpers import tiny
from latte_ext import hf
from latte_ext.hf.training import Training
torch.manual_seed(distributed.get_rank())
model = hf.convert(tiny(), **OPTIONS)
run = Training(model, texts(), recipe(batch=1, steps=3))
while not run.done:
    run.step()
if distributed.get_rank() == 0:
    torch.save([p.detach() for p in model.latte_parameters()], sys.argv[2])
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """torchrun with a text per process gives what one process with two texts gives."""
    script, result = tmp_path / "worker.py", tmp_path / "weights.pt"
    script.write_text(WORKER)
    # By address and by interface: the name of a host need not resolve.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ran = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
            "--master-addr=127.0.0.1", f"--master-port={port}", "--local-addr=127.0.0.1",
            script, Path(__file__).parent, result,
        ],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    torch.manual_seed(0)
    model = hf.convert(tiny(), **OPTIONS)
    run = Training(model, texts(), recipe(batch=2, steps=3))
    while not run.done:
        run.step()
    for got, want in zip(torch.load(result), model.latte_parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_trainer(tmp_path: Path) -> None:
    """transformers' own loop trains the new weights alone."""
    model = hf.convert(tiny(), **OPTIONS)
    before = [p.detach().clone() for p in model.parameters()]
    rows = [{"input_ids": x, "labels": x} for x in tokens(8, 32)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[],
        save_strategy="no", learning_rate=1e-2, use_cpu=True,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, parameter) != parameter.requires_grad


def words() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    raw = Tokenizer(WordLevel({f"t{i}": i for i in range(97)}, unk_token="t3"))
    raw.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="t0")


def test_extend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, from a folder of a model to a report, and its continuation."""
    tiny().save_pretrained(tmp_path / "model")
    words().save_pretrained(tmp_path / "model")
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(3):
        ids = tokens(1, 600, seed=index)[0].tolist()
        (folder / f"{index}.txt").write_text(" ".join(f"t{i}" for i in ids))
    (folder / "page.html").write_text("<p>t4 t5</p><script>t6</script>")
    out = tmp_path / "out"
    command = [
        "extend", "--model", str(tmp_path / "model"), "--text", str(folder), "--evaluate",
        str(folder / "1.txt"), "--out", str(out), "--steps", "4", "--window", "16", "--tokens",
        "64", "--layers", "all",
    ]  # fmt: skip
    assert main(command) == 0
    report = json.loads((out / "report.json").read_text())
    assert set(report["documents"]["1"]["buckets"]) == {
        "full attention", "window and sinks", "with latents", "latents that forget"
    }  # fmt: skip
    assert "page" not in report["documents"]
    assert report["decoding"][0]["nbytes"] == report["decoding"][1]["nbytes"]
    assert (out / "report.png").exists()
    assert "with latents" in capsys.readouterr().out
    saved = torch.load(out / "training.pt", weights_only=True)
    assert len(saved["losses"]) == 4
    assert main([*command, "--resume"]) == 0
    model = hf.load_adapter(tiny(), out / "adapter")
    assert model.config.latte["window"] == 16
    nothing = str(tmp_path / "nothing")
    for index, message in (
        (command.index("--text"), "does not exist"),
        (command.index("--evaluate"), "of --evaluate is no file"),
        (command.index("--model"), "expected a folder of save_pretrained"),
    ):
        with pytest.raises(SystemExit, match=r"\[extend\] .*" + message):
            main([*command[: index + 1], nothing, *command[index + 2 :]])
    for option, value in (("--layers", "1,x"), ("--minutes", "-1"), ("--mixer", "ssm")):
        with pytest.raises(SystemExit, match="2"):
            main([*command, option, value])
        assert f"argument {option}: " in capsys.readouterr().err
