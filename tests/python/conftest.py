# SPDX-License-Identifier: Apache-2.0
"""Settings that every Python test runs under."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from support_matrix import Matrix

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
    config.addinivalue_line("markers", "supports(feature, *operators): a cell of docs/support.md")
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


MATRIX = pytest.StashKey[Matrix]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-matrix", type=Path, help="write this page; not with xdist")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[MATRIX] = Matrix()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        item.config.stash[MATRIX].add(item, report.outcome)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--support-matrix")
    if path is not None:
        session.config.stash[MATRIX].write(path, torch.__version__)


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
