# SPDX-License-Identifier: Apache-2.0
"""Calls around torch's dispatcher, which costs more than the kernel of a token does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _core
from ._device import EMULATED
from ._sharding import in_region


def direct(operator: Any) -> Callable[..., Any]:
    """The operator without the dispatcher.

    The function takes the operator's arguments, and `extras=False` where only the first result is
    wanted: the others may then be None. It returns the results; None, with nothing done, wherever
    the dispatcher would do more than call the kernel, and wherever an argument is not what the
    kernel takes: then the operator has to answer.
    """
    name = operator._schema.name.partition("::")[2]
    function = getattr(_core, f"{name}_direct")

    def call(*args: Any, extras: bool = True) -> Any:
        # The core refuses what else the dispatcher is needed for, and what it alone can see of the
        # arguments: subclasses, devices, layouts, dtypes, lazy negation, shapes, and in grad mode
        # what requires grad.
        if torch.compiler.is_compiling() or EMULATED or in_region():
            return None
        return function(*args, bool(extras))

    return call
