"""benchmarks/gpu.py's stages on made-up processes: resumed, bounded in time, and what breaks one is named. No figure
here was measured."""

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import packages
import pytest
import simulated_gpu
from click.testing import CliRunner
from kdagen.autotune import pool
from kdagen.autotune.pool import WorkerDied

from kdagen import zoo
from kdagen.pipeline import compile_op

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FACTS = {"gpu": "NVIDIA H100 80GB HBM3", "multiprocessors": 132, "l2_bytes": 1 << 20, "versions": {"torch": "2.13"}}
ROWS = [{"contender": "kdagen default", "part": "", "ms": {"median": 1.0}}]
SHAPE = {"op": "linear_attention", "purpose": "inference"}


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Linear attention as pack_for_device.py leaves it, with two variants that experiments ask for."""
    place = tmp_path_factory.mktemp("packed")
    for name, schedule in (("default", {}), ("split", {"output": "split"}), ("plain", PLAIN)):
        packages.write(place / name, compile_op(zoo.get("linear_attention"), 64, schedule=schedule), place)
    return place


PLAIN = {"scan_skeleton": "scan_plain", "stages": 1}


class Process:
    """A worker that answers as told; all of them keep one list of what they were asked."""

    asked: list = []
    facts = FACTS
    answers: dict = {}

    def __init__(self, folders):
        self.folders = folders

    def ask(self, request, timeout, say=None):
        if request["do"] == "facts":
            return {"facts": dict(self.facts)}
        Process.asked.append((request, timeout))
        answer = self.answers.get(request["do"], RIGHT if request["do"] == "correct" else TIMED)
        return answer(request) if callable(answer) else answer

    def end(self):
        pass


RIGHT = {"run": {"facts": FACTS}, "figures": {"ok": True, "reason": "", "errors": {"out": [1e-3, 5e-3]}}}
TIMED = {"run": {"facts": FACTS, "ceilings": {}}, "figures": {"rows": ROWS}, "state": {}}


@pytest.fixture
def process(monkeypatch):
    for name, value in (("asked", []), ("facts", FACTS), ("answers", {})):
        monkeypatch.setattr(Process, name, value)
    return Process


def session(folder, out, seconds=100.0, **more):
    import gpu

    return gpu.Session([folder], out, time.monotonic() + seconds, worker=Process, **more)


def run(folder, out, stages=("correct", "time"), seconds=100.0, **more) -> dict:
    """The JSON file after a call."""
    import gpu
    import gpu_cases

    call = session(folder, out, seconds, **more)
    todo, _ = gpu_cases.cases([folder], ["inference"], ["linear_attention"], ["mild"], None, [64], [1], False)
    units = gpu.units_of([folder], stages, ["inference"], ["linear_attention"], ["device"], 3, todo, [])
    gpu.run(call, list(stages), units)
    return json.loads(call.results.path.read_text())


def does(process) -> list[str]:
    return [request["do"] for request, _ in process.asked]


def test_a_call_goes_on_where_the_last_one_was(folder, process, tmp_path):
    first = run(folder, tmp_path, jobs=2)
    assert does(process) == ["correct"] * 3 + ["time"]
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("H100-20") and path.suffix == ".json"
    assert run(folder, tmp_path) == first and len(process.asked) == 4


def test_a_file_of_another_day_is_gone_on_with_unless_a_fresh_one_is_wanted(folder, process, tmp_path):
    run(folder, tmp_path)
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / "H100-2026-01-02.json")
    run(folder, tmp_path)
    assert len(process.asked) == 4 and [p.name for p in tmp_path.iterdir()] == ["H100-2026-01-02.json"]
    run(folder, tmp_path, fresh=True)
    assert len(process.asked) == 8 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("change", [{"versions": {"torch": "2.14"}}, {"gpu": "NVIDIA H100 SXM"}], ids=str)
def test_what_was_found_elsewhere_is_found_again_in_its_place(folder, process, monkeypatch, tmp_path, change):
    run(folder, tmp_path)
    monkeypatch.setattr(process, "facts", FACTS | change)
    process.answers |= {do: {**x, "run": {"facts": FACTS | change}} for do, x in (("correct", RIGHT), ("time", TIMED))}
    found = run(folder, tmp_path)
    assert len(process.asked) == 8 and len(found["records"]) == 4
    assert all(found["runs"][record["run"]]["facts"] == FACTS | change for record in found["records"])


def test_kernels_that_were_built_again_are_measured_again(folder, process, monkeypatch, tmp_path):
    import gpu_cases

    run(folder, tmp_path)
    digests = gpu_cases.kernels_hash
    monkeypatch.setattr(gpu_cases, "kernels_hash", lambda kernels: digests(kernels) + " again")
    found = run(folder, tmp_path)
    assert len(process.asked) == 8 and all(r["kernels"].endswith("again") for r in found["records"])


def test_what_is_cut_off_is_left_for_the_next_call(folder, process, tmp_path):
    def slow(request):
        raise WorkerDied("hang", "no answer", None)

    process.answers["time"] = slow
    found = run(folder, tmp_path, seconds=30.0)
    assert [r["stage"] for r in found["records"]] == ["correct"] * 3
    assert found["left"] == ["time: linear_attention, inference, mild gates, B = 1, T = 64, H = 1: no time"]
    assert all(timeout <= 30.0 for _, timeout in process.asked)  # the process is killed then
    process.answers.clear()
    assert [r["stage"] for r in run(folder, tmp_path)["records"]] == ["correct"] * 3 + ["time"]


def test_nothing_is_begun_without_time(folder, process, tmp_path):
    assert run(folder, tmp_path, seconds=1.0)["records"] == [] and process.asked == []


def test_a_hang_is_a_finding(folder, process, tmp_path):
    def hang(request):
        raise WorkerDied("hang", "no answer within 240 s", None)

    process.answers["time"] = hang
    found = run(folder, tmp_path, seconds=1000.0)["records"][-1]
    assert found["failed"] == "hang: no answer within 240 s"
    process.asked.clear()
    run(folder, tmp_path, seconds=1000.0)
    assert process.asked == []


def test_a_contender_that_breaks_the_process_is_left_out(folder, process, tmp_path):
    def broken(request):
        if "split" in request["labels"]:
            raise WorkerDied("device error", "CUDA error: an illegal memory access was encountered", "split")
        return {**TIMED, "figures": {"rows": ROWS, "table": [{"contender": "kdagen default", "ms": 1.0}]}}

    process.answers["compare"] = broken
    asks = {"labels": ["default", "split"], "shape": [1, 64, 1], "lengths": [], "gate": "mild", "peer": False}
    found = found_of(folder, tmp_path, "families", {**SHAPE, **asks})
    assert found["broken"] == {"split": "device error: CUDA error: an illegal memory access was encountered"}
    assert found["figures"]["table"] == [{"contender": "kdagen default", "ms": 1.0}]


def test_a_peer_that_fails_at_a_shape_is_left_out_there(folder, process, tmp_path):
    failed = {"error": "error", "reason": "OutOfResources: out of resource: shared memory", "running": "fla chunk_kda"}
    process.answers["time"] = lambda request: failed if request["peer"] else TIMED
    asks = {"labels": ["default"], "shape": [1, 64, 1], "lengths": [], "gate": "mild", "peer": True}
    process.answers["correct"] = RIGHT
    found = found_of(folder, tmp_path, "time", {**SHAPE, **asks})
    assert "broken" not in found  # no peer is installed here
    import gpu_contenders

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_contenders, "peer", lambda *_: SimpleNamespace(label="fla chunk_kda"))
        found = found_of(folder, tmp_path / "with", "time", {**SHAPE, **asks})
    assert found["broken"] == {"fla chunk_kda": failed["reason"]} and found["figures"]["rows"] == ROWS


def found_of(folder, out, stage: str, asked: dict) -> dict:
    """The record of one unit."""
    import gpu
    from gpu_results import Unit

    call = session(folder, out)
    unit = Unit(stage, "a unit", "kernels", asked)
    gpu.run(call, [stage], {stage: [unit]})
    return call.results.find(unit)


def test_kernels_that_break_the_process_are_not_timed(folder, process, tmp_path):
    def broken(request):
        if request["labels"] == ["default"]:
            raise WorkerDied("crash", "the worker died of SIGSEGV", "default")
        return RIGHT

    process.answers["correct"] = broken
    found = run(folder, tmp_path)
    failed = [r for r in found["records"] if "failed" in r]
    assert [(r["name"], r["failed"]) for r in failed] == [
        ("linear_attention, inference, default", "crash: the worker died of SIGSEGV")
    ]
    assert found["left"][0].endswith("no kernels that are right")


def test_what_was_measured_is_there_whole_after_each_unit(folder, process, tmp_path):
    import gpu_results

    results = gpu_results.Results(tmp_path / "x.json")
    results.facts = FACTS
    unit = gpu_results.Unit("time", "a", "k")
    results.add(unit, {"facts": FACTS}, figures={})
    again = gpu_results.Results(tmp_path / "x.json")
    again.facts = FACTS
    assert again.find(unit)["name"] == "a" and not list(tmp_path.glob("*.new"))
    assert again.of("time", "a") and not again.of("time", "b")


def test_experiments_are_of_what_was_built(folder, process, monkeypatch):
    import gpu_cases
    import gpu_experiments

    ops = gpu_experiments.EXPERIMENTS["roles"].__class__
    asks = ops("?", ("default", "pipelined", "plain"), (("linear_attention",),), ((1, 64, 1),))
    alone = ops("?", ("default", "pipelined"), (("linear_attention",),), ((1, 64, 1),))
    monkeypatch.setattr(gpu_experiments, "EXPERIMENTS", {"roles": asks, "alone": alone})
    (unit,) = gpu_cases.experiment_units([folder], "roles", 3)
    assert unit.asked["labels"] == ["default", "plain"] and not unit.asked["peer"]
    assert gpu_cases.experiment_units([folder], "alone", 3) == []
    assert gpu_cases.case_of([folder], unit.asked).kernels.keys() == {"default", "plain"}


def test_every_variant_that_an_experiment_compares_is_packed():
    import gpu_experiments

    labels = {label for asks in gpu_experiments.EXPERIMENTS.values() for label in asks.labels}
    assert labels - {"default"} == gpu_experiments.VARIANTS.keys() and labels <= gpu_experiments.WORDS.keys()


@pytest.fixture
def bench(folder, monkeypatch):
    """gpu_work.py's bench on a GPU whose kernels run as programs, and each call takes a ms more than the last."""
    import gpu_contenders
    import gpu_timing
    import gpu_work

    simulated_gpu.install_device(monkeypatch)
    ceilings = {"copy_bytes_a_second": 1e9, "bf16_flops_a_second": 1e12}
    for name, value in (("ceilings", lambda: ceilings), ("facts", lambda: dict(FACTS)), ("state", dict)):
        monkeypatch.setattr(gpu_timing, name, value)
    monkeypatch.setattr(gpu_contenders, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_contenders, "peer", lambda *_: None)
    return gpu_work.Bench([folder], lambda label: None)


ASKED = {
    **SHAPE, "labels": ["default", "plain"], "shape": [1, 256, 1], "lengths": [], "gate": "mild", "peer": False,
    "modes": ["device"], "rounds": 2, "errors": {"default": 1e-3},
}  # fmt: skip


def test_a_comparison_is_of_contenders_in_turn(bench):
    reply = json.loads(bench.answer({"do": "compare", **ASKED}))
    assert [row["contender"] for row in reply["figures"]["table"]] == ["kdagen default", "kdagen plain"]
    assert reply["figures"]["table"][0]["times_the_first"] == 1.0
    row = reply["figures"]["rows"][0]
    flops = row["modelled_flops"]
    assert flops > 0 and row["flops_a_second"] == pytest.approx(flops / (row["ms"]["median"] * 1e-3))
    ceilings = bench.ceilings
    assert reply["run"]["ceilings"] == ceilings and bench.ceilings is ceilings  # once a process
    assert row["of_product"] == pytest.approx(row["flops_a_second"] / 1e12) and row["error"] == 1e-3


def test_segments_side_by_side_are_an_experiment(bench, monkeypatch):
    import gpu_overlap

    monkeypatch.setattr(gpu_overlap, "PIECES", (2, 4))
    with simulated_gpu.streams(monkeypatch):
        reply = json.loads(bench.answer({"do": "overlap", **ASKED, "labels": ["default"]}))
    table = reply["figures"]["table"]
    ways = [f"{n} segments, {how}" for how in ("in turn", "side by side") for n in (2, 4)]
    assert [row["contender"] for row in table] == ["whole", *ways] and all(row["same_bits"] for row in table)


def test_ops_are_compared_on_inputs_of_their_own(bench):
    reply = json.loads(bench.answer({"do": "ratio", **ASKED, "labels": ["default"], "others": ["linear_attention"]}))
    assert [row["contender"] for row in reply["figures"]["table"]] == ["linear_attention default"]


def test_replays_that_move_are_found(bench, folder, monkeypatch):
    import gpu_contenders
    import gpu_correct

    kernels = gpu_contenders.built([folder], "linear_attention")["default"]
    times = iter(range(99))
    assert gpu_correct.replays(kernels, (1, 40, 1)) == ""
    simulated_gpu.tampered(monkeypatch, "forward", lambda t: t["o_out"].view(-1)[:1].add_(next(times)))
    assert gpu_correct.replays(kernels, (1, 40, 1)) == "launch 1 of 8 at (1, 40, 1) differs in o_out"
    simulated_gpu.tampered(monkeypatch, "forward", lambda t: t["o_out"].view(-1)[:1].fill_(float("nan")))
    assert gpu_correct.replays(kernels, (1, 40, 1)).startswith("NaN in o_out at (1, 40, 1)")


CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
TOOLS = {
    "clean": (CLEAN, 0, "clean"),
    "errors": ("========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 3 errors\n", 9, "errors"),
    "hazards": ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 9, "errors"),
    "no hazards": ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, "clean"),
    "refused": ("========= Error: Device not supported\n", 1, "not run"),
    "of the program": (CLEAN.replace("ERROR SUMMARY: 0 errors", "Target application returned an error"), 1, "not run"),
}


def tool(path, monkeypatch, words: str, status: int) -> None:
    """compute-sanitizer on the PATH, that says so."""
    script = path / "compute-sanitizer"
    script.write_text(f"#!/bin/sh\necho $@ >{path}/asked\nprintf '{words}'\nexit {status}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")


@pytest.mark.parametrize("name", TOOLS)
def test_the_sanitizer_is_asked_and_its_words_are_kept(folder, process, monkeypatch, tmp_path, name):
    words, status, verdict = TOOLS[name]
    tool(tmp_path, monkeypatch, words, status)
    found = run(folder, tmp_path / "out", ["sanitizer"])["records"]
    assert found == []  # linear attention is none of the ops that are watched
    asked = {"tool": "memcheck", "op": "linear_attention", "purposes": ["inference"]}
    figures = found_of(folder, tmp_path / "out", "sanitizer", asked)["figures"]
    assert figures["verdict"] == verdict and words.splitlines()[-1].strip("= ") in figures["said"]
    program = f"{BENCHMARKS / 'gpu_sanitizer.py'} linear_attention inference {folder}"
    assert (tmp_path / "asked").read_text() == f"--tool memcheck --error-exitcode 9 {sys.executable} {program}\n"


def test_a_sanitizer_that_is_missing_is_a_finding(folder, process, monkeypatch, tmp_path):
    import gpu_sanitizer

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu_sanitizer, "PLACES", (str(tmp_path),))
    figures = gpu_sanitizer.run("racecheck", ["true"], 10.0)
    assert figures == {"verdict": "absent", "said": f"no compute-sanitizer on the PATH or in {tmp_path}: not checked"}


def test_a_sanitizer_that_takes_too_long_is_stopped(monkeypatch, tmp_path):
    import gpu_sanitizer

    tool(tmp_path, monkeypatch, "", 0)
    (tmp_path / "compute-sanitizer").write_text("#!/bin/sh\nexec sleep 60\n")
    started = time.monotonic()
    found = gpu_sanitizer.run("memcheck", ["true"], 0.5)
    assert found == {"verdict": "late", "said": "not done within 0 s"}
    assert time.monotonic() - started < 20


def test_what_the_sanitizer_watches_launches_all_kernels(bench, folder):
    import gpu_sanitizer

    assert gpu_sanitizer.small("linear_attention", ["inference"], [folder]) == 3


def test_all_of_it_in_processes_of_their_own(folder, monkeypatch, tmp_path):
    """On a simulated GPU: checked, timed and compared; what dies is named."""
    import gpu
    import gpu_docs
    import gpu_experiments
    import gpu_session

    shutil.copytree(folder / "plain", tmp_path / "ops" / "broken")
    for name in ("default", "split"):
        shutil.copytree(folder / name, tmp_path / "ops" / name)
    shapes = (("linear_attention",),), ((1, 64, 1),)
    compared = gpu_experiments.Experiment("Which?", ("default", "split"), *shapes)
    streams = gpu_experiments.Experiment("Side by side?", ("default",), *shapes, alone=True)
    monkeypatch.setattr(gpu_experiments, "EXPERIMENTS", {"families": compared, "overlap": streams})
    work = str(BENCHMARKS.parent / "tests" / "simulated_work.py")
    monkeypatch.setattr(gpu_session.GpuWorker, "__init__", lambda self, folders: start(self, work, folders))
    words = "--stages correct,time,families,overlap --purpose inference --ops linear_attention --calls 2 --jobs 1"
    words = f"{words} --tokens 64 --heads 1 --gates mild --out {tmp_path}".split()
    first = CliRunner().invoke(gpu.main, [str(tmp_path / "ops"), *words])
    assert "not timed: linear_attention, inference, broken: crash: the worker died of SIGABRT" in first.output, (
        first.output
    )
    (path,) = tmp_path.glob("*.json")
    records = {r["stage"] + r["name"].rpartition(",")[2]: r for r in json.loads(path.read_text())["records"]}
    assert records["time H = 1"]["left_out"] == {"broken": records["correct broken"]["failed"]}
    assert records["correct default"]["figures"]["graphs"] == 2
    assert len(records["families H = 1"]["figures"]["table"]) == 2
    assert all(row["same_bits"] for row in records["overlap H = 1"]["figures"]["table"])
    assert "2 segments, side by side" in gpu_docs.write(path, tmp_path / "docs")[0].read_text()


def start(worker, work: str, folders) -> None:
    pool.Worker.__init__(worker, "cuda:0")
    worker.program = (work, *map(str, folders))
