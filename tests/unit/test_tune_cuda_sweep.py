"""A sweep measured on a simulated GPU, from its compiled kernels to its finals: what needs no compiler."""

import hashlib
import json
from functools import partial

import packages
import pytest
import recordings
import simulated_gpu
import torch
from kdagen.autotune import cases
from kdagen.autotune.bench import Limits
from kdagen.autotune.check import cases as drawn
from kdagen.autotune.devices import cuda
from kdagen.autotune.measure import measure
from kdagen.autotune.progress import Silent
from kdagen.autotune.sweep import Candidate, Study, Task, Workload
from kdagen.autotune.worker import Server

from kdagen import zoo
from kdagen.pipeline import compile_decode
from kdagen.runtime import loader, manifest
from kdagen.simulate.run import _simulator
from kdagen.simulate.torch_arrays import to_numpy

TASK = Task("linear_attention", "decode", "sm90", "H100", (64, 64))
SHAPE = Workload.parse("2x1x1")
TILES = (64, 32, 16)  # value channels of a block: one each
VERSIONS = {"kdagen": "0.1.0", "tilelang": "0.1.15", "nvcc": "13.0"}


class Here:
    """A worker in this process."""

    device = "cuda:0"

    def __init__(self):
        self.server = Server(cuda.Device("0"), lambda candidate: None)
        self.server.device.name = "cpu"

    def ask(self, request, timeout, say=None):
        return json.loads(self.server.answer(request))

    def end(self):
        pass


@pytest.fixture
def sources():
    """By digest."""
    made = [compile_decode(zoo.get(TASK.op), 64, schedule={"v_tile": tile}) for tile in TILES]
    return {manifest.digest(source): source for source in made}


@pytest.fixture
def folder(tmp_path, sources):
    """As `kdagen tune compile` leaves it."""
    candidates = [Candidate.of(TASK, source.schedule) for source in sources.values()]
    folder = recordings.planned(tmp_path / "sweep", Study(TASK, (SHAPE,)), candidates=candidates)
    for candidate, source in zip(candidates, sources.values()):
        contents, library = packages.contents(source), f"{candidate.id}/kernel.so"
        (folder.kernels / candidate.id).mkdir(parents=True)
        (folder.kernels / library).write_text(candidate.id)
        files = {library: hashlib.sha256(candidate.id.encode()).hexdigest()}
        contents |= {"format": manifest.FORMAT, "files": files, "versions": VERSIONS}
        folder.candidates.mkdir(exist_ok=True)
        (folder.candidates / f"{candidate.id}.json").write_text(json.dumps(contents))
    return folder


@pytest.fixture
def gpu(monkeypatch, sources):
    """On which a kernel takes as many ms as its block has value channels, and the one of 16 is wrong."""
    simulated_gpu.install_device(monkeypatch)

    def launch(source, *tensors):
        (kernel,) = source.kernels
        _simulator(kernel, False)(*(to_numpy(x) if isinstance(x, torch.Tensor) else x for x in tensors))
        simulated_gpu.Event.now += source.schedule["v_tile"] - 1
        if source.schedule["v_tile"] == 16:
            dict(zip((p.name for p in kernel.params), tensors))["o_out"].mul_(1.1)

    def functions(kernels):
        source = sources[kernels.manifest["digest"]]
        return {source.kernels[0].name: partial(launch, source)}

    few = cases.forms("decode")[:1]
    monkeypatch.setattr(loader.LoadedOp, "functions", functions)
    monkeypatch.setattr("kdagen.autotune.check.forms", lambda purpose: few)
    drawn.cache_clear()
    yield
    drawn.cache_clear()


def test_right_candidates_are_timed_and_the_wrong_one_is_named(folder, gpu):
    limits = Limits(final_s=0.05)
    measure(folder, [], None, Silent(), [Here()], limits=limits, todo=recordings.todo)
    tiles = {x["candidate"]: x["schedule"]["v_tile"] for x in folder.log if "schedule" in x}
    lines = {(x["rung"], tiles[x["candidate"]]): x for x in folder.log}
    wrong, right, final = lines["correct", 16], lines["correct", 64], lines["final", 32]
    assert wrong["verdict"] == "failed" and wrong["reason"].startswith("out is off by 1.0e-01")
    assert right["verdict"] == "kept" and right["errors"]["out"][0] < 5e-3
    assert [lines["screen", tile]["ms"] for tile in (64, 32)] == [64, 32] and ("screen", 16) not in lines
    assert final["median"] == 32
    assert final["state"]["before"]["throttling"] == ["power cap", "software thermal slowdown"]
    under = final["under"]
    assert (under["device"], under["processors"], under["policy"]) == ("NVIDIA H100 80GB HBM3", 132, "device cold")
    assert VERSIONS.items() <= under["versions"].items() and under["versions"]["driver"] == "580.65"
