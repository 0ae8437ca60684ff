"""Messages of spreading a sweep over Ray that need no cluster; the others are in tests/unit/test_tune_distribute.py."""

import re
import sys

import pytest
import toy
from kdagen.autotune import distribute

from kdagen.build import builder
from kdagen.build.kernel import job_of
from kdagen.errors import ArgumentError, ToolchainError

JOB = job_of(toy.toy().kernels[0], toy.toy())


def test_ray_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ToolchainError, match=re.escape("Ray is not installed: pip install 'kdagen[ray]'")):
        distribute.connect(None)


def test_no_cluster_answers(monkeypatch):
    import ray

    def nobody(address, **options):
        raise ConnectionError(f"could not find any running Ray instance at {address}\nand so on")

    monkeypatch.setattr(ray, "init", nobody)
    message = (
        "--ray 10.0.0.9:6379: no cluster of Ray answers (could not find any running Ray instance at 10.0.0.9:6379): "
        "expected the address of one, such as auto or 10.0.0.1:6379, or none to start one here"
    )
    with pytest.raises(ArgumentError, match=re.escape(message)):
        distribute.connect("10.0.0.9:6379")


def test_a_host_whose_python_lacks_kdagen(monkeypatch):
    monkeypatch.setattr(distribute, "_has", lambda: {"CPU": 2.0})
    error = RuntimeError("the actor failed\n\nModuleNotFoundError: No module named 'kdagen'\n")
    assert distribute._no_start("compiler", error) == (
        "no compiler starts on the Ray cluster: ModuleNotFoundError: No module named 'kdagen': expected a free host, "
        "whose Ray runs a Python with the same kdagen in it; it has {'CPU': 2.0} in all"
    )


def test_a_host_that_compiles_otherwise(monkeypatch):
    monkeypatch.setattr(builder, "job_key", lambda job: "that of another nvcc")
    stages, files, error = distribute.Compiler().run("key", JOB, None)
    assert (stages, files, error.death) == ([], {}, "start")
    fix = "expected the same kdagen, TileLang and nvcc on all hosts of the Ray cluster"
    assert str(error).endswith(f"compiles otherwise than the host that asks: {fix}")


def test_deaths_travel():
    import pickle

    from kdagen.build.toolchain import Died

    found = pickle.loads(pickle.dumps(Died("it hangs", "hang")))
    assert (type(found), str(found), found.death) == (Died, "it hangs", "hang")
