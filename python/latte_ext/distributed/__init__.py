# SPDX-License-Identifier: Apache-2.0
"""Sequences sharded over the ranks of torch.distributed."""

from ._wrap import context_parallel as context_parallel
