# SPDX-License-Identifier: Apache-2.0
"""Converted classes, made from those of a family, and what transformers learns of them."""

from __future__ import annotations

from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

PREFIX = "latte_"
# The families whose conversion is tested, by model_type.
FAMILIES = (
    "bert", "cohere2", "distilbert", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral",
    "olmo2", "phi3", "qwen2", "qwen3", "roberta", "smollm3", "stablelm",
)  # fmt: skip
_AUTO_CLASSES: tuple[Any, ...] = (
    AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification, AutoModelForTokenClassification,
)  # fmt: skip


class Derived:
    """Base of classes that are made at run time: pickle and copy make them anew from `base`."""

    base: type[Any]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (_maker(type(self)), self.base), self.__dict__


def _maker(made: type[Any]) -> type[Any]:
    """Which of the direct subclasses of `Derived` a class comes from."""
    return next(c for c in made.__mro__ if Derived in c.__bases__)


def _blank(maker: type[Any], base: type[Any]) -> Any:
    made = derive(maker, base)
    return object.__new__(made)


_derived: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def derive(maker: type[Any], base: type[Any], **members: Any) -> type[Any]:
    """The class "Latte<base>" of `base` and a subclass of `Derived`, always the same one."""
    if issubclass(base, maker):
        return base
    if (maker, base) not in _derived:
        members = {"__module__": __name__, "base": base, **members}
        _derived[maker, base] = type(f"Latte{base.__name__}", (maker, base), members)
    return _derived[maker, base]


def config_class_of(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class with the field `latte`, known to AutoConfig."""
    model_type = PREFIX + base.model_type
    if model_type in CONFIG_MAPPING:
        known: type[Any] = CONFIG_MAPPING[model_type]
        return known
    name = f"Latte{base.__name__}"

    def __post_init__(self: Any, **kwargs: Any) -> None:
        super(made, self).__post_init__(**kwargs)
        _register_models(made, base)

    made: Any = type(
        name,
        (base,),
        {
            "__module__": __name__,
            "__annotations__": {"latte": "dict | None"},
            "__post_init__": __post_init__,
            "latte": None,
            "model_type": model_type,
        },
    )
    globals()[name] = made
    AutoConfig.register(model_type, made)
    result: type[Any] = made
    return result


def _register_models(config_class: type[PreTrainedConfig], base: type[PreTrainedConfig]) -> None:
    """Tells transformers' automatic classes of the models of a configuration, when one is made:
    earlier, every family's modelling code would be imported."""
    from .convert import LatteMixin

    for auto in _AUTO_CLASSES:
        mapping = auto._model_mapping
        if config_class in mapping or base not in mapping:
            continue
        models = mapping[base]
        model = models[0] if isinstance(models, tuple) else models
        auto.register(config_class, derive(LatteMixin, model, config_class=config_class))


for _model_type in FAMILIES:
    if _model_type in CONFIG_MAPPING:
        config_class_of(CONFIG_MAPPING[_model_type])
