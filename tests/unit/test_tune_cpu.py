"""The CPU as a device of the tuner: its space, what it says of itself, checks and times, and a whole sweep, tiny."""

import itertools
import json

import pytest
import torch
from kdagen.autotune import select
from kdagen.autotune.bench import Limits
from kdagen.autotune.devices import cpu, open_device
from kdagen.autotune.folder import Folder
from kdagen.autotune.pool import Worker
from kdagen.autotune.progress import Silent
from kdagen.autotune.space import cpu as space
from kdagen.autotune.space import space_of
from kdagen.autotune.sweep import Candidate, Policy, Study, Sweep, Task, Workload
from kdagen.autotune.tune import tune
from kdagen.autotune.worker import contender_fields

import kdagen as kg
from kdagen.runtime import tuned
from kdagen.runtime.cpu_schedule import schedule_of
from kdagen.schedule import CpuSchedule

PURPOSES = ("inference", "training", "decode")
OTHER = CpuSchedule(rows=16, span=2)
COLD = Policy("eager", "cold")


def task(purpose="inference", op="kda", **options) -> Task:
    return Task(op, purpose, "cpu", "cpu", (16, 16), **{"dtype": "float32", **options})


@pytest.fixture(scope="module")
def device():
    return open_device("cpu")


@pytest.fixture
def small_cache(monkeypatch):
    """Quick to clear."""
    monkeypatch.setattr(cpu, "cache_bytes", lambda: 1 << 12)


# -- the space


@pytest.mark.parametrize("purpose", PURPOSES)
def test_threads_are_fewer_than_cores(purpose, monkeypatch):
    monkeypatch.setattr(space, "this_cpu", lambda: ("A made-up CPU", 6))
    survey = space.space(task(purpose)).survey()
    assert {s.threads for s in survey.legal} == {0, 1, 2, 4} and survey.legal[0] == CpuSchedule()
    assert survey.removed == {"cores": survey.size * 5 // 9} and survey.size == len(set(survey.legal)) * 9 // 4
    assert survey.rejected[0].reason == "8 threads are all of 6 cores, or more: 0 stands for all"


def test_decoding_has_threads_alone():
    assert [axis.field for axis in space_of(task("decode")).axes] == ["threads"]
    assert [axis.field for axis in space_of(task("training")).axes] == ["rows", "span", "threads"]


# -- what it says of itself


def test_facts_are_plain_and_those_that_a_call_is_looked_up_by(device):
    facts = device.facts()
    assert json.loads(json.dumps(facts)) == facts and (facts["target"], facts["compiled"]) == ("cpu", False)
    assert (facts["device"], facts["processors"]) == tuned.this_cpu()
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["threads"] == torch.get_num_threads()


def test_the_hash_of_kernels_is_that_of_their_text(device, monkeypatch):
    found = {device.facts()["kernels"]}
    for sources in itertools.combinations(cpu.SOURCES, len(cpu.SOURCES) - 1):  # none of them names no file
        cpu.kernels.cache_clear()
        monkeypatch.setattr(cpu, "SOURCES", sources)
        found.add(device.facts()["kernels"])
    monkeypatch.undo()
    cpu.kernels.cache_clear()
    assert len(found) == 1 + len(cpu.SOURCES)


def test_what_the_kernel_does_not_tell_is_left_out(device, monkeypatch):
    assert json.loads(json.dumps(device.state())) and set(device.state()) <= {"clocks", "load", "throttling"}
    monkeypatch.setattr(cpu, "_text", lambda path: "")
    assert set(device.state()) <= {"load", "throttling"} and cpu.cache_bytes() == cpu.CACHE_BYTES


def test_work_of_others_is_a_reason_for_being_slow(device, monkeypatch):
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: 4)
    for load, reasons in ((4.9, []), (5.5, ["a load of 6 on 4 cores"])):
        monkeypatch.setattr(cpu.os, "getloadavg", lambda: (load, 0.0, 0.0))  # noqa: B023
        state = device.state()
        assert (state["load"], state["throttling"]) == (load, reasons)


# -- right before fast


@pytest.mark.parametrize("purpose, dtype", [*((p, "float32") for p in PURPOSES), ("inference", "bfloat16")])
def test_results_are_the_oracle_s(device, purpose, dtype):
    found = device.check(Candidate(task(purpose, dtype=dtype), OTHER))
    assert found["ok"], found["reason"]
    assert all(error <= most for error, most in found["errors"].values())
    gradients = {"d_q", "d_initial_state"} if purpose == "training" else set()
    assert {"out", "state_pool" if purpose == "decode" else "final_state", *gradients} <= set(found["errors"])


def test_a_wrong_backend_is_found_out(device, monkeypatch):
    run = kg.runtime.cpu.Forward.run
    monkeypatch.setattr(kg.runtime.cpu.Forward, "run", lambda *given: (1.001 * (r := run(*given))[0], *r[1:]))
    found = device.check(Candidate(task(), OTHER))
    assert not found["ok"] and found["reason"].startswith("out is off by 1.0e-03, expected at most 1.0e-05")


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_candidate_runs_by_its_own_schedule(device, purpose, monkeypatch, small_cache):
    monkeypatch.setattr(tuned, "cpu_schedule", lambda *given: pytest.fail("looked up"))
    seen = set()
    for module in ("op", "decode", "training"):
        found = lambda *given: seen.add(schedule_of(*given)) or schedule_of(*given)  # noqa: E731
        monkeypatch.setattr(f"kdagen.runtime.{module}.schedule_of", found)
    candidate = Candidate(task(purpose), OTHER)
    device.samplers([(candidate, None)], Workload.parse("2x1x2"), COLD)[candidate.id]()
    assert seen == {OTHER}


# -- times


@pytest.mark.parametrize("shape", ["2x3x2", "1x40x2/4", "17+1+30:2"])
@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_sampler_makes_a_call_of_the_shape(device, purpose, shape, small_cache, monkeypatch):
    workload, calls = Workload.parse(shape), []
    plain = cpu.CALLS[purpose]
    monkeypatch.setitem(cpu.CALLS, purpose, lambda op, case: calls.append(case) or plain(op, case))
    candidates = [Candidate(task(purpose), s) for s in (CpuSchedule(), OTHER)]
    samplers = device.samplers([(c, None) for c in candidates], workload, COLD)
    assert all(samplers[c.id]() > 0 for c in candidates) and len(calls) == 2 * (cpu.WARM + 1)
    case = calls[0]
    assert case.arguments["k"].shape[:3] == (workload.batch, workload.tokens, workload.heads)
    assert case.arguments["v"].shape[2] == workload.value_heads and case.arguments["v"].dtype == torch.float32
    assert (case.cu_seqlens is not None) == bool(workload.lengths)
    assert calls[cpu.WARM] is case if purpose != "decode" else case.state_pool is calls[-1].state_pool


def test_states_of_decoding_stay_as_in_use(device, small_cache):
    """Numbers that are hardly any make a CPU slow."""
    candidate = Candidate(task("decode"), CpuSchedule())
    sample = device.samplers([(candidate, None)], Workload.parse("1x1x2"), COLD)[candidate.id]
    pool = device._inputs(candidate.task, Workload.parse("1x1x2"))[0].state_pool
    for _ in range(600):
        sample()
    assert 1e-3 < pool.abs().mean() < 1e3 and (pool.abs() < 1e-30).sum() == 0


def test_a_cold_cache_is_cleared_before_each_call_and_a_warm_one_never(device, monkeypatch):
    cleared, candidate = [], Candidate(task(), CpuSchedule())
    monkeypatch.setattr(cpu, "evictor", lambda: lambda: cleared.append(1))
    for cache, count in (("cold", cpu.WARM + 3), ("warm", 0)):
        sample = device.samplers([(candidate, None)], Workload.parse("1x4x1"), Policy("eager", cache))[candidate.id]
        for _ in range(3):
            sample()
        assert len(cleared) == count
        cleared.clear()


def test_more_is_written_than_the_last_cache_holds(monkeypatch):
    monkeypatch.setattr(cpu, "cache_bytes", lambda: 1 << 20)
    assert cpu.evictor().__self__.nbytes > 1 << 20


# -- as a process, and as a sweep


def test_a_worker_on_the_cpu():
    worker, candidate = Worker("cpu"), Candidate(task("decode"), CpuSchedule())
    shape = {"workload": "1x1x2", "policy": "eager warm", "contenders": [contender_fields(candidate, None)]}
    try:
        assert worker.ask({"do": "facts"}, 60)["facts"]["compiled"] is False
        assert worker.ask({"do": "check", "contenders": shape["contenders"]}, 60)["ok"]
        assert worker.ask({"do": "screen", **shape, "best_ms": None}, 60)["calls"] >= 5
        final = {"do": "final", **shape, "seconds": 0.1, "seed": 0, "default": candidate.id}
        assert worker.ask(final, 60)["intervals"][candidate.id][0] > 0
    finally:
        worker.end()


def test_a_sweep_ends_with_a_table_that_ops_run_by(tmp_path, monkeypatch):
    """Whichever wins: it is what the next call of that size runs by."""
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    studies = tuple(Study(task(purpose), (Workload.parse("1x32x2"),)) for purpose in ("inference", "decode"))
    fixed = {"rows": [64, 16], "span": [1], "threads": [0]}
    folder = Folder.create(tmp_path / "sweep", Sweep(studies, Policy("eager", "warm"), fixed=fixed))
    monkeypatch.setattr(Limits, "__init__", _quick(Limits.__init__))
    (path,) = tune(folder, ["cpu"], None, None, Silent())
    entries = {entry.key.purpose: entry for entry in select.read(path)}
    assert set(entries) == {"inference", "decode"} and path.parent == tmp_path / "cache" / "tables"
    rungs = [(line["task"], line["rung"], line["verdict"]) for line in folder.log]
    assert rungs.count((studies[0].task.name, "correct", "kept")) == 2
    select.tables.cache_clear()
    try:
        op = kg.compile(kg.load("kda"), head_dim=16, dtype="float16")  # an op that has not looked at tables yet
        given = {n: torch.zeros(1, 32, 2, *([16] if n != "beta" else [])) for n in ("q", "k", "v", "g", "beta")}
        call = op.call((*given.values(),), {})
        assert not op.tuned.said
        assert schedule_of(op, call, "inference") == CpuSchedule().replace(**entries["inference"].schedule)
        (words,) = op.tuned.said.values()
        assert f"as tuned for {tuned.this_cpu()[0]}" in words
    finally:
        select.tables.cache_clear()


def _quick(init):
    return lambda self, **given: init(self, **{"final_s": 0.2, **given})
