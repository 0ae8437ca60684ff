"""benchmarks/gpu_forward.py without a GPU: what it reads of built folders, what it would do, how it reckons."""

import json
import math
import sys
from pathlib import Path

import packages
import pytest
import torch
from click.testing import CliRunner

import kdagen as kg
from kdagen.pipeline import compile_op
from kdagen.runtime import loader

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SHAPE = (1, 600, 3)  # longer than what is drawn


@pytest.fixture(scope="module", autouse=True)
def on_path():
    """Scripts of benchmarks/ import each other by name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As pack_for_device.py leaves it: Gated DeltaNet and linear attention, and the first in chunks of 16."""
    place = tmp_path_factory.mktemp("packed")
    for name in ("gated_deltanet", "linear_attention"):
        packages.write(place / "default", compile_op(kg.load(name)), place)
    packages.write(place / "chunk16", compile_op(kg.load("gated_deltanet"), schedule={"chunk_size": 16}), place)
    return place


def invoke(*words):
    import gpu_forward

    return CliRunner().invoke(gpu_forward.main, [str(word) for word in words])


def test_a_dry_run_prints_what_would_be_measured(folder):
    result = invoke(folder, "--dry-run", "--ops", "gated_deltanet", "--tokens", "8192,2048", "--heads", "12")
    assert result.exit_code == 0, result.output
    title, *lines = [line.split() for line in result.output.splitlines() if line]
    assert title[0] == "op" and len(lines) == 5 and lines[-1][:2] == ["2", "cases;"]
    assert [line[:5] for line in lines[:2]] == [
        ["gated_deltanet", "1", "8192", "12", "chunk16"],
        ["gated_deltanet", "1", "8192", "12", "default"],
    ]
    assert all("1,028" in line and "chunk_gated_delta_rule" in line for line in lines[:4])  # 4 x 128 x 2 + 2 x 2 bytes


def test_ops_that_were_not_built_are_named(folder):
    result = invoke(folder, "--dry-run", "--ops", "gated_deltanet,kda")
    assert result.exit_code == 1 and "not built: kda; `kdagen build --op NAME`" in result.output


def test_a_folder_without_ops_is_refused(tmp_path):
    result = invoke(tmp_path, "--dry-run")
    assert f"no built ops in {tmp_path}" in str(result.exception)


def test_unknown_modes_are_refused(folder):
    result = invoke(folder, "--dry-run", "--modes", "graph,fast")
    assert result.exit_code == 2 and "fast: expected some of device, eager, graph" in result.output


def test_without_a_gpu_it_says_so(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke(folder, "--ops", "linear_attention")
    assert result.exit_code == 1 and "no GPU here: --dry-run shows" in result.output


@pytest.fixture
def machine(monkeypatch):
    """A GPU on which every contender takes as many ms as its label has letters, and computes nothing."""
    import gpu_contenders
    import gpu_forward
    import gpu_timing

    def measure(calls, sets, rounds, mode):
        for call in calls.values():
            call(sets[0])
        return {label: gpu_timing.Times(len(label), len(label) - 1, len(label) + 1, 1, rounds) for label in calls}

    launched = []
    functions = lambda self: {  # noqa: E731
        k["name"]: lambda *tensors, name=k["name"]: launched.append((name, tensors)) for k in self.plan["kernels"]
    }
    facts = {"gpu": "a GPU", "l2_bytes": 50 << 20, "state": {}}
    monkeypatch.setattr(gpu_contenders, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_contenders, "error", lambda *_: 2e-3)
    monkeypatch.setattr(loader.LoadedOp, "functions", functions)
    monkeypatch.setattr(gpu_timing, "measure", measure)
    monkeypatch.setattr(gpu_timing, "facts", lambda: facts)
    monkeypatch.setattr(gpu_timing, "ceilings", lambda: {"copy_bytes_a_second": 1e9, "bf16_flops_a_second": 1e12})
    monkeypatch.setattr(gpu_contenders, "peer", lambda name: Slow())
    return gpu_forward, launched


class Slow:
    """A peer that is right, and as fast as its label is short."""

    label = "fla twenty letters .."

    def __call__(self, given):
        return None


def test_figures_are_ratios_of_one_run(folder, machine, tmp_path):
    benchmark, launched = machine
    (case,) = benchmark.cases([folder], ["gated_deltanet"], 1, [SHAPE[1]], [SHAPE[2]], False)
    out = tmp_path / "out.json"
    benchmark.run([case], ["device"], 7, 100.0, out)
    written = json.loads(out.read_text())
    by_label = {row["contender"]: row for row in written["measured"]}
    assert set(by_label) == {
        f"kdagen {package}{part}" for package in ("chunk16", "default") for part in ("", ": prepare", ": scan")
    } | {Slow.label}
    row, tokens = by_label["kdagen default"], SHAPE[1] * SHAPE[2]
    assert row["times_faster_than_fla"] == len(Slow.label) / len("kdagen default")
    assert row["floor_ms"] == pytest.approx(1e3 * 1028 * tokens / 1e9)
    assert row["of_floor"] == pytest.approx(row["floor_ms"] / len("kdagen default"))
    assert row["bytes_a_second"] == pytest.approx(row["modelled_bytes"] / (len("kdagen default") * 1e-3))
    parts = [by_label[f"kdagen default: {part}"]["modelled_bytes"] for part in ("prepare", "scan")]
    assert sum(parts) == row["modelled_bytes"] and row["error"] == 2e-3 and row["ms"]["calls"] == 7
    assert by_label["kdagen default: scan"]["of_floor"] is None
    name, tensors = launched[-1]
    assert name == "gated_deltanet_scan" and {tuple(t.shape) for t in tensors} >= {(1, 600, 3, 128)}


def test_a_run_out_of_time_says_what_is_missing(folder, machine, tmp_path):
    benchmark, _ = machine
    todo = benchmark.cases([folder], ["linear_attention"], 1, [64], [1], False)
    assert benchmark.run(todo, ["device"], 1, -1.0, tmp_path / "out.json")[0] == []
    assert json.loads((tmp_path / "out.json").read_text())["not_reached"] == ["linear_attention, B = 1, T = 64, H = 1"]


def test_kernels_that_are_off_are_not_timed_and_are_named(folder, machine, monkeypatch, tmp_path):
    benchmark, _ = machine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    errors = iter([1e-3, float("nan"), 1e-3, 1e-3, 1e-3])  # chunk16 (both gates), default (both), the peer
    monkeypatch.setattr(benchmark.contenders, "error", lambda *_: next(errors))
    words = ["--ops", "gated_deltanet", "--tokens", "64", "--heads", "1", "--out", tmp_path / "out.json"]
    result = invoke(folder, *words)
    assert "Error: off against float64, so not timed: gated_deltanet chunk16: nan" in result.output
    assert result.exit_code == 1
    timed = {row["contender"] for row in json.loads((tmp_path / "out.json").read_text())["measured"]}
    assert "kdagen default" in timed and "kdagen chunk16" not in timed


def test_a_launch_that_fails_is_not_timed(folder, machine, monkeypatch, capsys):
    benchmark, _ = machine
    (case,) = benchmark.cases([folder], ["linear_attention"], 1, [64], [1], False)

    def fail(*tensors):
        raise RuntimeError("linear_attention_scan: cuLaunchKernel failed")

    functions = lambda self: {k["name"]: fail for k in self.plan["kernels"]}  # noqa: E731
    monkeypatch.setattr(loader.LoadedOp, "functions", functions)
    errors = benchmark.check(case.op, case.kernels)
    assert math.isnan(errors["default"]) and not benchmark.sound(case, errors).kernels
    assert "linear_attention default: linear_attention_scan: cuLaunchKernel failed" in capsys.readouterr().out


def test_sets_of_inputs_outlast_the_cache():
    import gpu_timing

    assert gpu_timing.sets_needed(1 << 30, 50 << 20) == 1
    assert gpu_timing.sets_needed(60 << 20, 50 << 20) == 4
    assert gpu_timing.sets_needed(1, 50 << 20) == gpu_timing.MOST_SETS


class Clock:
    """Events of a GPU on which each call takes as many ms as it says."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.mark.parametrize("mode", ["device", "eager"])
def test_contenders_take_turns_on_inputs_in_turn(monkeypatch, mode):
    import gpu_timing

    for name, stand_in in (("Event", Clock), ("_sleep", lambda cycles: None), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    made = []

    def contender(label, milliseconds):
        def call(given):
            made.append((label, given))
            Clock.now += next(milliseconds)

        return call

    slow = iter([9.0] * gpu_timing.WARM_UPS + [4.0, 1.0, 3.0, 2.0])
    found = gpu_timing.measure(
        {"slow": contender("slow", slow), "one": contender("one", iter([1.0] * 99))}, "abc", 4, mode
    )
    assert found["slow"].median == 2.5 and found["slow"].least == 1.0 and found["slow"].calls == 4
    assert found["one"].p25 == found["one"].median == found["one"].p75 == 1.0
    timed = made[2 * gpu_timing.WARM_UPS :]
    assert [label for label, _ in timed] == ["slow", "one", "one", "slow"] * 2
    assert "".join(given for _, given in timed) == "abcabcab"
