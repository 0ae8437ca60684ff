"""A GPU as a device of the tuner, on fakes of torch's events and graphs: what it says, checks, calls and rotates."""

import subprocess

import packages
import pytest
import simulated_gpu
import torch
from kdagen.autotune import cases
from kdagen.autotune.check import cases as drawn
from kdagen.autotune.devices import Compiled, clock, open_device
from kdagen.autotune.sweep import Candidate, Policy, Task, Workload

from kdagen import zoo
from kdagen.errors import ArtefactError
from kdagen.pipeline import compile_decode, compile_op, compile_training
from kdagen.runtime import loader

MAKE = {"inference": compile_op, "training": compile_training, "decode": compile_decode}


@pytest.fixture
def gpu(monkeypatch):
    """torch says that there is a GPU, whose kernels run on the CPU."""
    simulated_gpu.install_device(monkeypatch)
    device = open_device("cuda:0")
    device.name = "cpu"  # where its tensors are
    return device


def task_of(purpose: str) -> Task:
    return Task("linear_attention", purpose, "sm90", "H100", (64, 64))


@pytest.fixture(scope="module")
def contender(tmp_path_factory):
    """A candidate of a purpose, as a folder of a sweep has it."""
    place = tmp_path_factory.mktemp("built")

    def made(purpose: str, **schedule):
        task = task_of(purpose)
        source = MAKE[purpose](zoo.get(task.op), 64, schedule=schedule)
        folder = packages.write(place / f"{purpose}{len(schedule)}", source, place)
        return Candidate.of(task, source.schedule), Compiled(folder, loader.load_op(folder).manifest)

    return made


def test_facts_and_state(gpu):
    facts = gpu.facts()
    assert facts["device"] == "NVIDIA H100 80GB HBM3" and facts["processors"] == 132 and facts["target"] == "sm90"
    assert facts["l2_bytes"] == 1 << 20
    assert facts["versions"]["driver"] == "580.65" and facts["versions"]["torch"] == torch.__version__
    assert {"apache-tvm-ffi"} < facts["versions"].keys()
    assert gpu.state() == {
        "clocks": {"sm": 1980.0, "mem": 2619.0},
        "temperature": 34.0,
        "throttling": ["power cap", "software thermal slowdown"],
    }


def test_a_machine_without_nvidia_smi(gpu, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert gpu.state() == {} and "driver" not in gpu.facts()["versions"]


@pytest.mark.parametrize("purpose", MAKE)
def test_candidates_are_checked(gpu, contender, monkeypatch, purpose):
    monkeypatch.setattr(cases, "SHORT", (1, 0, 17))
    few = cases.forms(purpose)[1::3]
    monkeypatch.setattr("kdagen.autotune.check.forms", lambda purpose: few)
    drawn.cache_clear()
    found = gpu.check(*contender(purpose))
    assert found["ok"] and found["errors"]["out"][0] > 0
    which = "decode" if purpose == "decode" else "forward"
    simulated_gpu.tampered(monkeypatch, which, lambda t: t["o_out"].mul_(1.1))
    assert "out is off" in gpu.check(*contender(purpose))["reason"]
    drawn.cache_clear()


def test_libraries_are_what_the_manifest_says(gpu, contender):
    candidate, compiled = contender("inference", chunk_size=64)
    (compiled.kernels / "linear_attention_scan.so").write_text("half of it")
    with pytest.raises(ArtefactError, match="linear_attention_scan.so is corrupt"):
        gpu.check(candidate, compiled)


@pytest.fixture
def launched(monkeypatch):
    """Names and tensors of all launches, which compute nothing."""
    made = []

    def functions(kernels):
        def launcher(name):
            def launch(*tensors):
                step = lambda: made.append((name, tensors))  # noqa: E731
                return simulated_gpu._capturing[-1].steps.append(step) if simulated_gpu._capturing else step()

            return launch

        return {k["name"]: launcher(k["name"]) for k in kernels.plan["kernels"]}

    monkeypatch.setattr(loader.LoadedOp, "functions", functions)
    return made


def values_of(launched: list) -> list[int]:
    """Where the first tensor of each scan lies, one for each call."""
    return [tensors[0].data_ptr() for kernel, tensors in launched if kernel.endswith("scan")]


def sampled(gpu, contender, workload: str, policy: str, purpose: str = "inference", **schedule):
    candidate, compiled = contender(purpose, **schedule)
    return gpu.samplers([(candidate, compiled)], Workload.parse(workload), Policy.parse(policy))[candidate.id]


@pytest.mark.parametrize("mode", ["device", "graph"])
def test_cold_calls_take_sets_in_turn(gpu, contender, launched, mode):
    """A set has 1.05 MB: four of them hold the cache three times, and one more."""
    sample = sampled(gpu, contender, "1x512x4", f"{mode} cold")
    assert len(gpu._inputs.sets) == 4
    launched.clear()
    assert [sample() for _ in range(8)] == [1] * 8
    places = values_of(launched)
    assert len(places) == 8 and len(set(places)) == 4 and places[:4] == places[4:]


def test_warm_calls_follow_the_same_call(gpu, contender, launched):
    sample = sampled(gpu, contender, "1x512x4", "graph warm")
    assert len(gpu._inputs.sets) == 1
    launched.clear()
    assert sample() == 1 and len(values_of(launched)) == 2


def test_small_sets_are_cold_because_something_else_fills_the_cache(gpu, contender, launched, monkeypatch):
    cleared = []
    monkeypatch.setattr(gpu, "clear_cache", lambda: cleared.append(1))
    sample = sampled(gpu, contender, "1x32x1", "device cold")
    assert len(gpu._inputs.sets) == clock.MOST_SETS
    cleared.clear()
    sample()
    assert cleared == [1]
    sampled(gpu, contender, "1x512x4", "device cold")()
    sampled(gpu, contender, "1x32x1", "device warm")()
    assert cleared == [1]


def test_what_clears_the_cache_is_larger_than_it(gpu):
    gpu.clear_cache()
    assert gpu._other.nbytes == clock.COLD << 20 and not gpu._other.any()


def test_contenders_share_inputs_and_turns(gpu, contender, launched):
    first = sampled(gpu, contender, "1x512x4", "device cold")
    inputs = gpu._inputs
    second = sampled(gpu, contender, "1x512x4", "device cold", chunk_size=16)
    assert gpu._inputs is inputs
    before = next(inputs.turn)
    first(), second(), first()
    assert next(inputs.turn) == before + 4
    sampled(gpu, contender, "1x256x4", "device cold")
    assert gpu._inputs is not inputs


def test_a_graph_is_captured_for_each_set(gpu, contender, launched, monkeypatch):
    captured = []
    graph = torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: captured.append(graph()) or captured[-1])
    sampled(gpu, contender, "1x512x4", "graph cold")
    assert len(captured) == 4 and all(len(g.steps) >= 3 for g in captured)


@pytest.mark.parametrize("mode", ["device", "graph"])
def test_training_is_forward_and_backward(gpu, contender, launched, mode):
    sample = sampled(gpu, contender, "1x64x1", f"{mode} warm", "training")
    launched.clear()
    sample()
    kernels = [name.removeprefix("linear_attention_") for name, _ in launched]
    once = kernels[: len(kernels) // 2]
    assert kernels == 2 * once and once.count("index") == 2 and once[-1] == "gradients"


@pytest.mark.parametrize("mode", ["device", "graph", "eager"])
@pytest.mark.parametrize("workload", ["1x20x2", "13+0+7:1/2"])
@pytest.mark.parametrize("purpose", MAKE)
def test_what_is_timed_computes(gpu, contender, monkeypatch, purpose, workload, mode):
    """Every mode, on executed programs: results that are finite and not zero, ragged batches and grouped heads too."""
    if mode == "eager":
        by_kernels(monkeypatch)
    results, run = [], clock.sampler
    monkeypatch.setattr(
        clock, "sampler", lambda call, sets, *rest: results.append((call, sets)) or run(call, sets, *rest)
    )
    workload = workload.replace("20", "1") if purpose == "decode" else workload
    assert sampled(gpu, contender, workload, f"{mode} warm", purpose)() > 0
    ((call, sets),) = results
    made = call(sets[0])
    tensors = [made] if torch.is_tensor(made) else [*made] if mode == "eager" else [*sets[0].values()]
    found = [x for x in tensors if torch.is_tensor(x) and x.dtype == torch.bfloat16]
    assert found and all(x.isfinite().all() for x in found) and any(x.any() for x in found)


def by_kernels(monkeypatch) -> None:
    """Ops on CPU tensors run their kernels, as on a GPU."""
    from kdagen.runtime.decode import Decoding
    from kdagen.runtime.op import Op
    from kdagen.runtime.training import Training

    monkeypatch.setattr(Op, "_cpu", Op._cuda)
    monkeypatch.setattr(Decoding, "_cpu", Decoding._cuda)
    monkeypatch.setattr(Training, "_cpu", Training._cuda)
    monkeypatch.setattr(Training, "_cpu_backward", Training._cuda_backward)


def test_a_shape_that_does_not_fit(gpu, contender, launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 1 << 40))
    with pytest.raises(torch.OutOfMemoryError, match="1x8192x64: .* GB more are needed, 0.0 GB are free"):
        sampled(gpu, contender, "1x8192x64", "device cold")
