"""Candidates spread over Ray, on this machine alone: what comes of it is what local workers make of it."""

import os
import time
from pathlib import Path

import fake_compiler
import pytest
from click.testing import CliRunner
from fake_compiler import Bench as Compiling
from fake_compiler import RemoteCompiler, candidate
from kdagen.autotune import distribute
from kdagen.autotune.bench import Limits
from kdagen.autotune.compile import load
from kdagen.autotune.measure import measure
from kdagen.autotune.pool import WorkerDied
from recordings import BEST, CANDIDATES, MIDDLE, faulty, planned, recording, todo
from test_tune_measure import Notes

from kdagen import cli
from kdagen.errors import ArgumentError, LaunchError, ToolchainError

QUICK = Limits(hang_s=10, patience_s=5, final_s=0.05)
FACTS = {"do": "facts"}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Two processors."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"USAGE_STATS_ENABLED": "0", "AUTH_MODE": "disabled"}.items():
            patch.setenv(f"RAY_{name}", value)
        patch.setenv("PYTHONPATH", str(Path(fake_compiler.__file__).parent))  # for RemoteCompiler
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
        yield ray
        ray.shutdown()


@pytest.fixture
def workers():
    """Makes workers, and ends them."""
    made = []

    def make(*devices):
        made.extend(distribute.workers(list(devices)))
        return made[-len(devices) :]

    yield make
    for worker in made:
        worker.end()


def outcome(folder) -> list[dict]:
    """What a log says that does not depend on who said it when, as how far the slow ones were from the best so far."""
    told = ("task", "candidate", "rung", "verdict", "workload", "death", "errors", "under")
    lines = [{n: line[n] for n in told if n in line} for line in folder.log if line["rung"] != "model"]
    return sorted(lines, key=str)


def measured(path, devices, **options) -> tuple[list[dict], Notes]:
    folder, say = planned(path), Notes()
    measure(folder, devices, None, say, limits=QUICK, todo=todo, **options)
    return outcome(folder), say


def test_two_workers_find_what_local_ones_find_though_one_of_them_crashes(tmp_path, workers):
    recorded = recording(tmp_path / "log.jsonl")
    crashes = [("crash", "check", MIDDLE, [1])]
    both = lambda name: [recorded, faulty(recorded, tmp_path / f"{name}.jsonl", *crashes)]  # noqa: E731
    local, _ = measured(tmp_path / "a", both("local"))
    spread, say = measured(tmp_path / "b", [], workers=workers(*both("spread")))
    without_deaths = lambda lines: [x for x in lines if "death" not in x]  # noqa: E731 (the faulty one may be idle then)
    assert without_deaths(spread) == without_deaths(local)
    assert {x["candidate"] for x in spread if x["rung"] == "final"} >= {BEST.id, CANDIDATES[0].id}
    assert {x["on"].rpartition("@")[0] for x in say.lines} <= set(both("spread"))


def test_the_command_measures_on_the_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr("kdagen.autotune.search.todo", todo)
    recorded, folder = recording(tmp_path / "log.jsonl"), planned(tmp_path / "sweep")
    command = ["tune", "measure", "--dir", str(folder.path), "--device", recorded, "--budget", "20s", "--ray"]
    found = CliRunner().invoke(cli.main, command)
    assert found.exit_code == 0, found.output
    finals = [line for line in folder.log if line["rung"] == "final"]
    assert {line["on"] for line in finals} == {f"{recorded}@{os.uname().nodename}"}
    assert BEST.id in {line["candidate"] for line in finals}


def test_a_process_that_dies_on_its_host_is_started_again_there(tmp_path, workers):
    spec = faulty(
        recording(tmp_path / "log.jsonl"),
        tmp_path / "faults",
        ("crash", "check", None, [1]),
        ("hang", "check", None, [1]),
    )
    (worker,), say = workers(spec), Notes()
    check = {"do": "check", "contenders": [{"task": BEST.task.fields(), "schedule": BEST.schedule.fields()}]}
    actor = worker.actor
    for kind in ("crash", "hang"):
        with pytest.raises(WorkerDied) as found:
            worker.ask(check, 5 if kind == "crash" else 1, say)
        assert (found.value.kind, found.value.running) == (kind, BEST.id)
    assert worker.ask(check, 10, say)["ok"] and worker.actor is actor
    assert say.notes == [f"{spec}: the worker is started again"] * 2
    assert worker.device == f"{spec}@{os.uname().nodename}"


def test_an_actor_that_dies_is_replaced(tmp_path, workers, cluster):
    (worker,), say = workers(recording(tmp_path / "log.jsonl")), Notes()
    facts, device = worker.ask(FACTS, 30, say), worker.device
    cluster.kill(worker.actor)
    with pytest.raises(WorkerDied, match="the actor of replay:.* is gone") as found:
        worker.ask(FACTS, 30, say)
    assert found.value.kind == "crash"
    assert worker.ask(FACTS, 30, say) == facts and worker.device == device
    assert say.notes == [f"{device}: its actor is started again"]


def test_a_worker_that_cannot_start_says_why_as_a_local_one_does(workers):
    (worker,) = workers("replay:nothing.jsonl")
    with pytest.raises(ArgumentError, match="nothing.jsonl records nothing that was measured"):
        worker.ask(FACTS, 30)


def test_a_cluster_without_room(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(distribute, "ROOM_SECONDS", 1)
    three = [f"{recording(tmp_path / f'{i}.jsonl')}" for i in range(3)]
    with pytest.raises(
        LaunchError,
        match="no host of the Ray cluster has room for replay:.*, which takes {'num_cpus': 1}: it has {'CPU': 2.0}",
    ):
        workers(*three)
    until = time.monotonic() + 20  # the two that had room are given back
    while distribute.connect(None).available_resources().get("CPU", 0) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert distribute.connect(None).available_resources()["CPU"] == 2


def test_a_cluster_without_gpus():
    with pytest.raises(
        ArgumentError, match="the Ray cluster has no GPU: expected one, or name what to measure on by --d"
    ):
        distribute.workers([])


def test_libraries_travel_once_and_lie_on_the_host_under_their_names(tmp_path):
    """Both ends of the way, without Ray between them."""
    (tmp_path / "kernels" / "key").mkdir(parents=True)
    (tmp_path / "kernels" / "key" / "scan.so").write_bytes(b"code")
    files = {"key/scan.so": "its hash", "key/gone.so": "another"}
    request = {"do": "check", "contenders": [{"kernels": str(tmp_path / "kernels"), "manifest": {"files": files}}]}
    near = distribute.RayWorker.__new__(distribute.RayWorker)
    near.sent = set()
    sent = near._unsent(request)
    assert sent == {("key/scan.so", "its hash"): b"code"}
    near.sent |= sent.keys()
    assert near._unsent(request) == {}
    assert near._unsent(FACTS) == {}
    far, asked = distribute.Remote("replay:none"), []
    far.worker.ask = lambda request, timeout, say: asked.append(request) or {"ok": True}
    assert far.ask(request, 3, sent) == {"reply": {"ok": True}, "notes": []}
    (contender,) = asked[0]["contenders"]
    assert contender["kernels"] == str(far.kernels) != str(tmp_path / "kernels")
    assert (far.kernels / "key" / "scan.so").read_bytes() == b"code"
    far.end()
    assert not far.kernels.exists()


def test_what_devices_take_of_their_hosts():
    hosts = [{"CPU": 96.0, "GPU": 8.0}, {"CPU": 128.0, "GPU": 4.0}, {"CPU": 128.0}]
    assert distribute._room("cuda:3", hosts) == {"num_gpus": 1, "num_cpus": 12}
    assert distribute._room("cpu", hosts) == {"num_cpus": 128}
    assert distribute._room("replay:log", hosts) == {"num_cpus": 1}


def test_kernels_are_compiled_by_the_cluster_and_come_back(monkeypatch, tmp_path):
    bench = Compiling(monkeypatch, tmp_path)
    monkeypatch.setattr(distribute, "Compiler", RemoteCompiler)
    default, tile, stages, chunk = ALL = [
        candidate(), candidate(v_tile=128), candidate(stages=3), candidate(chunk_size=32),
    ]  # fmt: skip
    bench.planned(*ALL)
    bench.run(ALL, distribute.compile_each)
    assert bench.verdicts(default) == bench.verdicts(chunk) == ["lowered kept", "ptxas kept", "identical kept"]
    assert [bench.lines(c)[-1]["death"] for c in (tile, stages)] == ["hang", "crash"]
    assert bench.lines(stages)[-1]["reason"] == "the actor that compiled toy_scan is gone"
    assert load(bench.folder, chunk.id).plan["schedule"] == chunk.schedule.fields()


def test_a_host_that_compiles_otherwise_ends_it_all(monkeypatch, tmp_path):
    bench = Compiling(monkeypatch, tmp_path)
    monkeypatch.setattr(distribute, "Compiler", RemoteCompiler)
    with pytest.raises(ToolchainError, match="it compiles otherwise"):
        bench.run([candidate(stages=9)], distribute.compile_each)
    assert list(bench.folder.log) == []
