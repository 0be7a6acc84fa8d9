# SPDX-License-Identifier: Apache-2.0
"""The experiments in examples/ run; what they found lies beside them."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import load_example
from latte_ext import demo
from latte_ext.nn import VARIANTS

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["recall", "language_model"])
def test_experiment_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_example(name).main(["--quick"]) == 0
    assert capsys.readouterr().out.count("parameters") >= 6


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
