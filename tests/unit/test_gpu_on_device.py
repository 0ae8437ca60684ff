"""benchmarks/on_device.py without a GPU: what it starts, in which order, how long it lasts, what it goes on with."""

import json
import sys
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

GPU = '["A made-up GPU", "2.13", "13.0"]'


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import on_device

    monkeypatch.setattr(on_device, "facts", lambda: GPU)
    monkeypatch.setattr(on_device, "LEAST", 0.5)
    return on_device


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def ops(tmp_path):
    place = tmp_path / "ops" / "default" / "x"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("one")
    return tmp_path / "ops"


def call(script, out, seconds=30.0):
    out.mkdir(exist_ok=True)
    return script.Call(out, time.monotonic() + seconds)


def steps(out) -> dict:
    return {name: found["outcome"] for name, found in json.loads((out / "steps.json").read_text()).items()}


def test_what_is_done_is_not_done_again(script, tmp_path):
    mark = tmp_path / "mark"
    step = script.Step("a", python(f"open({str(mark)!r}, 'a').write('x'); print('well')"), "under")
    for _ in range(2):
        call(script, tmp_path / "out").run(step)
    assert mark.read_text() == "x" and steps(tmp_path / "out") == {"a": "done"}
    step.under = "other kernels"
    call(script, tmp_path / "out").run(step)
    assert mark.read_text() == "xx"
    assert (tmp_path / "out" / "log.txt").read_text().count("well") == 2


def test_what_fails_is_said_and_not_tried_again(script, tmp_path):
    step = script.Step("a", python("print('3 failed'); raise SystemExit(1)"), "under")
    first = call(script, tmp_path)
    first.run(step)
    assert steps(tmp_path) == {"a": "failed"} and first.steps["a"]["said"] == "3 failed"
    assert call(script, tmp_path).done(step)


def test_what_has_more_to_do_goes_on_even_where_something_is_wrong(script, tmp_path):
    step = script.Step("a", python("raise SystemExit(1)"), "under", until_done=False)
    first = call(script, tmp_path)
    first.run(step)
    assert steps(tmp_path) == {"a": "failed"} and not first.done(step)


def test_a_call_ends_in_time_with_all_that_it_started(script, tmp_path):
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); import time"
    )
    started = time.monotonic()
    bounded = call(script, tmp_path, 1.5)
    bounded.run(script.Step("a", python(f"{code}; print('begun', flush=True); time.sleep(60)"), "under"))
    bounded.run(script.Step("b", python(""), "under"))  # no time is left for it
    assert time.monotonic() - started < 10
    assert steps(tmp_path) == {"a": "cut off"} and not bounded.done(script.Step("a", [], "under"))


def test_a_step_that_takes_longer_than_any_should_has_failed(script, tmp_path):
    call(script, tmp_path).run(script.Step("a", python("import time; time.sleep(60)"), "under", seconds=1.0))
    assert steps(tmp_path) == {"a": "failed"}


def test_several_at_a_time_those_never_tried_first(script, tmp_path):
    several = call(script, tmp_path)
    several.steps["a"] = {"under": "old", "outcome": "cut off"}
    order = []
    several.run = lambda step: order.append(step.name)
    several.each([script.Step(name, [], "new") for name in "abc"], 1)
    assert order == ["b", "c", "a"]


def test_every_file_of_tests_has_a_process_and_a_place(script, ops):
    *files, alone = script.test_steps(ops, "under")
    assert len(files) == len(list((script.ROOT / "tests" / "gpu").glob("test_*.py"))) > 5
    assert all(step.command[-2:-1] == ["not beyond_32_bits"] for step in files)
    assert alone.command[-2:] == ["beyond_32_bits", str(script.ROOT / "tests" / "gpu")]
    assert {step.environment["KDAGEN_BUILD_DIR"] for step in files} == {str(ops / "default")}


def test_the_stages_of_gpu_py_are_all_in_some_step(script):
    import gpu_cases

    named = ",".join(script.STAGES.values()).split(",")
    assert sorted(named) == sorted(gpu_cases.STAGES) and {*script.STAGES} < {*script.STEPS}


@pytest.fixture
def sweeps(tmp_path):
    for name in ("kda", "dplr"):
        (tmp_path / "sweeps" / name).mkdir(parents=True)
        (tmp_path / "sweeps" / name / "sweep.json").write_text(name)
        (tmp_path / "sweeps" / name / "log.jsonl").write_text("planned\n")
    return tmp_path / "sweeps"


def made_up(script, monkeypatch, left=()):
    """Commands that leave what gpu.py, pytest and kdagen would."""
    monkeypatch.setattr(script, "LEAST", 2.0)

    def gpu_step(name, ops, out, under, minutes):
        path, found = str(out / "H100-2026-01-02.json"), json.dumps({"left": list(left)})
        code = f"open({path!r}, 'w').write({found!r}); print({name!r})"
        return script.Step(name, python(code), under, until_done=False)

    def sweep_step(folder, under, seconds):
        code = f"open({str(folder / 'log.jsonl')!r}, 'a').write('measured\\n')"
        return script.Step(f"sweep {folder.name}", python(code), under, until_done=False)

    monkeypatch.setattr(script, "gpu_step", gpu_step)
    monkeypatch.setattr(script, "sweep_step", sweep_step)
    monkeypatch.setattr(
        script, "test_steps", lambda ops, under: [script.Step(f"tests {n}", python(""), under) for n in "ab"]
    )


def invoke(script, *words):
    return CliRunner().invoke(script.main, [str(word) for word in words])


def test_all_of_it_in_one_call_then_nothing_in_the_next(script, monkeypatch, ops, sweeps, tmp_path):
    made_up(script, monkeypatch)
    first = invoke(script, ops, "--sweeps", sweeps, "--out", tmp_path / "out")
    assert first.exit_code == 0 and first.output.splitlines()[-1].endswith("out: all is done"), first.output
    done = ["correct", "tests a", "tests b", "time", "questions", "sweep dplr", "sweep kda", "more"]
    assert steps(tmp_path / "out") == dict.fromkeys(done, "done")
    files = {"H100-2026-01-02.json", "steps.json", "log.txt", "sweeps.tar.gz"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    again = invoke(script, ops, "--sweeps", sweeps, "--out", tmp_path / "next", "--earlier", tmp_path / "out")
    assert again.output.splitlines() == [GPU, f"{tmp_path / 'next'}: all is done"]


def test_what_is_left_is_said(script, monkeypatch, ops, tmp_path):
    made_up(script, monkeypatch, left=["time: a case: no time"])
    found = invoke(script, ops, "--out", tmp_path / "out", "--steps", "time,tests")
    assert found.output.splitlines()[-1].endswith("to go on with, or failed: time")


def test_what_cannot_be_timed_is_not_waited_for(script, monkeypatch, ops, tmp_path):
    made_up(script, monkeypatch, left=["time: a case: no kernels that are right"])
    assert invoke(script, ops, "--out", tmp_path / "out", "--steps", "time").output.endswith("all is done\n")


def test_logs_of_sweeps_travel_in_one_file(script, monkeypatch, ops, sweeps, tmp_path):
    made_up(script, monkeypatch)
    invoke(script, ops, "--sweeps", sweeps, "--out", tmp_path / "out", "--steps", "sweeps")
    with tarfile.open(tmp_path / "out" / "sweeps.tar.gz") as tar:
        assert tar.extractfile("kda/log.jsonl").read() == b"planned\nmeasured\n"
    (sweeps / "kda" / "log.jsonl").write_text("planned\n")  # a checkout as it was carried
    (tmp_path / "next").mkdir()
    script.take(tmp_path / "out", tmp_path / "next", [sweeps / "kda"])
    assert (sweeps / "kda" / "log.jsonl").read_text() == "planned\nmeasured\n"
    (sweeps / "kda" / "log.jsonl").write_text("planned\nmeasured\nmore\n")
    script.take(tmp_path / "out", tmp_path / "next", [sweeps / "kda"])
    assert (sweeps / "kda" / "log.jsonl").read_text().endswith("more\n")


def test_steps_that_there_are_none_of(script, ops, tmp_path):
    found = invoke(script, ops, "--out", tmp_path, "--steps", "time,fast")
    assert found.exit_code == 2 and "--steps fast: expected some of correct, tests, time" in found.output


def test_without_a_gpu_it_says_so(monkeypatch, ops, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import on_device

    monkeypatch.setattr(on_device, "FACTS", "raise RuntimeError('no NVIDIA driver')")
    found = invoke(on_device, ops, "--out", tmp_path)
    assert found.exit_code == 1 and "no GPU here: RuntimeError: no NVIDIA driver" in found.output
