"""A GPU as a device of the tuner: built ops as candidates, checked and timed in every way."""

import math

import pytest
import torch
from built_ops import decoding, trained, variants
from kdagen.autotune.devices import Compiled
from kdagen.autotune.devices.cuda import Device
from kdagen.autotune.sweep import CACHES, MODES, Candidate, Policy, Task, Workload

pytestmark = pytest.mark.gpu
BUILT = {"inference": variants, "training": trained, "decode": decoding}
NAMES = ("kda", "gated_deltanet")
CALLS = 5
WORKLOADS = {
    "inference": ("1x2048x4", "300+0+1:2/4"),
    "training": ("1x1024x2", "300+0+1:2/4"),
    "decode": ("8x1x4",),
}


@pytest.fixture(scope="module")
def device():
    return Device("0")


def contender(name: str, purpose: str) -> tuple[Candidate, Compiled]:
    """The first kernels of an op that were built."""
    kernels = BUILT[purpose](name)[0]
    plan = kernels.plan
    head_dim = plan["dims"]["K"], plan["dims"]["V"]
    task = Task(name, purpose, plan["target"], "H100", head_dim, plan["dtype"], state=kernels.state)
    return Candidate.of(task, plan["schedule"]), Compiled(kernels.folder, kernels.manifest)


def sampler(device, made: tuple, workload: str, policy: str):
    return device.samplers([made], Workload.parse(workload), Policy.parse(policy))[made[0].id]


def test_facts_and_state(device):
    facts, state = device.facts(), device.state()
    assert facts["device"] == torch.cuda.get_device_name(0) and facts["processors"] > 0 and facts["target"]
    assert {"torch", "cuda", "apache-tvm-ffi", "driver"} <= facts["versions"].keys()
    assert state["clocks"]["sm"] > 0 and isinstance(state["throttling"], list)


@pytest.mark.parametrize("purpose", BUILT)
@pytest.mark.parametrize("name", NAMES)
def test_built_ops_are_right(device, name, purpose):
    found = device.check(*contender(name, purpose))
    assert found["ok"], found["reason"]


@pytest.mark.parametrize("purpose", BUILT)
def test_one_that_is_off_is_not(device, purpose, monkeypatch):
    made = contender(NAMES[-1], purpose)  # whose oracle is at hand still
    kernels = device._kernels(made[1])
    run, out = kernels.launch, kernels.by_role["out"]

    def off(tensors, which="forward", *rest):
        results = run(tensors, which, *rest)
        if which != "backward":
            results[out].mul_(1.05)
        return results

    monkeypatch.setattr(kernels, "launch", off)
    assert device.check(*made)["reason"].startswith("out is off by")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("purpose", BUILT)
def test_every_policy_times(device, purpose, mode, cache):
    for workload in WORKLOADS[purpose]:
        sample = sampler(device, contender("kda", purpose), workload, f"{mode} {cache}")
        times = [sample() for _ in range(CALLS)]
        assert all(0 < t < 1e3 and math.isfinite(t) for t in times), times


def test_what_does_not_fit_is_refused_and_leaves_the_device_usable(device):
    made = contender("kda", "inference")
    with pytest.raises(torch.OutOfMemoryError):
        sampler(device, made, "64x65536x128", "device cold")
    assert sampler(device, made, "1x256x2", "device cold")() > 0
