"""A process whose CUDA driver is a mock, and how tests talk to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def compile_mock(folder: Path) -> Path:
    """libcuda.so.1 from mock_cuda.c."""
    library = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-lpthread"]
    subprocess.run(["cc", str(HERE / "mock_cuda.c"), "-o", str(library), *flags], check=True)
    return library


def tensor(shape, dtype, **more) -> dict:
    """A tensor on a mock GPU; `more`: device, address, strides, device_type."""
    return {"shape": list(shape), "dtype": dtype, **more}


class MockProcess:
    """Calls launchers in a child process. With no mock, that process has whatever driver the machine has."""

    def __init__(self, mock: Path | None):
        command = [sys.executable, str(HERE / "server.py"), str(mock or "")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def call(self, library: Path, function: str, tensors: list, **more) -> dict:
        """{"errors": [...], "log": [driver calls]}; `more`: threads, fail=(call, code), capability=(major, minor),
        scalars=(first, count): the 32-bit parameters of the kernel to log at its launch.
        """
        request = {"library": str(library), "function": function, "tensors": tensors, **more}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=30)
