# SPDX-License-Identifier: Apache-2.0
"""The operators for programs without Python (LATTE_TORCH_STABLE), where this build has them.

Every test runs in a process of its own, since an operator has one definer per process.
"""

import subprocess
import sys
from pathlib import Path

import latte_ext
import pytest
import torch
from latte_ext import _core

LIBRARY = Path(_core.__file__).parent / "_torch.so"
EXAMPLE = Path(__file__).parents[2] / "examples" / "aoti"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LIBRARY.is_file(), reason="built without LATTE_TORCH_STABLE"),
]


def python(code: str, *args: object) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


SCHEMAS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
for name in ("latent_attention", "latent_attention_step"):
    print(getattr(torch.ops.latte_ext, name).default._schema)
"""


@pytest.mark.supports("without Python: C++ operators", "latent_attention")
def test_schemas_are_those_of_the_package() -> None:
    names = ("latent_attention", "latent_attention_step")
    want = [str(getattr(torch.ops.latte_ext, name).default._schema) for name in names]
    assert python(SCHEMAS, LIBRARY).splitlines() == want


VALUES = """
import sys, torch
torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
inputs, want = torch.load(sys.argv[2])
got = torch.ops.latte_ext.latent_attention(*inputs)
assert all(map(torch.equal, got, want))
q, k, v, *_ = inputs
y = torch.ops.latte_ext.latent_attention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], *got[1:], 1.0)
assert torch.isfinite(y).all() and not torch.equal(got[3], want[3])
try:
    torch.ops.latte_ext.latent_attention(q, k[..., :2], *inputs[2:])
except RuntimeError as error:
    assert "[latent_attention] k has shape" in str(error), error
else:
    raise AssertionError("a wrong shape was taken")
if "latte_ext" in sys.argv:
    # The package takes what is defined and adds derivatives.
    import latte_ext
    x = torch.randn(1, 1, 5, 3, requires_grad=True)
    latte_ext.latent_attention(x, x, x).sum().backward()
    assert x.grad is not None
print("equal")
"""


@pytest.mark.parametrize("then", ["alone", "latte_ext"])
def test_values_are_those_of_the_package(then: str, tmp_path: Path) -> None:
    q, k, v = torch.randn(2, 4, 70, 3), torch.randn(2, 2, 70, 3), torch.randn(2, 2, 70, 5)
    state = latte_ext.LatentState.empty(2, 2, 3, 5)
    inputs = (q, k, v, None, None, *state, True, 0.5)
    torch.set_num_threads(1)
    torch.save((inputs, torch.ops.latte_ext.latent_attention(*inputs)), tmp_path / "call.pt")
    assert "equal" in python(VALUES, LIBRARY, tmp_path / "call.pt", then)


class Model(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = latte_ext.latent_attention(x, x.sin(), x.cos(), return_state=True)
        row = x[:, :, 0]
        return y, latte_ext.latent_attention_step(row, row.sin(), row.cos(), state)


@pytest.mark.supports("AOTInductor package in C++ without Python", "latent_attention")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # of torch's own code
def test_aoti_package_without_python(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 2 * 2 * 9 * 4).reshape(2, 2, 9, 4)
    torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        program = torch.export.export(Model(), (x,))
        want = [y.sum().item() for y in Model()(x)]
    package = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", EXAMPLE, "-B", build, "-DCMAKE_BUILD_TYPE=Release",
         f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"],
        ["cmake", "--build", build],
    ):  # fmt: skip
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
    run = subprocess.run(
        [build / "run_package", LIBRARY, package], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    got = [float(line) for line in run.stdout.splitlines()]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-5)
