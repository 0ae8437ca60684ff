"""`fla`: a test that takes it runs with each real release of FLA installed. All run on one thread."""

import pytest
import torch
from real_fla import VERSIONS, present


@pytest.fixture(params=VERSIONS)
def fla(request):
    """The module fla, of each release in turn."""
    with present(request.param, request.config.cache.mkdir("fla")) as module:
        yield module


@pytest.fixture(autouse=True)
def one_thread():
    """The references are loops over small tensors: on a busy machine their threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
