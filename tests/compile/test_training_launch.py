"""A training op to the driver: built, then both passes launched on the mock, in a process whose libcuda.so.1 it is."""

import os
import subprocess
import sys
from pathlib import Path

import mock_driver
import pytest

pytestmark = pytest.mark.nvcc
TESTS = Path(__file__).parents[1]
LAUNCH = f"""
import ctypes, sys
sys.path.insert(0, {str(TESTS)!r})
driver = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
driver.mock_log.restype = ctypes.c_char_p
driver.mock_capability(9, 0)
import torch, tvm_ffi
from kdagen import zoo
from kdagen.build.builder import build_cached
from kdagen.pipeline import compile_training
from kdagen.runtime import loader
from mock_driver.server import FakeTensor

def on_gpu(function, tensors):
    short = lambda t: str(t.dtype).removeprefix("torch.")
    function(*(tvm_ffi.from_dlpack(FakeTensor(list(t.shape), short(t))) for t in tensors))

loader.LoadedOp._run = staticmethod(on_gpu)
source = compile_training(zoo.get("retnet"), 64, schedule={{"segment": 2}})
op = loader.load_op(build_cached(source))
given = {{n: torch.zeros(2, 150, 3, 64, dtype=torch.bfloat16) for n in ("q", "k", "v")}} | {{"gamma": torch.ones(3)}}
made = op.launch(given)
kept = {{name: made[name] for name in op.kept}}
print(*(f"{{name}} {{tuple(x.shape)}} {{x.dtype}}" for name, x in kept.items()))
found = op.launch(given | kept, "backward")
print(*(f"{{name}} {{tuple(x.shape)}} {{x.dtype}}" for name, x in op.gradients(found).items()), sep=", ")
print(*(line for line in driver.mock_log().decode().splitlines() if line.startswith("cuLaunchKernel")), sep="\\n")
"""


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> list[str]:
    """What the process prints."""
    folder = tmp_path_factory.mktemp("mock")
    command = [sys.executable, "-c", LAUNCH, str(mock_driver.compile_mock(folder))]
    environment = {**os.environ, "KDAGEN_CACHE_DIR": str(folder / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_both_passes_launch_their_kernels_in_order(launches):
    kept, gradients, *launched = launches
    assert kept == "S_w (2, 3, 5, 64, 64) torch.bfloat16"  # 150 tokens are 5 chunks of 32, and 3 segments of 2
    vectors = [f"{name} (2, 150, 3, 64) torch.bfloat16" for name in "qkv"]
    assert gradients == ", ".join([*vectors, "gamma (3,) torch.float32"])
    names = [line.split()[1].removeprefix("retnet_").removesuffix("_kernel") for line in launched]
    assert names == ["prepare", "scan", "prepare", "reverse", "gradients"]
    grids = {name: line.split()[2] for name, line in zip(names, launched)}
    assert (grids["prepare"], grids["gradients"]) == ("grid=5,3,2", "grid=3,3,2")
