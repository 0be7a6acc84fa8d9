# SPDX-License-Identifier: Apache-2.0
"""A learned table of positions that goes on beyond its end.

Notation: P rows of the table, E model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def check_positions(model: nn.Module, count: int) -> None:
    """Whether `extend_positions` can give the model so many.

    Raises:
        ValueError: there is no table, or it is longer already.
    """
    owner = _owner(model)
    if owner is None:
        raise ValueError(
            f"[convert] positions is {count} for a {type(model).__name__}, expected None: it has "
            "no table of learned positions that could end"
        )
    rows = owner.position_embeddings.num_embeddings
    if count < rows:
        raise ValueError(
            f"[convert] positions is {count}, expected at least the {rows} rows of the model's "
            "table"
        )


def extend_positions(model: nn.Module, config: Any, count: int) -> None:
    """Gives the model's table `count` rows, in place, and what is as long as the table too."""
    owner = _owner(model)
    table = owner.position_embeddings
    before = table.num_embeddings
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    rows = extended_rows(table.weight.detach(), count, first)
    table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
    table.num_embeddings = config.max_position_embeddings = count
    for name, buffer in list(owner.named_buffers(recurse=False)):
        if buffer.shape == (1, before):
            more = torch.arange(count) if name == "position_ids" else torch.zeros(count)
            setattr(owner, name, more.to(buffer.device, buffer.dtype).expand(1, -1))


def extended_rows(table: Tensor, count: int, first: int = 0) -> Tensor:
    """The table (P,E) with rows [P, count) that repeat its first half.

    Not all of it: where texts were mostly shorter than the table, its later rows are worth less.
    MiniLM's embeddings of texts of 62 and 198 tokens, moved to places 512 to 7,900, have cosines of
    0.91 and 0.95 to those in the first places with this rule, 0.90 and 0.90 when all rows are
    repeated, 0.87 and 0.83 with the later half (examples/sentence_encoder.py). The first row is not
    repeated: it is that of [CLS], and far from its neighbours.

    Args:
        first: the row of the first token; those before it are no positions.
    """
    start = first + 1
    period = max((table.shape[0] - first) // 2 - 1, 1)
    more = torch.arange(count - table.shape[0], device=table.device)
    return torch.cat([table, table[start + more % period]])


def _owner(model: nn.Module) -> Any:
    """The module with a table of learned positions; None: there is none."""
    for module in model.modules():
        if isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return module
    return None
