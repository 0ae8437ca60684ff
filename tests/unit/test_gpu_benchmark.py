"""benchmarks/gpu.py without a GPU: what it reads of built folders, what it would do, checks and reckons.

How its stages are resumed, bounded and kept apart is tested in test_gpu_benchmark_stages.py.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import packages
import pytest
import simulated_gpu
import torch
from click.testing import CliRunner
from kdagen.autotune import cases
from kdagen.autotune.devices import clock
from kdagen.autotune.pool import FATAL, WorkerDied

import kdagen as kg
from kdagen.errors import LaunchError
from kdagen.pipeline import compile_decode, compile_op, compile_training
from kdagen.runtime import loader
from kdagen.state import DEFAULT, StateType

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
    """As pack_for_device.py leaves it: two ops, one of them in chunks of 16 too, and training in two policies."""
    place = tmp_path_factory.mktemp("packed")
    for name in ("gated_deltanet", "linear_attention"):
        packages.write(place / "default", compile_op(kg.load(name)), place)
        packages.write(place / "default", compile_training(kg.load(name)), place)
        packages.write(place / "default", compile_decode(kg.load(name)), place)
    packages.write(place / "short", compile_op(kg.load("gated_deltanet"), schedule={"chunk_size": 16}), place)
    for name in ("gated_deltanet", "kda_softplus"):
        keeping = compile_training(kg.load(name), schedule={"keep": "inputs"})
        packages.write(place / "keep_inputs", keeping, place)
    return place


def invoke(*words):
    import gpu

    return CliRunner().invoke(gpu.main, [str(word) for word in words])


def dry_run(folder, *words) -> list[list[str]]:
    """The words of each line below the titles."""
    result = invoke(folder, "--dry-run", *words)
    assert result.exit_code == 0, result.output
    title, *lines = [line.split() for line in result.output.splitlines() if line]
    assert title[0] == "op"
    return lines


def test_a_dry_run_prints_what_would_be_measured(folder):
    words = ["--ops", "gated_deltanet", "--tokens", "8192,2048", "--heads", "12", "--gates", "mild"]
    *lines, end = dry_run(folder, "--purpose", "inference", *words)
    assert len(lines) == 4 and end[:2] == ["2", "cases;"]
    assert [line[:7] for line in lines[:2]] == [
        ["gated_deltanet", "1", "8192", "12", "inference", "mild", "default"],
        ["gated_deltanet", "1", "8192", "12", "inference", "mild", "short"],
    ]
    assert all("1,028" in line and "chunk_gated_delta_rule" in line for line in lines)  # 4 x 128 x 2 + 2 x 2 bytes


def test_training_is_of_the_kernels_that_train(folder):
    *lines, end = dry_run(folder, "--purpose", "training", "--ops", "gated_deltanet", "--tokens", "2048")
    assert [line[4:7] for line in lines] == [
        ["training", gate, label] for gate in ("mild", "bounded") for label in ("default", "keep_inputs")
    ]
    # the forward's 1,028; backward: q, k, v and d_o are read, d_q, d_k, d_v written, and 2 x 2 x 2 bytes of scalars
    assert end[:2] == ["2", "cases;"] and all(f"{1028 + 7 * 256 + 8:,}" in line for line in lines)


def test_both_purposes_are_measured_unless_one_is_chosen(folder):
    *lines, _ = dry_run(folder, "--ops", "linear_attention", "--tokens", "64", "--gates", "mild", "--quick")
    assert [line[4] for line in lines] == ["inference", "training", *["decode"] * 3]
    assert [line[1:4] for line in lines[2:]] == [[batch, "1", "32"] for batch in ("64", "1", "256")]


def test_ops_that_were_not_built_are_named(folder):
    result = invoke(folder, "--dry-run", "--ops", "gated_deltanet,kda")
    assert result.exit_code == 1 and "not built for inference: kda; `kdagen build --op NAME`" in result.output
    result = invoke(folder, "--dry-run", "--ops", "gla", "--purpose", "training")
    assert "not built for training: gla" in result.output


def test_unless_ops_are_named_those_that_were_built_are_measured(folder):
    words = ["--purpose", "inference,training", "--tokens", "2048", "--gates", "mild", "--stages", "time"]
    *lines, end = dry_run(folder, *words)
    assert {line[0] for line in lines} == {"gated_deltanet"} and end[:2] == ["2", "cases;"]  # linear attention is none


def test_a_folder_without_ops_is_refused(tmp_path):
    result = invoke(tmp_path, "--dry-run")
    assert f"no built ops in {tmp_path}" in str(result.exception)


def test_unknown_modes_are_refused(folder):
    result = invoke(folder, "--dry-run", "--modes", "graph,fast")
    assert result.exit_code == 2 and "fast: expected some of device, eager, graph" in result.output


def test_graphs_are_for_inference(folder):
    result = invoke(folder, "--dry-run", "--modes", "graph", "--ops", "linear_attention")
    assert result.exit_code == 2 and "--modes graph is for inference and decoding" in result.output


def test_without_a_gpu_it_says_so(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke(folder, "--ops", "linear_attention")
    assert result.exit_code == 1 and "no GPU here: --dry-run shows" in result.output


RIGHT = {"ok": True, "reason": "", "errors": {"out": [2e-3, 5e-3]}}


@pytest.fixture
def machine(monkeypatch):
    """A GPU on which every contender takes as many ms as its label has letters, and computes nothing."""
    import gpu
    import gpu_contenders
    import gpu_correct
    import gpu_session
    import gpu_timing
    import gpu_work

    def measure(calls, sets, rounds, mode, mark=None):
        for call in calls.values():
            call(sets[0])
        return {label: gpu_timing.Times(len(label), len(label) - 1, len(label) + 1, 1, rounds) for label in calls}

    launched = []
    functions = lambda self: {  # noqa: E731
        k["name"]: lambda *tensors, name=k["name"]: launched.append((name, tensors)) for k in self.plan["kernels"]
    }
    monkeypatch.setattr(gpu_contenders, "DEVICE", "cpu")
    monkeypatch.setattr(loader.LoadedOp, "functions", functions)
    monkeypatch.setattr(gpu_correct, "check", lambda *_: RIGHT)
    monkeypatch.setattr(gpu_work, "CHECKED", (1, 4, 1))
    for work in gpu_work.WORK.values():
        monkeypatch.setattr(work, "check_peer", lambda *_: {"out": (2e-3, 5e-3)})
    monkeypatch.setattr(gpu_timing, "measure", measure)
    monkeypatch.setattr(gpu_timing, "peak_bytes", lambda call, given: 12345)
    monkeypatch.setattr(gpu_timing, "facts", lambda: dict(FACTS))
    monkeypatch.setattr(gpu_timing, "state", dict)
    monkeypatch.setattr(gpu_timing, "ceilings", lambda: {"copy_bytes_a_second": 1e9, "bf16_flops_a_second": 1e12})
    monkeypatch.setattr(gpu_contenders, "peer", lambda *_: Slow())
    monkeypatch.setattr(gpu_session, "GpuWorker", Here)
    return gpu, launched


FACTS = {
    "date": "2026-01-02T03:04:05+00:00", "gpu": "A made-up GPU", "multiprocessors": 7, "l2_bytes": 0, "state": {},
    "versions": {},
}  # fmt: skip


class Here:
    """gpu_work.py in this process."""

    def __init__(self, folders):
        import gpu_work

        self.bench = gpu_work.Bench(folders, lambda label: None)

    def ask(self, request, timeout, say=None):
        reply = json.loads(self.bench.answer(json.loads(json.dumps(request))))
        if reply.get("error") in FATAL:
            raise WorkerDied(reply["error"], reply["reason"], reply["running"])
        return reply

    def end(self):
        pass


class Slow:
    """A peer that is right, and as fast as its label is short."""

    label, ragged = "fla twenty letters ..", False

    def __call__(self, given):
        return 2 * given["v"], None


def case(folder, op: str, purpose: str, tokens: int = SHAPE[1], heads: int = SHAPE[2], gate: str = "mild", batch=1):
    import gpu_cases

    (only,), none = gpu_cases.cases([folder], [purpose], [op], [gate], batch, [tokens], [heads], False)
    assert not none
    return only


def run(benchmark, folder, todo, out, seconds=100.0) -> dict:
    """The JSON file."""
    import gpu_cases

    session = benchmark.Session([folder], out, time.monotonic() + seconds, worker=Here)
    benchmark.run(session, ["time"], {"time": gpu_cases.time_units(todo, ["device"], 7)})
    return json.loads(session.results.path.read_text())


def measured(benchmark, folder, todo, out) -> dict:
    """Rows of the JSON file by contender and part."""
    records = [r for r in run(benchmark, folder, todo, out)["records"] if r["stage"] == "time"]
    assert records and all("failed" not in record for record in records), records
    return {(row["contender"], row["part"]): row for record in records for row in record["figures"]["rows"]}


def test_figures_are_ratios_of_one_run(folder, machine, tmp_path):
    benchmark, launched = machine
    found = measured(benchmark, folder, [case(folder, "gated_deltanet", "inference")], tmp_path)
    parts = ("", "index", "prepare", "scan")
    assert set(found) == {(f"kdagen {k}", part) for k in ("short", "default") for part in parts} | {(Slow.label, "")}
    row, tokens = found["kdagen default", ""], SHAPE[1] * SHAPE[2]
    assert row["times_faster_than_fla"] == len(Slow.label) / len("kdagen default")
    assert row["floor_ms"] == pytest.approx(1e3 * 1028 * tokens / 1e9)
    assert row["of_floor"] == pytest.approx(row["floor_ms"] / len("kdagen default"))
    assert row["bytes_a_second"] == pytest.approx(row["modelled_bytes"] / (len("kdagen default") * 1e-3))
    assert row["of_copy"] == pytest.approx(row["bytes_a_second"] / 1e9)
    assert sum(found["kdagen default", part]["modelled_bytes"] for part in parts[1:]) == row["modelled_bytes"]
    assert row["error"] == 2e-3 and row["ms"]["calls"] == 7
    scan = found["kdagen default", "scan"]
    assert scan["of_floor"] is None and scan["times_faster_than_fla"] is None
    name, tensors = launched[-1]
    assert name == "gated_deltanet_scan" and {tuple(t.shape) for t in tensors if torch.is_tensor(t)} >= {(600, 3, 128)}


def test_training_is_forward_and_backward(folder, machine, tmp_path):
    benchmark, launched = machine
    todo = [case(folder, "gated_deltanet", "training", gate="bounded")]
    found = measured(benchmark, folder, todo, tmp_path)
    passes = ("", "forward", "backward")
    kernels = {"default": ["index", "prepare", "scan", "reverse", "gradients"]}
    kernels["keep_inputs"] = [*kernels["default"], "replay"]
    expected = {(f"kdagen {k}", part) for k, families in kernels.items() for part in (*passes, *families)}
    assert set(found) == expected | {(Slow.label, part) for part in passes}
    for part in passes:
        row = found["kdagen keep_inputs", part]
        both = (": ".join(filter(None, (label, part))) for label in (Slow.label, "kdagen keep_inputs"))
        assert row["times_faster_than_fla"] == pytest.approx(len(next(both)) / len(next(both)))
        assert row["purpose"] == "training" and row["gate"] == "bounded"
    whole, forward, backward = (found["kdagen keep_inputs", part] for part in passes)
    assert whole["peak_bytes"] == found[Slow.label, ""]["peak_bytes"] == 12345 and forward["peak_bytes"] is None
    for figure in ("modelled_bytes", "floor_ms"):
        assert whole[figure] == pytest.approx(forward[figure] + backward[figure])
    moved = {family: found["kdagen keep_inputs", family]["modelled_bytes"] for family in kernels["keep_inputs"]}
    assert backward["modelled_bytes"] == pytest.approx(sum(moved.values()) - moved["scan"])  # all others are in both
    names = [name.removeprefix("gated_deltanet_") for name, _ in launched]
    passes = ["index", "prepare", "scan", "index", "prepare", "reverse", "gradients"]
    assert names[:9] == [*passes, "index", "prepare"]  # whole, then the forward


def test_a_parameter_that_is_a_sum_over_sequences(folder, machine, tmp_path):
    benchmark, _ = machine
    found = measured(benchmark, folder, [case(folder, "kda_softplus", "training", 64)], tmp_path)
    assert found["kdagen keep_inputs", "backward"]["times_faster_than_fla"]


@pytest.mark.usefixtures("machine")
def test_ops_as_people_call_them_go_through_autograd(folder, monkeypatch):
    """Contender and peer alike: gradients of all arguments that the output depends on, forward outside the clock."""
    import gpu_training
    import gpu_work

    only = case(folder, "gated_deltanet", "training", 20, 1)
    monkeypatch.setattr(gpu_training, "called", lambda kernels: Slow())
    calls = gpu_training.calls(only, "eager", Slow())
    labels = ("kdagen default", "kdagen keep_inputs", Slow.label)
    assert list(calls) == [label + part for label in labels for part in ("", ": forward", ": backward")]
    (given,) = gpu_work.inputs(only, 0)
    for label in labels:
        d_q, d_k, d_v, *_ = calls[label](given)
        assert d_q is None and torch.equal(d_v, 2 * given["d_out"])
        made = calls[f"{label}: backward"].before(given)
        assert made[1].grad_fn and torch.equal(calls[f"{label}: backward"].run(made)[2], d_v)


def test_a_run_out_of_time_says_what_is_missing(folder, machine, tmp_path):
    found = run(machine[0], folder, [case(folder, "linear_attention", "inference", 64, 1)], tmp_path, 1.0)
    assert found["records"] == []
    name = "time: linear_attention, inference, mild gates, B = 1, T = 64, H = 1"
    assert found["left"][-1] == f"{name}: no time"


def test_a_case_that_is_too_large_is_left_out(folder, machine, monkeypatch, tmp_path):
    import gpu_timing

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(gpu_timing, "measure", full)
    todo = [case(folder, "linear_attention", p, 64, 1) for p in ("inference", "decode")]
    found = run(machine[0], folder, todo, tmp_path)
    failed = [record["failed"] for record in found["records"] if record["stage"] == "time"]
    assert failed == ["out of memory: CUDA out of memory. Tried to allocate 2 GiB"] * 2


@pytest.mark.parametrize("purpose", ["inference", "training"])
def test_kernels_that_are_off_are_not_timed_and_are_named(folder, machine, monkeypatch, tmp_path, purpose):
    import gpu_correct

    other = {"inference": "short", "training": "keep_inputs"}[purpose]
    off = {"ok": False, "reason": "d_q is off by 0.3", "errors": {"out": [1e-3, 5e-3], "d_q": [0.3, 8e-3]}}
    check = lambda op, kernels: off if kernels.folder.parts[-3] == other else RIGHT  # noqa: E731
    monkeypatch.setattr(gpu_correct, "check", check)
    words = ["--ops", "gated_deltanet", "--tokens", "64", "--heads", "1", "--out", tmp_path]
    result = invoke(folder, "--purpose", purpose, "--stages", "correct,time", "--gates", "mild", *words)
    assert f"off against float64, so not timed: gated_deltanet, {purpose}, {other}: d_q is off" in result.output
    assert result.exit_code == 1
    (record,) = (r for r in json.loads(next(tmp_path.glob("*.json")).read_text())["records"] if r["stage"] == "time")
    timed = {row["contender"] for row in record["figures"]["rows"]}
    assert "kdagen default" in timed and f"kdagen {other}" not in timed
    assert record["left_out"] == {other: "d_q is off by 0.3"}


def test_a_launch_that_fails_is_not_timed(folder, machine, monkeypatch, tmp_path):
    import gpu_correct

    def fail(*_):
        raise LaunchError("linear_attention_scan: cuLaunchKernel failed")

    monkeypatch.setattr(gpu_correct, "check", fail)
    found = run(machine[0], folder, [case(folder, "linear_attention", "inference", 64, 1)], tmp_path)
    (record,) = found["records"]
    assert record["failed"] == "device error: linear_attention_scan: cuLaunchKernel failed"
    assert found["left"][0].endswith("no kernels that are right")


@pytest.mark.parametrize("peer", [lambda *_: {"d_q": (0.3, 5e-2)}, lambda *_: 1 / 0], ids=["off", "does not run"])
def test_a_peer_that_is_off_or_does_not_run_is_left_out(folder, machine, monkeypatch, tmp_path, peer):
    import gpu_training

    monkeypatch.setattr(gpu_training, "check_peer", peer)
    todo = [case(folder, "linear_attention", "training", 64, 1)]
    found = run(machine[0], folder, todo, tmp_path)["records"]
    words = "does not run here: ZeroDivisionError: division by zero", "d_q is off by 3.0e-01"
    assert found[-1]["left_out"]["peer"] in words
    assert {row["contender"] for row in found[-1]["figures"]["rows"]} == {"kdagen default"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Ops that are small enough to run as programs."""
    place = tmp_path_factory.mktemp("small")
    for make in (compile_op, compile_training, compile_decode):
        packages.write(place / "default", make(kg.load("linear_attention"), 64), place)
    return place


class LinearAttention:
    """A peer in torch, of the recurrence without a state to start from; `scale` makes it another."""

    label = "plain linear attention"

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, given):
        q, k, v = (given[n].double().transpose(1, 2) for n in "qkv")
        o = self.scale * (q @ k.mT).tril() @ v
        state = given.get("initial_state", torch.zeros(())).double()
        o, state = o + self.scale * (q @ state if state.dim() else 0), state + k.mT @ v
        return o.transpose(1, 2).to(given["v"].dtype), state.float()


@pytest.mark.parametrize("purpose", ["inference", "training", "decode"])
def test_contenders_are_checked_against_the_recurrence(small, monkeypatch, purpose):
    import gpu_contenders
    import gpu_correct
    import gpu_work

    simulated_gpu.install(monkeypatch)
    monkeypatch.setattr(gpu_contenders, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_work, "CHECKED", (2, 40, 1))
    monkeypatch.setattr(gpu_correct, "SHAPES", dict.fromkeys(gpu_correct.SHAPES, (1, 20, 2)) | {"decode": (2, 1, 1)})
    monkeypatch.setattr(gpu_correct, "REPLAYS", 2)
    monkeypatch.setattr(cases, "SHORT", (7, 1, 20))
    monkeypatch.setattr(cases, "LONG", (33,))
    only = case(small, "linear_attention", purpose)
    peers = {"out", "final_state"} | ({"d_q", "d_k", "d_v"} if purpose == "training" else set())
    ours = (
        {"out", "state_pool"}
        if purpose == "decode"
        else peers | ({"d_initial_state"} if purpose == "training" else set())
    )
    found = gpu_correct.check(only.op, only.first)
    assert found["ok"] and found["replays"] == found["graphs"] == 2 and set(found["errors"]) == ours
    assert all(0 < error <= most for error, most in found["errors"].values())
    work = gpu_work.WORK[purpose]
    found = gpu_work.check_peer(work, only.op, LinearAttention(), only.first)
    assert found["ok"] and set(found["errors"]) == peers
    assert not gpu_work.check_peer(work, only.op, LinearAttention(1.1), only.first)["ok"]


@pytest.mark.parametrize("lengths", [(), (9, 0, 13)], ids=["batch", "ragged"])
@pytest.mark.parametrize("purpose", ["inference", "training"])
def test_what_is_timed_computes_what_was_checked(small, monkeypatch, purpose, lengths):
    """Bare launches on their own workspaces leave the results that a launch gives."""
    import gpu_contenders
    import gpu_work

    simulated_gpu.install(monkeypatch)
    monkeypatch.setattr(gpu_contenders, "DEVICE", "cpu")
    only = case(small, "linear_attention", purpose, 20, 1)
    if lengths:
        only = replace(only, shape=(1, sum(lengths), 1), lengths=lengths)
    (given,), kernels = gpu_work.inputs(only, 0), only.kernels["default"]
    gpu_work.WORK[purpose].calls(only, "device", None)["kdagen default"](given)
    made = kernels.launch(given["arguments"])
    names = [kernels.by_role["out"]]
    if purpose == "training":
        kept = {name: made[name] for name in kernels.kept}
        d_out = {kernels.by_role["d_out"]: given["d_out"]}
        made |= kernels.launch({**given["arguments"], **kept, **d_out}, "backward")
        names += [name for name in made if name.endswith("_out") and name.startswith("d_")]
        assert len(names) == 4
    assert all(made[n].any() and torch.equal(made[n].flatten(0, 1), given["default"][n]) for n in names)


def test_decoding_is_timed_in_place(small, monkeypatch):
    import gpu_contenders
    import gpu_work

    simulated_gpu.install(monkeypatch)
    monkeypatch.setattr(gpu_contenders, "DEVICE", "cpu")
    only = case(small, "linear_attention", "decode", heads=2, batch=3)
    assert only.shape == (3, 1, 2)
    (given,), kernels = gpu_work.inputs(only, 0), only.first
    before = given["states"].clone()
    calls = gpu_work.WORK["decode"].calls(only, "device", LinearAttention())
    calls["kdagen default"](given)
    made = kernels.launch({**given["arguments"], "state_pool": before}, "decode")
    assert torch.equal(made["o_out"].flatten(0, 1), given["default"]["o_out"])
    assert torch.equal(before, given["default"]["state_pool"]) and not torch.equal(before, given["states"])
    assert torch.allclose(calls[LinearAttention.label](given)[1], before, atol=1e-2)


def test_the_bandwidth_of_decoding_is_of_states_read_and_written(folder, machine, tmp_path):
    benchmark, launched = machine
    only = case(folder, "gated_deltanet", "decode", heads=5, batch=4)
    row = measured(benchmark, folder, [only], tmp_path)["kdagen default", ""]
    states = 2 * 4 * 5 * 128 * 128 * 4
    tokens = 4 * 5 * (4 * 128 * 2 + 2 * 2)
    assert row["floor_ms"] == pytest.approx(1e3 * (states + tokens) / 1e9)
    assert row["modelled_bytes"] >= states + tokens and row["of_copy"] == pytest.approx(row["bytes_a_second"] / 1e9)
    assert {name for name, _ in launched} == {"gated_deltanet_decode"}


def test_states_of_another_type_have_a_floor_of_their_own(folder, machine, tmp_path):
    small = StateType("KV", "bfloat16")
    place = tmp_path / "ops"
    for name, state in (("default", DEFAULT), ("state_bf16", small)):
        packages.write(place / name, compile_decode(kg.load("linear_attention"), 64, state=state), tmp_path)
    found = measured(machine[0], place, [case(place, "linear_attention", "decode", heads=2, batch=4)], tmp_path)
    floors = [found[f"kdagen {label}", ""]["floor_ms"] for label in ("default", "state_bf16")]
    assert floors[0] - floors[1] == pytest.approx(1e3 * 2 * 4 * 2 * 64 * 64 * 2 / 1e9)


def test_types_of_states_are_timed_in_decoding_alone():
    import gpu_cases

    built = dict.fromkeys(("chunk32", "default", "keep_all", "state_vk"))
    assert list(gpu_cases.timed("decode", built)) == ["default", "keep_all", "state_vk"]
    assert list(gpu_cases.timed("inference", built)) == ["default", "keep_all"]
    assert list(gpu_cases.timed("inference", {"chunk32": None})) == ["chunk32"]


def test_ragged_batches_are_measured_too(folder, machine, tmp_path):
    benchmark, launched = machine
    import gpu_cases

    todo, _ = gpu_cases.cases([folder], ["inference"], ["linear_attention"], ["mild"], None, [], [], True)
    (ragged,) = (c for c in todo if c.lengths)
    assert ragged.shape == (1, 8192, 64) and len(ragged.lengths) == 6
    assert str(ragged) == "linear_attention, inference, mild gates, B = 1, T = 8192 in 6 sequences, H = 64"
    assert ragged.peer is None and todo[0].peer  # that one takes no cu_seqlens
    small = replace(ragged, shape=(1, 20, 1), lengths=(13, 0, 7))
    row = measured(benchmark, folder, [small], tmp_path)["kdagen default", ""]
    assert row["lengths"] == [13, 0, 7]
    index = next(given for name, given in launched if name.endswith("index"))
    assert index[0].tolist() == [0, 13, 13, 20] and index[0].dtype == torch.int32


def test_shapes_that_are_chosen_are_measured_alone(folder):
    import gpu_cases

    assert gpu_cases.shapes("inference", 2, [64], [], False) == [((2, 64, 64), ())]
    assert gpu_cases.shapes("decode", None, [], [12], False) == [((b, 1, 12), ()) for b in (1, 32, 256)]
    assert gpu_cases.shapes("decode", 8, [], [], True) == [((8, 1, 32), ())]
    decoded = [b for (b, _, h), _ in gpu_cases.shapes("decode", None, [], [], False) if h == 32]
    assert sorted(decoded) == [2**i for i in range(9)] and decoded[0] == 64
    assert [sum(lengths) for _, lengths in gpu_cases.shapes("training", None, [], [], False) if lengths] == [8192] * 4


def test_what_matters_most_comes_first(folder):
    import gpu_cases

    asked = [folder], ["inference", "decode"], ["gated_deltanet", "linear_attention"], ["mild", "bounded"]
    first, more = gpu_cases.cases(*asked, None, [], [], False)
    assert [(c.shape, c.gate) for c in first[:8:2]] == [
        ((1, 8192, 64), "mild"), ((1, 8192, 96), "mild"), ((1, 8192, 12), "mild"), ((1, 8192, 64), "mild")
    ]  # fmt: skip
    assert {c.gate for c in first[16:]} == {"bounded"} and len(first) == 2 * 2 * 2 * gpu_cases.FIRST
    assert {c.gate for c in more} == {"mild"} and len(more) == 2 * 2 * (gpu_cases.OTHERS - gpu_cases.FIRST)


def test_packed_decoding_has_a_package_for_each_type_of_states():
    import pack_for_device

    found = pack_for_device.decode_sources("sm90", ["linear_attention", "retnet"], ["retnet"])
    listed = {package: [(s.name, s.passes and [*s.passes][0]) for s in sources] for package, sources in found.items()}
    both = [("retnet", None), ("retnet", "decode")]
    assert listed == {
        "default": [("linear_attention", "decode"), ("retnet", "decode")],
        "state_vk": both,
        "state_bf16": both,
        "state_vk_bf16": both,
    }


def test_sets_of_inputs_outlast_the_cache():
    assert clock.sets_needed(1 << 30, 50 << 20) == 1
    assert clock.sets_needed(60 << 20, 50 << 20) == 4
    assert clock.sets_needed(1, 50 << 20) == clock.MOST_SETS


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

    slow = iter([9.0] * clock.WARM_UPS + [4.0, 1.0, 3.0, 2.0])
    found = gpu_timing.measure(
        {"slow": contender("slow", slow), "one": contender("one", iter([1.0] * 99))}, "abc", 4, mode
    )
    assert found["slow"].median == 2.5 and found["slow"].least == 1.0 and found["slow"].calls == 4
    assert found["one"].p25 == found["one"].median == found["one"].p75 == 1.0
    timed = made[2 * clock.WARM_UPS :]
    assert [label for label, _ in timed] == ["slow", "one", "one", "slow"] * 2
    assert "".join(given for _, given in timed) == "abcabcab"


def test_what_comes_before_is_not_timed(monkeypatch):
    import gpu_timing

    slept = []
    for name, stand_in in (("Event", Clock), ("_sleep", slept.append), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def passes(milliseconds):
        def run(given):
            Clock.now += milliseconds
            return f"{given}, {milliseconds}"

        return run

    def run(made):
        assert made == "set, 5"
        return passes(2)(made)

    found = gpu_timing.measure({"backward": clock.Call(run, passes(5), ahead=77)}, ["set"], 3, "device")
    assert found["backward"].median == 2 and slept == [77] * 3


def test_the_peak_is_of_a_call_alone_and_not_of_the_first(monkeypatch):
    import gpu_timing

    memory = {"now": 100, "most": 0}
    tuning = iter([1000, 0])

    def call(given):
        memory["most"] = max(memory["most"], memory["now"] + 30 + next(tuning))

    stand_ins = {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: memory.update(most=memory["now"]),
        "memory_allocated": lambda: memory["now"],
        "max_memory_allocated": lambda: memory["most"],
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert gpu_timing.peak_bytes(call, None) == 30


def test_packed_training_has_a_package_a_policy():
    import pack_for_device

    found = pack_for_device.training_sources("sm90", ["linear_attention", "gated_deltanet"], ["gated_deltanet"])
    listed = {package: [(s.name, s.schedule["keep"]) for s in sources] for package, sources in found.items()}
    assert listed == {
        "default": [("linear_attention", "states"), ("gated_deltanet", "states")],
        "keep_inputs": [("gated_deltanet", "inputs")],
        "keep_all": [("gated_deltanet", "all")],
    }


def test_variants_that_differ_are_packed_and_those_that_cannot_be_are_named(monkeypatch, capsys):
    import pack_for_device

    def no_split(recurrence, arch, schedule=None):
        if "output" in (schedule or {}):
            raise pack_for_device.ScheduleError("no room")
        return compile_op(recurrence, arch=arch, schedule=schedule)

    monkeypatch.setattr(pack_for_device, "compile_op", no_split)
    ops = ["linear_attention", "retnet"]
    found = pack_for_device.sources("sm90", ops, ["retnet"], ["chunk16", "chunk32", "split"])
    assert {package: [s.name for s in sources] for package, sources in found.items()} == {
        "default": ops,
        "chunk16": ["retnet"],  # chunks of 32 are its default
    }
    assert capsys.readouterr().out == "split of retnet left out: no room\n"
