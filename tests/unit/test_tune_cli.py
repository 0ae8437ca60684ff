"""`kdagen tune`: what options become, stages one by one and in a loop, all of it on a recording and on the CPU."""

import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tune_logs
from click.testing import CliRunner
from kdagen.autotune import asked, gpus, measure, tune
from kdagen.autotune.asked import Asked, sweep_of
from kdagen.autotune.bench import Limits
from kdagen.autotune.folder import FORMAT, SWEEP, Folder
from kdagen.autotune.progress import Silent
from kdagen.autotune.select import read
from kdagen.autotune.sweep import Policy, Sweep

from kdagen import cli, cli_tune_options
from kdagen.state import StateType

HEAVY = {"torch", "tilelang", "sympy", "numpy", "jinja2", "rich", "matplotlib", "ray", "tvm_ffi"}
COMMANDS = ["plan", "compile", "measure", "publish", "why", "report", "space"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tables of a test are no user's."""
    from kdagen.autotune.select import tables

    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    tables.cache_clear()
    yield tmp_path / "cache"
    tables.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(asked, "gpus_here", list)


def run(*arguments, status: int = 0):
    result = CliRunner().invoke(cli.main, ["tune", *map(str, arguments)])
    assert result.exit_code == status, (result.output, result.exception)
    return result


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy(command):
    code = f"""
import sys
from click.testing import CliRunner
from kdagen import cli
result = CliRunner().invoke(cli.main, ["tune", *{command!r}, "--help"])
print(result.exit_code, sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0 []\n", done.stderr


def test_help_lists_the_stages_in_their_order():
    listed = run("--help").output.split("Commands:")[1]
    assert re.findall(r"^  (\w+) ", listed, re.MULTILINE) == COMMANDS
    assert "..." not in listed  # each fits its line


def test_help_names_every_gpu():
    assert tuple(gpus.GPUS) == cli_tune_options.GPUS


def test_a_gpu_that_is_not_here(no_gpu):
    sweep = sweep_of(Asked(gpu="h200"))
    assert [s.task.purpose for s in sweep.studies] == ["inference", "training", "decode"]
    assert {(s.task.op, s.task.target, s.task.device, s.task.dtype) for s in sweep.studies} == {
        ("kda", "sm90", "H200", "bfloat16")
    }
    assert [len(s.workloads) for s in sweep.studies] == [6, 6, 5] and sweep.policy == Policy()
    assert sweep.studies[0].workloads[-1].lengths == (1300, 547, 2048, 963, 271, 3063)


def test_the_gpu_at_hand(monkeypatch):
    here = [("cuda:0", "NVIDIA H100 80GB HBM3"), ("cuda:1", "NVIDIA H100 80GB HBM3")]
    monkeypatch.setattr(asked, "gpus_here", lambda: here)
    sweep = sweep_of(Asked(purposes=("decode",)))
    assert sweep.studies[0].task.device == "H100"
    assert asked.devices_for(sweep) == ["cuda:0", "cuda:1"]


def test_the_cpu():
    sweep = sweep_of(Asked(devices=("cpu",)))
    assert {(s.task.target, s.task.device, s.task.dtype) for s in sweep.studies} == {("cpu", "cpu", "float32")}
    assert asked.devices_for(sweep) == ["cpu"] and sweep.policy == Policy("eager", "cold")


def test_a_recording_is_of_what_the_sweep_beside_it_says(tmp_path, no_gpu):
    folder = tune_logs.measured(tmp_path / "sweep")
    for options in ("", "?seed=3"):
        sweep = sweep_of(Asked(devices=(f"replay:{folder.log.path}{options}",), purposes=("decode",)))
        assert sweep.studies[0].task.device == "H100"


def test_all_that_can_be_asked_for(tmp_path, monkeypatch):
    line = (
        "--gpu H100 --op gla --op kda --purpose decode --shape 1x1x32 --shape 8x1x4/8 --head-dim 64,128 --dtype float16"
    )
    line += " --gate-dtype float32 --state-layout VK --state-dtype bfloat16 --seed 3 --exhaustive 7"
    line += " --fix threads=64,128 --fix v_tile=32"
    monkeypatch.setattr("kdagen.autotune.plan.plan", lambda folder, say: None)
    run("plan", "--dir", tmp_path / "sweep", "--policy", "graph warm", *line.split())
    sweep = Folder(tmp_path / "sweep").sweep
    assert [s.task.op for s in sweep.studies] == ["gla", "kda"]
    task = sweep.studies[0].task
    assert (task.head_dim, task.dtype, task.gate_dtype) == ((64, 128), "float16", "float32")
    assert task.state == StateType("VK", "bfloat16")
    assert list(map(str, sweep.studies[0].workloads)) == ["1x1x32", "8x1x4/8"]
    assert (sweep.seed, sweep.exhaustive, sweep.policy) == (3, 7, Policy("graph", "warm"))
    assert sweep.fixed == {"threads": [64, 128], "v_tile": [32]}


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400)])
def test_budgets(text, seconds):
    assert cli_tune_options.seconds(text) == seconds


# -- a folder that is there -------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_plan(monkeypatch):
    """A plan that says nothing, so that what is said is of the command."""
    monkeypatch.setattr("kdagen.autotune.plan.plan", lambda folder, say: None)


def test_a_sweep_goes_on_without_its_options(tmp_path, quiet_plan, no_gpu):
    folder = tune_logs.measured(tmp_path / "sweep")
    said = run("plan", "--dir", folder.path)
    how_far = "29 candidates planned, 16 compiled, 13 screened, 7 in finals"
    assert said.stderr == f"going on in {folder.path}: {how_far}\n"
    assert "winner" in said.stdout


def test_the_same_options_are_the_same_sweep(tmp_path, quiet_plan):
    options = ["plan", "--dir", tmp_path / "sweep", "--gpu", "H100", "--purpose", "decode"]
    run(*options)
    assert run(*options).stderr == ""  # nothing is there yet


# -- the loop ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stages(monkeypatch):
    """Stages that note that they were called, and append a line while there is something left to do."""
    calls, left = [], {"compile": 2, "measure": 3}

    def stage(name):
        def work(folder, *rest):
            calls.append((name, rest))
            if left.get(name):
                left[name] -= 1
                folder.log.append("task", f"{name} {left[name]}", "model", "kept")

        return work

    for name in ("plan", "measure", "publish"):
        monkeypatch.setattr(tune, name, stage(name))
    return calls, stage("compile"), left


def test_rounds_until_nothing_is_left(tmp_path, stages):
    calls, compilers, left = stages
    folder = Folder.create(tmp_path / "sweep", tune_logs.SWEEP)
    tune.tune(folder, ["cuda:0"], 2, None, Silent(), tmp_path / "tables", compilers)
    assert [name for name, _ in calls] == ["plan", *["compile", "measure"] * 4, "publish"]
    assert calls[1][1][:2] == (2, None) and calls[2][1][:2] == (["cuda:0"], None)
    assert calls[-1][1] == (tmp_path / "tables",)


def test_no_round_more_than_needed(tmp_path, stages, monkeypatch):
    """What was tried on every rung, and won everywhere, is not opened again."""
    calls, compilers, left = stages
    folder = tune_logs.measured(tmp_path / "sweep")
    monkeypatch.setattr(tune, "todo", lambda folder, study, lines: tune_logs.candidates()[:2])
    assert not tune.done(folder, list(folder.log))  # decoding was not measured
    tune.tune(folder, ["cuda:0"], None, None, Silent(), None, compilers)
    assert len(calls) == 2 + 2 * 4
    only = Sweep(tune_logs.SWEEP.studies[:1], tune_logs.SWEEP.policy)
    (folder.path / SWEEP).write_text(json.dumps({"format": FORMAT, **only.fields()}))
    assert tune.done(Folder(folder.path), list(folder.log))
    monkeypatch.setattr(tune, "todo", lambda folder, study, lines: tune_logs.candidates()[:3])
    assert not tune.done(Folder(folder.path), list(folder.log))  # the third was never tried


def test_a_budget_ends_it(tmp_path, stages, monkeypatch):
    calls, compilers, left = stages
    left["measure"] = 1000
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tune.tune(Folder.create(tmp_path / "sweep", tune_logs.SWEEP), ["cuda:0"], None, 100.0, Silent(), None, compilers)
    assert calls[-1][0] == "publish" and 3 < len(calls) < 20
    assert calls[1][1][1] == pytest.approx(60.0) and calls[2][1][1] == 100.0  # compilers leave time to measure


def test_on_the_cpu_nothing_is_compiled(tmp_path, stages):
    calls, compilers, _ = stages
    tune.tune(Folder.create(tmp_path / "sweep", sweep_of(Asked(devices=("cpu",)))), ["cpu"], None, None, Silent())
    assert {name for name, _ in calls} == {"plan", "measure", "publish"}


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, no_gpu):
    def stopped(folder, *rest):
        raise KeyboardInterrupt

    folder = tune_logs.planned(tmp_path / "sweep")
    monkeypatch.setattr("kdagen.autotune.measure.measure", stopped)
    said = run("measure", "--dir", folder.path, "--device", "cuda:0", status=130)
    assert f"go on with `{said.stderr.rsplit('`', 2)[-2]}`" in said.stderr
    assert f"tune measure --dir {folder.path}`" in said.stderr
    assert "1x8192x64" in run("why", "--dir", folder.path).output


# -- on a recording ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    """A sweep that was planned for real, and a made-up recording of its candidates."""
    folder = tmp_path / "sweep"
    run("plan", "--dir", folder, "--gpu", "H100", "--purpose", "decode", "--shape", "64x1x32", "--policy", "graph cold")
    return folder, tune_logs.recording(Folder(folder), tmp_path / "recording.jsonl")


def test_stage_by_stage_on_a_recording(recorded, tmp_path):
    folder, log = recorded
    planned = run("why", "--dir", folder).output
    assert "next: `kdagen tune compile`" in planned and "64x1x32: " in planned
    said = run("measure", "--dir", folder, "--device", f"replay:{log}", "--budget", "30s")
    assert re.search(r"winner +\S+ ms \(.*\)  \w+ \d+", said.output) and "failed: " in said.stderr
    assert run("why", "--dir", folder).output == said.stdout
    (table,) = (
        (tmp_path / "tables").glob("*.json") if run("publish", "--dir", folder, "--into", tmp_path / "tables") else ()
    )
    (entry,) = read(table)
    assert entry.key.device == tune_logs.DEVICE["device"] and entry.facts["gain"] > 1
    assert run("report", "--dir", folder).output == f"wrote {folder / 'report.html'}\n"
    assert "<svg" not in (folder / "report.html").read_text() and (folder / "report.html").stat().st_size > 10_000


def test_all_of_it_on_a_recording(recorded, tmp_path):
    """Which needs no compiler, and no folder but the recording's own for what is not said."""
    folder, log = recorded
    said = run("--dir", folder, "--device", f"replay:{log}", "--into", tmp_path / "tables")
    (table,) = (tmp_path / "tables").glob("*.json")
    assert said.stdout.endswith(f"published {table}\nwrote {folder / 'report.html'}\n")
    assert {line["rung"] for line in Folder(folder).log} == {"space", "model", "correct", "screen", "final"}


def test_a_recording_of_a_real_machine_ends_as_it_did_there(tmp_path):
    log = Path(__file__).parents[2] / "benchmarks" / "results" / "tune_cpu_32_heads" / "log.jsonl"
    lines = list(map(json.loads, log.read_text().splitlines()))
    there = {x["candidate"]: x for x in lines if x["rung"] == "final"}
    default = next(x["candidate"] for x in lines if x.get("default"))
    run("--dir", tmp_path / "sweep", "--device", f"replay:{log}", "--into", tmp_path / "tables")
    (entry,) = read(next((tmp_path / "tables").glob("*.json")))
    assert entry.key.device == there[default]["under"]["device"] and entry.facts["gain"] > 1
    assert entry.facts["default_ms"] == pytest.approx(there[default]["median"], rel=0.05)


def test_a_second_run_measures_nothing_again(recorded):
    folder, log = recorded
    run("measure", "--dir", folder, "--device", f"replay:{log}")
    before = (folder / "log.jsonl").read_bytes()
    said = run("measure", "--dir", folder, "--device", f"replay:{log}")
    assert (folder / "log.jsonl").read_bytes() == before
    assert "going on in" in said.stderr and "in finals" in said.stderr


def test_a_run_that_was_cut_short_goes_on(recorded):
    """As after a kill -9: some lines, the last one torn."""
    folder, log = recorded
    run("measure", "--dir", folder, "--device", f"replay:{log}")
    path = folder / "log.jsonl"
    whole, text = [strip(line) for line in Folder(folder).log], path.read_text()
    measured = text.index('"rung":"correct"')
    path.write_text(text[: measured + 2 * (len(text) - measured) // 3])
    run("measure", "--dir", folder, "--device", f"replay:{log}")
    again = [strip(line) for line in Folder(folder).log]
    assert sorted(again) == sorted(whole)


def strip(line: dict) -> str:
    """A line without what chance and the clock have in it."""
    return json.dumps([line[name] for name in ("candidate", "rung", "verdict")])


def test_each_stage_in_a_process_of_its_own(recorded, tmp_path):
    folder, log = recorded
    measuring = ["measure", "--device", f"replay:{log}", "--budget", "30s"]
    for command in (measuring, ["publish", "--into", str(tmp_path / "tables")], ["why"], ["report"]):
        line = [sys.executable, "-m", "kdagen.cli", "tune", *command, "--dir", str(folder)]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert read(next((tmp_path / "tables").glob("*.json"))) and (folder / "report.html").exists()


# -- on this CPU ------------------------------------------------------------------------------------------------------


def test_all_of_it_on_this_cpu(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(measure, "Limits", lambda: Limits(final_s=0.5))
    folder, tiny = tmp_path / "sweep", ["--purpose", "decode", "--shape", "1x1x2", "--head-dim", "16"]
    said = run("--dir", folder, "--device", "cpu", *tiny)
    assert re.search(r"winner +[\d.]+ ms", said.stdout), said.stdout
    (table,) = (own_cache / "tables").glob("*.json")
    assert f"published {table}\nwrote {folder / 'report.html'}\n" in said.stdout
    (entry,) = read(table)
    assert entry.key.target == "cpu" and entry.policy == "eager cold"
    assert entry.facts["ms"] <= entry.facts["default_ms"]
    before = len(list(Folder(folder).log))
    assert "in finals" in run("--dir", folder).stderr and len(list(Folder(folder).log)) == before
