# SPDX-License-Identifier: Apache-2.0
"""`convert`: windows, sinks and latents in the place of a pretrained model's full attention.

Notation: E model width, H query heads, Hk key/value heads, D channels per head.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .._checks import check_type
from .attention import IMPLEMENTATION, ConvertedAttention, Plan
from .cache import LatteCache
from .families import Derived, config_class_of, derive
from .latents import AttentionShape, LatentBranch
from .positions import check_positions, extend_positions
from .rotation import Rotation, find_rotation
from .settings import LatteSettings

_ADAPTER, _SETTINGS = "latte_adapter.safetensors", "latte_adapter.json"
# Rotations whose angles change with the length of the text are not the window's to keep.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class LatteMixin(Derived, PreTrainedModel):  # type: ignore[misc]
    """The base that `convert` gives to the class of a model."""

    # Of names of weights: they are float32 beside a bfloat16 model, loaded ones too.
    _keep_in_fp32_modules_strict = ("latte",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # By name, which transformers learns from a constructor that a model converted in place
        # does not run: without it output_hidden_states=True would give None.
        _CAN_RECORD_REGISTRY.setdefault(str(cls), cls._can_record_outputs)

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install(self, device=None)

    def latte_parameters(self) -> Iterator[nn.Parameter]:
        """The weights that the conversion added."""
        for layer in attention_layers(self):
            if layer.latte is not None:
                yield from layer.latte.parameters()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.use_cache is not False and model_kwargs.get("cache") is None:
            kind = generation_config.cache_implementation
            if kind not in (None, "dynamic"):
                raise ValueError(
                    f"[generate] cache_implementation is {kind!r}, expected None: a converted "
                    "model has a LatteCache"
                )
            model_kwargs["cache"] = LatteCache(self.config)
            if generation_config.is_assistant:
                model_kwargs["cache"].activate_past_recording()
            return None
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )


def convert(model: PreTrainedModel, **options: Any) -> Any:
    """Gives a model windows, sinks and latents where it has full attention, in place.

    Its weights stay and are frozen; `model.latte_parameters()` are new. The model is of a class of
    its family's own kind, "LatteLlamaForCausalLM", that save_pretrained() and from_pretrained()
    know once latte_ext.hf is imported.

    Args:
        model: a transformers model whose attention goes through transformers' interface and has
            no dropout while it is trained, causal or an encoder.
        options: those of `LatteSettings`.

    Returns:
        `model`.

    Raises:
        ValueError: what cannot be converted.
        TypeError: unknown options.
    """
    settings = LatteSettings.create(options)
    check_type("convert", "model", model, PreTrainedModel)
    config = model.config
    if getattr(config, "latte", None) is not None:
        raise ValueError("[convert] model is converted already, expected a pretrained one")
    if config.get_text_config() is not config or config.is_encoder_decoder:
        raise ValueError(
            f"[convert] model is a {type(model).__name__}, expected one of text, with a decoder or "
            "an encoder"
        )
    layers = attention_layers(model)
    rotations = find_rotations(model, layers)
    causal = bool(getattr(layers[0], "is_causal", False))
    _check_rope(config, settings, rotations)
    known = [rotation for rotation in dict.fromkeys(rotations) if rotation is not None]
    full = [i for i, layer in enumerate(layers) if own_window(layer) is None]
    chosen = full if settings.layers is None else sorted(set(settings.layers))
    for index in chosen:
        if index not in full:
            raise ValueError(
                f"[convert] layers has {index}, expected some of {full}: those that attend to all "
                "tokens"
            )
    if settings.positions is not None:
        check_positions(model, settings.positions)
    values = settings.to_dict()
    values["layers"] = chosen if settings.latents else []
    latte = {
        **values,
        "base": config.model_type,
        "implementation": config._attn_implementation or "sdpa",
        "causal": causal,
        "rotations": [rotation.to_dict() for rotation in known],
        "layer_rotations": [None if r is None else known.index(r) for r in rotations],
    }
    # Raises before the model is touched; on a device that holds no weights.
    for index in latte["layers"]:
        LatentBranch(settings, _shape(layers[index]), causal=causal, device="meta")
        if settings.output_rank:
            _output(layers[index])
    config_class = config_class_of(type(config))
    model_class = derive(LatteMixin, type(model), config_class=config_class)
    # A copy: a configuration may be that of other models too.
    original, config = config, copy.deepcopy(config)
    for module in model.modules():
        if getattr(module, "config", None) is original:
            module.config = config
    config.__class__, model.__class__ = config_class, model_class
    config.latte = latte
    config.architectures = [model_class.__name__]
    if settings.positions is not None:
        extend_positions(model, config, settings.positions)
    model.requires_grad_(False)
    install(model, device=model.device)
    return model


def install(model: PreTrainedModel, *, device: torch.device | None) -> None:
    """Gives the layers of a model what its configuration's `latte` says."""
    latte = model.config.latte
    if latte is None:
        raise ValueError(
            f"[{type(model).__name__}] config.latte is None, expected that of a converted model: "
            "latte_ext.hf.convert makes one"
        )
    model.config._attn_implementation = IMPLEMENTATION
    model.register_forward_pre_hook(_give_cache, with_kwargs=True)
    settings = LatteSettings.from_config(latte)
    known = [Rotation.from_dict(rotation) for rotation in latte["rotations"]]
    for index, layer in enumerate(attention_layers(model)):
        layer.__class__ = derive(ConvertedAttention, type(layer))
        which = latte["layer_rotations"][index]
        own = own_window(layer)
        layer.latte_plan = Plan(
            window=settings.window if own is None else own,
            sinks=settings.sinks if own is None else 0,
            causal=latte["causal"],
            rotation=None if which is None else known[which],
        )
        layer.latte = None
        if index in latte["layers"]:
            layer.latte = LatentBranch(
                settings, _shape(layer), causal=latte["causal"], device=device
            )
            if settings.output_rank:
                _output(layer).register_forward_hook(_AddOutput(layer))


def _give_cache(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: a cache of the right kind where the family's code would make one. (A
    forward() of our own would hide the family's signature, by which generate() goes.)"""
    # past_key_values is transformers' old name of cache, which it still takes.
    given = [kwargs.get(name) for name in ("cache", "past_key_values")]
    wanted = kwargs.get("use_cache")
    if wanted is None and model.training:
        kwargs["use_cache"] = False
    elif wanted is None:
        wanted = getattr(model.config, "use_cache", False)
    converted = model.config._attn_implementation == IMPLEMENTATION
    if wanted and converted and model.config.latte["causal"] and given == [None, None]:
        kwargs["cache"] = LatteCache(model.config)
    return args, kwargs


class _AddOutput:
    """A forward hook on the output projection of a converted layer."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        layer = self.layer
        converted = layer.config._attn_implementation == IMPLEMENTATION
        if not converted or not layer.latte_plan.latents or layer.latte is None:
            return output
        added: Tensor = layer.latte.project(inputs[0], output)
        return added


def attention_layers(model: nn.Module) -> list[ConvertedAttention]:
    """The attention layers of a model, in order.

    Raises:
        ValueError: there are none that are known to be such.
    """
    found = [
        module
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
        and hasattr(module, "is_causal")
        and hasattr(module, "scaling")
        and hasattr(module, "config")
    ]
    # Encoders that never have a cache do not number their layers.
    numbers = [getattr(module, "layer_idx", index) for index, module in enumerate(found)]
    if not found or numbers != list(range(len(found))):
        raise ValueError(
            f"[convert] {type(model).__name__} has {len(found)} attention layers that are known as "
            f"such, expected {getattr(model.config, 'num_hidden_layers', 'some')}, one per layer"
        )
    return found  # type: ignore[return-value]


def save_adapter(model: Any, folder: str | PathLike[str]) -> None:
    """Saves only what the conversion added, and its settings, into a folder.

    Raises:
        ValueError: model is not a converted one.
    """
    check_converted("save_adapter", model)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file(_adapter_tensors(model), path / _ADAPTER)
    latte = {**model.config.latte, "base_name": model.config._name_or_path}
    (path / _SETTINGS).write_text(json.dumps(latte, indent=1) + "\n")


def load_adapter(model: Any, folder: str | PathLike[str]) -> Any:
    """Converts a model as a saved adapter says, if it is not yet, and loads its weights.

    Raises:
        ValueError: the adapter is of another model or conversion.
    """
    path = Path(folder)
    latte = json.loads((path / _SETTINGS).read_text())
    if getattr(model.config, "latte", None) is None:
        if model.config.model_type != latte["base"]:
            raise ValueError(
                f"[load_adapter] model is of type {model.config.model_type!r}, expected "
                f"{latte['base']!r} as the adapter"
            )
        convert(model, **LatteSettings.from_config(latte).to_dict())
    tensors, own = load_file(path / _ADAPTER), _adapter_tensors(model)
    for name in own.keys() | tensors.keys():
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise ValueError(
                f"[load_adapter] {name} is {_size(tensors, name)} in the adapter, expected "
                f"{_size(own, name)} as in the model"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return model


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": parameter.detach().contiguous()
        for index, layer in enumerate(attention_layers(model))
        if layer.latte is not None
        for name, parameter in layer.latte.named_parameters()
    }


def _size(tensors: dict[str, Tensor], name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "absent"


def check_converted(op: str, model: Any) -> None:
    if getattr(getattr(model, "config", None), "latte", None) is None:
        raise ValueError(
            f"[{op}] model is a {type(model).__name__}, expected one that convert() has converted"
        )


def own_window(layer: Any) -> int | None:
    window = getattr(layer, "sliding_window", None)
    return None if window is None else int(window)


def _output(layer: Any) -> nn.Module:
    for name in ("o_proj", "out_proj", "dense"):
        if isinstance(getattr(layer, name, None), nn.Module):
            return getattr(layer, name)  # type: ignore[no-any-return]
    raise ValueError(
        f"[convert] output_rank is positive for a {type(layer).__name__}, expected 0: it has no "
        "output projection of a known name"
    )


def _shape(layer: Any) -> AttentionShape:
    config = layer.config
    heads = config.num_attention_heads
    head_dim = getattr(layer, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return AttentionShape(config.hidden_size, heads, kv_heads, head_dim)


def _check_rope(config: Any, settings: LatteSettings, rotations: list[Rotation | None]) -> None:
    if all(rotation is None for rotation in rotations):
        return
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for rope in nested:
        if rope.get("rope_type") in _LENGTH_DEPENDENT:
            raise ValueError(
                f"[convert] rope_type is {rope['rope_type']!r}, expected one whose angles do not "
                "depend on the length of the text"
            )


class _Seen(Exception):
    """Carries the query of a layer out of it."""

    def __init__(self, query: Tensor) -> None:
        super().__init__()
        self.query = query


def _catch(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise _Seen(query)


AttentionInterface.register("latte_probe", _catch)


def find_rotations(model: Any, layers: list[ConvertedAttention]) -> list[Rotation | None]:
    """The rotation of each layer, from the queries that it makes at positions 0 and 1."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = "latte_probe"
    width, device, dtype = config.hidden_size, model.device, model.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, width, generator=generator).to(device, dtype)
    rotary = [m for n, m in model.named_modules() if n.split(".")[-1] == "rotary_emb"]
    found: list[Rotation | None] = []
    try:
        for layer in layers:
            queries, embeddings = [], []
            for position in (0, 1):
                position_ids = torch.tensor([[position]], device=device)
                arguments: dict[str, Any] = {"attention_mask": None}
                if rotary:
                    embeddings.append(_embedding(rotary[0], layer, hidden, position_ids))
                    arguments["position_embeddings"] = embeddings[-1]
                try:
                    with torch.no_grad():
                        layer(hidden, **arguments)
                except _Seen as seen:
                    queries.append(seen.query)
                else:
                    raise ValueError(
                        f"[convert] {type(layer).__name__} does not go through transformers' "
                        "attention interface, expected a layer that does"
                    )
            if not rotary:
                found.append(None)
                continue
            cos, sin = (x.float() for x in embeddings[1])
            found.append(find_rotation(queries[0], queries[1], cos, sin))
    finally:
        config._attn_implementation = before
    return found


def _embedding(
    rotary: nn.Module, layer: Any, hidden: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    kind = getattr(layer, "layer_type", None)
    with torch.no_grad():
        if kind is not None and hasattr(rotary, f"{kind}_inv_freq"):
            return rotary(hidden.float(), position_ids, layer_type=kind)  # type: ignore[no-any-return]
        return rotary(hidden.float(), position_ids)  # type: ignore[no-any-return]
