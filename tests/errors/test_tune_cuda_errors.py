"""What a GPU as a device of the tuner says where there is none, or not so many."""

import pytest
import torch
from kdagen.autotune import launches
from kdagen.autotune.devices import open_device

from kdagen.errors import ArgumentError
from kdagen.runtime.loader import LoadedOp


@pytest.mark.parametrize("count,seen", [(0, "no GPU"), (1, "cuda:0"), (3, "cuda:0 to cuda:2")])
def test_no_such_gpu(monkeypatch, count, seen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ArgumentError) as error:
        open_device("cuda:3")
    assert str(error.value) == (
        f"device 'cuda:3': torch {torch.__version__} sees {seen} here: choose that, or --device cpu"
    )


def test_tensors_that_the_only_kernels_do_not_take():
    kernels = LoadedOp(None, {"target": {"runs_on": ["9.0"]}, "plan": {"name": "kda"}})
    with pytest.raises(ArgumentError) as error:
        launches.Only(kernels).fitting({}, "8.0")
    assert str(error.value) == (
        "kda: for compute capability 9.0, the GPU has 8.0: expected tensors that these kernels take"
    )
