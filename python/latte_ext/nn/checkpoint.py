# SPDX-License-Identifier: Apache-2.0
"""A `LatteLM` in one file: safetensors, which hold names, shapes and numbers and run no code."""

from __future__ import annotations

import dataclasses
import json
from os import PathLike
from typing import Any

from .config import LatteConfig
from .model import LatteLM

# Part of the format: examples/cpp reads it too.
_FORMAT = "latte_ext.LatteLM 1"
_TIED = "head.weight"


def save(model: LatteLM, path: str | PathLike[str]) -> None:
    """Write the weights and the configuration of `model` to a safetensors file.

    The file has the tensors of `model.state_dict()` under their names, a tied head's weight once,
    and in its metadata `format` and, as JSON, `config`: the fields of the model's `LatteConfig`.
    `load` reads it, and so does the program of examples/cpp, without Python.

    Raises:
        TypeError: model is not a `LatteLM`. ImportError: safetensors is not installed.
    """
    if not isinstance(model, LatteLM):
        raise TypeError(f"[nn.save] model is a {type(model).__name__}, expected a LatteLM")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_head:
        del tensors[_TIED]
    config = json.dumps(dataclasses.asdict(model.config))
    metadata = {"format": _FORMAT, "config": config}
    _safetensors("nn.save").torch.save_file(tensors, path, metadata)


def load(path: str | PathLike[str], *, device: str = "cpu") -> LatteLM:
    """The model that `save` wrote, in evaluation mode, with the dtypes of its weights.

    Raises:
        ValueError: the file is damaged, has another format, or tensors that do not fit its
            configuration.
        OSError: it cannot be read. ImportError: safetensors is not installed.
    """
    op = "nn.load"
    safetensors = _safetensors(op)
    try:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"[{op}] {path} is damaged ({error}), expected safetensors") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"[{op}] {path} has format {metadata.get('format')!r}, expected {_FORMAT!r}"
        )
    config = _config(op, metadata.get("config", ""))
    if config.num_layers > len(tensors):
        raise ValueError(
            f"[{op}] {path} has {len(tensors)} tensors, expected {config.num_layers} layers"
        )
    if config.tie_head and "embedding.weight" in tensors:
        tensors[_TIED] = tensors["embedding.weight"]
    # Without memory: what the configuration asks for is allocated only if the file has it.
    model = LatteLM(config, device="meta")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"[{op}] {path} does not fit its configuration: {error}") from error
    if config.tie_head:
        model.head.weight = model.embedding.weight
    return model.eval()


def _config(op: str, text: str) -> LatteConfig:
    try:
        fields = json.loads(text)
        return LatteConfig(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"[{op}] config is {text!r} ({error}), expected the fields of a LatteConfig"
        ) from error


def _safetensors(op: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"[{op}] {error}, expected `pip install safetensors`") from error
    return safetensors
