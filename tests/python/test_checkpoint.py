# SPDX-License-Identifier: Apache-2.0
"""`nn.save` and `nn.load`: a model comes back bit for bit, or an error says why not."""

import json
from pathlib import Path

import pytest
import torch
from latte_ext import nn
from latte_ext.nn import VARIANTS, LatteConfig, LatteLM
from safetensors.torch import load_file, save_file

FORMAT = "latte_ext.LatteLM 1"


def small(variant: str, **options: object) -> LatteConfig:
    sizes = {"vocab_size": 11, "embed_dim": 16, "num_layers": 2, "num_heads": 2, "num_latents": 3}
    if variant == "softmax":
        del sizes["num_latents"]
    return LatteConfig.named(variant, **{**sizes, **options})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_comes_back(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = LatteLM(small(variant, tie_head=variant != "latte"), dtype=dtype)
    nn.save(model, tmp_path / "model.safetensors")
    back = nn.load(tmp_path / "model.safetensors")
    assert back.config == model.config
    assert not back.training
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert back.state_dict()[name].dtype == dtype
        assert torch.equal(back.state_dict()[name], tensor)
    assert (back.head.weight is back.embedding.weight) == model.config.tie_head
    assert all(p.requires_grad for p in back.parameters())
    tokens = torch.arange(9)[None]
    assert torch.equal(back(tokens), model.eval()(tokens))


def test_what_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(TypeError, match=r"\[nn.save\] model is a Linear, expected a LatteLM"):
        nn.save(torch.nn.Linear(1, 1), path)  # type: ignore[arg-type]
    path.write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ValueError, match=r"^\[nn.load\] .* is damaged"):
        nn.load(path)
    with pytest.raises(FileNotFoundError):
        nn.load(tmp_path / "absent")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"^\[nn.load\] .* has format None, expected"):
        nn.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 12}, "does not fit its configuration"),
        ({"vocab_size": 2**40}, "does not fit its configuration"),
        ({"num_layers": 10**9}, "expected 1000000000 layers"),
        ({"mixer": "lstm"}, "expected the fields of a LatteConfig"),
        ({"surprise": 1}, "expected the fields of a LatteConfig"),
    ],
)
def test_a_configuration_that_does_not_fit(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    nn.save(LatteLM(small("latte-conv++")), path)
    config = {**vars(small("latte-conv++")), **change}
    save_file(load_file(path), path, {"format": FORMAT, "config": json.dumps(config)})
    with pytest.raises(ValueError, match=rf"^\[nn.load\] .*{message}"):
        nn.load(path)


def test_a_missing_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = LatteLM(small("latte"))
    nn.save(model, path)
    for name in ("embedding.weight", "blocks.1.mlp_in.bias"):
        tensors = load_file(path)
        del tensors[name]
        config = json.dumps(vars(model.config))
        save_file(tensors, tmp_path / "less", {"format": FORMAT, "config": config})
        with pytest.raises(ValueError, match=name):
            nn.load(tmp_path / "less")
