"""A GPU that is none: built ops whose kernels run as programs on the CPU, for tests of what is meant for a GPU.

`install(patch)` changes torch and kdagen for as long as `patch`, pytest's monkeypatch, lasts.
"""

from __future__ import annotations

import torch

from kdagen.runtime import loader
from kdagen.simulate.run import _simulator
from kdagen.simulate.torch_arrays import to_numpy
from kdagen.simulate.verify import built_source


def functions(kernels: loader.LoadedOp) -> dict:
    """A launcher of each kernel by name."""

    def launcher(kernel):
        return lambda *tensors: _simulator(kernel, False)(*map(to_numpy, tensors))

    return {kernel.name: launcher(kernel) for kernel in built_source(kernels.folder).kernels}


def install(patch) -> None:
    """Kernels of built folders run as programs; torch says that there is a GPU of compute capability 9.0."""
    patch.setattr(loader.LoadedOp, "functions", functions)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
