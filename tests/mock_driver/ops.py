"""Ops launched on the mock driver: a process whose libcuda.so.1 is the mock, CPU tensors handed on as if on a GPU.

`run(mock, code)` runs Python in such a process; in it, `driver_log()` gives what the driver was asked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PRELUDE = f"""
import ctypes, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
driver = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
driver.mock_log.restype = ctypes.c_char_p
driver.mock_capability(9, 0)
import torch, tvm_ffi
from kdagen.runtime import loader, op as ops
from mock_driver.server import FakeTensor

def fake(x):
    dtype = str(x.dtype).removeprefix("torch.")
    return tvm_ffi.from_dlpack(FakeTensor(list(x.shape), dtype))

def on_gpu(function, given):
    function(*(fake(x) if isinstance(x, torch.Tensor) else x for x in given))

def driver_log(call="cuLaunchKernel"):
    lines = [line for line in driver.mock_log().decode().splitlines() if line.startswith(call)]
    driver.mock_reset()
    return lines

def launched():
    return [" ".join(line.split()[1:3]).replace("_kernel", "") for line in driver_log()]

def bf16(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)

ops._capability = lambda device: "9.0"
loader.LoadedOp._run = staticmethod(on_gpu)
"""


def run(mock: Path, code: str, cwd: Path | None = None, **environment: str) -> list[str]:
    """The lines that `code` prints."""
    run = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(mock)],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()
