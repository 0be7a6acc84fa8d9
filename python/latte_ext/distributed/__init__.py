# SPDX-License-Identifier: Apache-2.0
"""Sequences sharded over the ranks of torch.distributed: docs/distributed.md.

`import latte_ext` does not import this package, nor torch.distributed on its own account.
"""

from ._split import shard_sequence as shard_sequence
from ._wrap import context_parallel as context_parallel

__all__ = ["context_parallel", "shard_sequence"]
