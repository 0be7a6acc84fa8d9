# SPDX-License-Identifier: Apache-2.0
"""Settings that every Python test runs under, and the devices that some of them run on."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from latte_ext._device import EMULATED, unusable
from support_matrix import Matrix

# Differences between torch versions that no code here can avoid: (filter, reason).
TOLERATED_WARNINGS = (
    (
        "ignore:.*is deprecated:DeprecationWarning:torch",
        "torch.compile and torch.export call their own deprecated functions",
    ),
    (
        "ignore:.*torch.jit.script. is deprecated:FutureWarning",
        "torch 2.14's forward mode calls it",
    ),
    (
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
        "torch 2.14's opcheck reads it",
    ),
    (
        "ignore:The given buffer is not writable:UserWarning",
        "torch 2.10's export says so of the file that it reads",
    ),
    (
        "ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning",
        "torch 2.6's inductor says so of its own settings",
    ),
)

hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=15, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


# What cuBLAS needs for deterministic results; read when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if EMULATED:
    DEVICES = [pytest.param("cpu", id="emulated", marks=pytest.mark.cuda)]
else:
    DEVICES = [pytest.param("cpu", id="cpu")]
HAS_DEVICE = torch.cuda.is_available() and not unusable()
if HAS_DEVICE and not EMULATED:
    DEVICES.append(pytest.param("cuda", id="cuda", marks=pytest.mark.cuda))
collect_ignore = [] if HAS_DEVICE else ["test_cuda_streams.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: runs CUDA kernels, on a device or emulated")
    config.addinivalue_line(
        "markers",
        "devices(double=True): runs on every device; without float64 there if not double",
    )
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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("devices"):
        metafunc.parametrize("device", DEVICES, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a device cannot do, so that it is neither passed nor skipped."""
    kept = [item for item in items if not item.get_closest_marker("cuda") or _can_run(item)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def _can_run(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("devices")
    if marker is None:
        return True
    values = item.callspec.params.values()  # type: ignore[attr-defined]
    return marker.kwargs.get("double", True) or torch.float64 not in list(values)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where tensors are made, for tests marked `devices` each of DEVICES in turn."""
    name = getattr(request, "param", "cpu")
    if name == "cpu":
        yield name
        return
    torch.set_default_device(name)
    yield name
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def fixed_surroundings(device: str) -> Iterator[None]:
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
