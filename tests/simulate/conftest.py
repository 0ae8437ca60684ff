"""Simulated blocks and token-by-token references are small: threads only get in each other's way."""

import os

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when numpy loads


@pytest.fixture(autouse=True, scope="package")
def one_torch_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
