"""The op's CUDA path to the driver: kernels built just in time, found again without a compiler, launched on the mock.

Runs in processes of its own, whose libcuda.so.1 is the mock; CPU tensors are handed to the launchers as if on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import mock_driver
import pytest

pytestmark = pytest.mark.nvcc
TESTS = Path(__file__).parents[1]
CALL = f"""
import ctypes, logging, sys
sys.path.insert(0, {str(TESTS)!r})
driver = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
driver.mock_log.restype = ctypes.c_char_p
driver.mock_capability(9, 0)
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO, stream=sys.stdout)
import torch, tvm_ffi
import kdagen as kg
from kdagen.runtime import loader, op as ops
from mock_driver.server import FakeTensor

def on_gpu(function, tensors):
    short = lambda t: str(t.dtype).removeprefix("torch.")
    function(*(tvm_ffi.from_dlpack(FakeTensor(list(t.shape), short(t))) for t in tensors))

ops._capability = lambda device: "9.0"
loader.LoadedOp._run = staticmethod(on_gpu)
op = kg.compile("linear_attention", head_dim=64)
given = [torch.zeros(2, 37, 3, 64, dtype=torch.bfloat16) for _ in range(3)]
o, state = op._cuda(*given, output_final_state=True)
print(tuple(o.shape), o.dtype, tuple(state.shape), state.dtype)
print(*(line for line in driver.mock_log().decode().splitlines() if line.startswith("cuLaunchKernel")), sep="\\n")
"""


@pytest.fixture(scope="module")
def mock(tmp_path_factory):
    return mock_driver.compile_mock(tmp_path_factory.mktemp("mock"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def call(mock, cache, cwd, **environment) -> list[str]:
    environment = {**os.environ, "KDAGEN_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-c", CALL, str(mock)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def launched(lines: list[str]) -> list[str]:
    """The kernels and grids that the driver was asked for, after a look at the results."""
    results, *launches = lines
    assert results == "(2, 37, 3, 64) torch.bfloat16 (2, 3, 64, 64) torch.float32"
    return [" ".join(line.split()[1:3]) for line in launches]


def test_kernels_are_built_just_in_time_then_found_without_a_compiler(mock, cache, tmp_path):
    before, after, ran, *rest = call(mock, cache, tmp_path)
    assert before.startswith("WARNING linear_attention for sm90-bf16-64x64: not built yet")
    assert after.startswith("INFO linear_attention for sm90-bf16-64x64: compiled in ")
    assert ran.startswith(f"INFO linear_attention: bfloat16 tensors on cpu: kernels in {cache / 'ops'}")
    prepare, scan = launched(rest)
    assert prepare.startswith("linear_attention_prepare_kernel grid=2,3,2")  # 37 tokens in chunks of 32
    assert scan.startswith("linear_attention_scan_kernel grid=")
    again, *rest = call(mock, cache, tmp_path, PATH="", CUDA_HOME="")
    assert again == ran
    assert launched(rest) == [prepare, scan]
