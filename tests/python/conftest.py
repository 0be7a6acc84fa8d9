# SPDX-License-Identifier: Apache-2.0
"""Settings that every Python test runs under."""

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

# Differences between torch versions that no code here can avoid: (filter, reason).
TOLERATED_WARNINGS = (
    (
        "ignore:.*is deprecated:DeprecationWarning:torch",
        "torch.compile and torch.export call their own deprecated functions",
    ),
)

hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=15, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than five seconds")
    config.addinivalue_line("filterwarnings", "error")
    for tolerated, _ in TOLERATED_WARNINGS:
        config.addinivalue_line("filterwarnings", tolerated)


@pytest.fixture(scope="session")
def pool() -> Iterator[Any]:
    """The `sharded_helpers.Pool` of the run, since each process takes seconds to import torch."""
    from sharded_helpers import RANKS, Pool

    pool = Pool(RANKS)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def fixed_surroundings() -> Iterator[None]:
    """Seeds, two threads and poisoned memory for every test, whatever ran before it.

    In deterministic mode torch fills the memory of torch.empty, empty_like, new_empty and
    empty_strided with NaN (integers: their maximum, all ones in a byte workspace), in Python and
    in C++ alike, so an element that an operator forgets to write or reads too early is seen.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
