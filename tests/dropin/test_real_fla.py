"""The releases of FLA that tests load leave nothing behind."""

import importlib.util
import sys

import no_triton
import pytest
import torch
from real_fla import VERSIONS, present


@pytest.mark.parametrize("version", VERSIONS)
def test_gone_after_a_test(request, version):
    with present(version, request.config.cache.mkdir("fla")) as fla:
        assert fla.__version__ == version
        assert "triton" in sys.modules
    assert not [name for name in sys.modules if name.split(".")[0] in ("fla", "triton")]
    assert importlib.util.find_spec("fla") is None
    assert no_triton.Finder not in sys.meta_path


def test_torch_has_not_taken_hold_of_a_triton_that_does_nothing(request):
    for version in VERSIONS:
        with present(version, request.config.cache.mkdir("fla")):
            pass
    kinds = no_triton.Anything, no_triton.Base
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "torch"]
    assert not [
        (module.__name__, name)
        for module in modules
        for name, value in vars(module).items()
        if type(value) in kinds or any(value is kind for kind in kinds)
    ]
    assert torch.compile(lambda x: x.sin().cos())(torch.ones(8)).shape == (8,)
