"""The package that a build leaves: the op in it is called like the one that `kdagen.compile` returns."""

import importlib
import subprocess
import sys

import packages
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.pipeline import compile_op
from kdagen.runtime import loader
from kdagen.runtime import op as ops

SHAPE = (2, 37, 3, 16, 24)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A package made_ops with the zoo's deltaproduct, for sm80 and sm90."""
    folder = tmp_path_factory.mktemp("out")
    for arch in ("sm80", "sm90"):
        packages.write(folder / "made_ops", compile_op(kg.load("deltaproduct"), (64, 64), arch=arch), folder)
    return folder


@pytest.fixture
def built(place, monkeypatch):
    """`from made_ops import deltaproduct`."""
    monkeypatch.syspath_prepend(place)
    yield importlib.import_module("made_ops").deltaproduct
    del sys.modules["made_ops"]


def inputs(dtype=torch.float32) -> dict:
    return {n: x.to(dtype) for n, x in kg.zoo.sample(canonical(kg.load("deltaproduct")), SHAPE).items()}


def test_it_runs_on_cpu_tensors_as_the_compiled_op_does(built):
    given, compiled = inputs(), kg.compile("deltaproduct")
    q, k_1, k_2, v_1, v_2, beta_1, beta_2, g = given.values()
    for found, expected in zip(built(**given, output_final_state=True), compiled(**given, output_final_state=True)):
        assert torch.equal(found, expected)
    assert torch.equal(built(q, [k_1, k_2], [v_1, v_2], [beta_1, beta_2], g)[0], compiled(**given)[0])


def test_it_is_a_torch_op(built):
    given = inputs()
    layer = torch.compile(lambda **tensors: built(**tensors)[0] * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(layer(**given), built(**given)[0] * 2)


def test_on_a_gpu_it_launches_the_kernels_for_that_gpu(built, monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "_capability", lambda device: "8.0")
    names = ("deltaproduct_index", "deltaproduct_prepare", "deltaproduct_scan")
    monkeypatch.setattr(loader.LoadedOp, "functions", lambda self: dict.fromkeys(names))
    monkeypatch.setattr(loader.LoadedOp, "_run", lambda self, function, arguments: calls.append(self.folder.name))
    with FakeTensorMode():
        drawn = kg.zoo.sample(canonical(kg.load("deltaproduct")), (*SHAPE[:3], 64, 64)).values()
        o, *_ = built.load()._cuda(*(torch.empty(x.shape, dtype=torch.bfloat16, device="cuda") for x in drawn))
    assert tuple(o.shape) == (2, 37, 3, 64)
    assert calls == ["sm80-bf16-64x64"] * 3


def test_explain_lists_every_folder(built):
    text = " ".join(built.explain().split())
    assert text.startswith("deltaproduct(q, k, v, beta, g): torch.ops.kdagen.deltaproduct")
    for arch in ("sm80 (A100)", "sm90 (H100, H200)"):
        assert f"CUDA tensors kernels for {arch}, bfloat16, K = 64, V = 64" in text
    assert "(this package)" in text


def test_it_runs_where_torch_is_imported_after_it(place):
    code = (
        "import sys; from made_ops import deltaproduct as op; assert 'torch' not in sys.modules; import torch\n"
        "x, s = torch.ones(1, 5, 1, 8), torch.zeros(1, 5, 1)\n"
        "print(op(x, [x, x], [x, x], [s, s], s)[0].abs().sum().item())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place)
    assert run.stdout == "0.0\n", run.stderr
