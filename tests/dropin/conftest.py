"""`fla`: a test that takes it runs with each real release of FLA installed."""

import pytest
from real_fla import VERSIONS, present


@pytest.fixture(params=VERSIONS)
def fla(request):
    """The module fla, of each release in turn."""
    with present(request.param, request.config.cache.mkdir("fla")) as module:
        yield module
