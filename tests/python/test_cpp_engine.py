# SPDX-License-Identifier: Apache-2.0
"""examples/cpp: a program without Python, built on the installed package, says what Python says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from latte_ext import nn
from latte_ext.nn import VARIANTS, LatteConfig, LatteLM

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
# More than a chunk of the program's prompt, and many windows.
PROMPT = bytes(range(32, 127)) * 3
TOKENS = 60


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """latte-lm, configured with the folder that `--cmake-dir` prints."""
    build = tmp_path_factory.mktemp("build")
    # cmake and ninja may be those of the environment, whose programs need not be on the path.
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    folder = subprocess.run(
        [sys.executable, "-m", "latte_ext", "--cmake-dir"],
        cwd=build, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    for command in (
        ["cmake", "-S", EXAMPLE, "-B", build, f"-Dlatte_DIR={folder}"],
        ["cmake", "--build", build],
    ):
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    return build / "latte-lm"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [os.fspath(program), *(a if isinstance(a, bytes) else str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, check=False)


def build_model(variant: str, **options: object) -> LatteLM:
    """With weights that make every part matter."""
    sizes = {"vocab_size": 256, "embed_dim": 48, "num_layers": 2, "num_heads": 4}
    if variant != "softmax":
        sizes["num_latents"] = 7
    if "window" in VARIANTS[variant]:
        sizes["window"] = 16
    model = LatteLM(LatteConfig.named(variant, **{**sizes, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def greedy(model: LatteLM) -> bytes:
    tokens = model.generate(torch.tensor([list(PROMPT)]), TOKENS, temperature=0)
    return bytes(tokens[0, len(PROMPT) :].tolist())


CASES: list[tuple[str, dict[str, object]]] = [
    *((variant, {}) for variant in VARIANTS),
    ("latte", {"kv_heads": 2, "latent_heads": 1, "tie_head": False, "bias": False}),
    ("latte-conv-swa++", {"kv_heads": 4, "latent_heads": 2, "rotary_base": None}),
    ("latte-rglru-swa++", {"kv_heads": 2, "latent_heads": 4, "head_dim": 10, "bias": True}),
    ("softmax", {"kv_heads": 1, "window": 1000, "rotary_base": 100.0}),
    ("latte-conv++", {"mlp_dim": 33, "conv_width": 1, "mlp": "gelu", "norm": "layer"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "options"), CASES)
def test_the_same_tokens(
    variant: str, options: dict[str, object], program: Path, tmp_path: Path
) -> None:
    model = build_model(variant, **options)
    nn.save(model, tmp_path / "model.safetensors")
    got = run(
        program, tmp_path / "model.safetensors", "--prompt", PROMPT, "--tokens", TOKENS,
        "--threads", 2,
    )  # fmt: skip
    assert got.returncode == 0, got.stderr
    assert got.stdout == greedy(model)


@pytest.mark.slow
def test_a_saved_state_goes_on(program: Path, tmp_path: Path) -> None:
    model = build_model("latte-rglru-swa++")
    file, state = tmp_path / "model.safetensors", tmp_path / "state"
    nn.save(model, file)
    first = run(program, file, "--prompt", PROMPT, "--tokens", 25, "--save", state)
    second = run(program, file, "--load", state, "--tokens", TOKENS - 25)
    assert first.stdout + second.stdout == greedy(model)
    # A fixed size: as large after one token.
    run(program, file, "--prompt", "x", "--tokens", 0, "--save", tmp_path / "one")
    assert abs((tmp_path / "one").stat().st_size - state.stat().st_size) < 16


@pytest.mark.slow
def test_half_precision_weights_are_widened(program: Path, tmp_path: Path) -> None:
    half, wide = tmp_path / "half", tmp_path / "wide"
    model = build_model("latte-conv++").bfloat16()
    nn.save(model, half)
    nn.save(model.float(), wide)
    texts = [run(program, file, "--prompt", "def ").stdout for file in (half, wide)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "x"), "--tokens is 'x', expected a number"),
        (("--tokens", "-1"), "--tokens is '-1', expected a number, at least 0"),
        (("--temperature", "nan", "--prompt", "x"), "expected a number"),
        (("--threads", "0"), "--threads is '0'"),
        (("--prompt",), "--prompt is the last argument"),
        (("--colour", "red"), "got --colour, expected one of the options"),
        (("second",), "expected one model"),
        ((), "prompt is empty, expected --prompt or --load"),
        (("--load", "/nonexistent/state"), "[safetensors] cannot open /nonexistent/state"),
    ],
)
def test_arguments(arguments: tuple[str, ...], message: str, program: Path, tmp_path: Path) -> None:
    nn.save(build_model("latte"), tmp_path / "model")
    got = run(program, tmp_path / "model", *arguments)
    assert got.returncode == 1
    assert message in got.stderr.decode()
    assert got.stdout == b""


@pytest.mark.slow
def test_sampling_times_and_help(program: Path, tmp_path: Path) -> None:
    file = tmp_path / "model"
    nn.save(build_model("latte"), file)
    arguments = ("--prompt", "x", "--temperature", 1, "--tokens", 30)
    texts = [run(program, file, *arguments, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert b"% of the memory bandwidth" in run(program, file, *arguments, "--time").stderr
    assert run(program, "--help").stdout.startswith(b"latte-lm MODEL")
    assert run(program).returncode == 2
    model = LatteLM(LatteConfig.named("latte", vocab_size=9, embed_dim=8, num_layers=1,
                                      num_heads=2, num_latents=2))  # fmt: skip
    nn.save(model, file)
    assert b"model has 9 tokens, expected 256" in run(program, file, "--prompt", "x").stderr
