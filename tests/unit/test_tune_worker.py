"""The process that owns a device, spoken to over its pipes, and what it makes of exceptions."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from kdagen.autotune import worker
from kdagen.autotune.devices import DeviceError
from kdagen.autotune.worker import Server, contender_fields
from recordings import BEST, CLOSE, DEFAULT, SHAPE, WRONG, faulty, recording

from kdagen.errors import ArgumentError, ArtefactError, LaunchError


@pytest.fixture
def spec(tmp_path):
    return recording(tmp_path / "recorded.jsonl")


def start(spec) -> subprocess.Popen:
    command = [sys.executable, "-m", "kdagen.autotune.worker", spec]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def talk(spec, *requests) -> list[dict]:
    process = start(spec)
    replies = [json.loads(process.stdout.readline())]
    for request in requests:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        replies.append(json.loads(process.stdout.readline()))
    process.stdin.close()
    process.wait(5)
    process.stdout.close()
    process.stderr.close()
    return replies


def request(do, *candidates, **fields) -> dict:
    shape = {} if do == "check" else {"workload": str(SHAPE), "policy": "device cold"}
    return {"do": do, "contenders": [contender_fields(c, None) for c in candidates], **shape, **fields}


def test_requests_are_answered_in_turn(spec):
    final = request("final", DEFAULT, BEST, seconds=0.05, seed=0, default=DEFAULT.id)
    screens = request("screen", DEFAULT, best_ms=None), request("screen", DEFAULT, best_ms=0.1)
    ready, facts, right, wrong, *screened, raced = talk(
        spec, {"do": "facts"}, request("check", BEST), request("check", WRONG), *screens, final
    )
    assert ready == {"ready": True}
    assert facts["facts"]["device"] == "A made-up GPU" and facts["state"] == {"clocks": {"sm": 1755}}
    assert right == {"ok": True, "reason": "", "errors": {"output": [0.002, 0.005]}}
    assert wrong["ok"] is False and wrong["reason"] == "output is 0.31 from the recurrence"
    assert [s["stopped"] for s in screened] == [False, True] and screened[0]["ms"] == pytest.approx(1, rel=0.05)
    assert set(raced["intervals"]) == {DEFAULT.id, BEST.id} and raced["state"]["after"] == {"clocks": {"sm": 1755}}
    median, low, high, calls = raced["intervals"][BEST.id]
    assert low <= median <= high and median == pytest.approx(0.8, rel=0.02) and calls >= 6


def test_a_replay_is_the_same_each_time(spec):
    one, two = (talk(spec, request("screen", CLOSE, best_ms=None))[1] for _ in range(2))
    other = talk(f"{spec}?seed=1", request("screen", CLOSE, best_ms=None))[1]
    assert one == two != other


def test_a_device_that_does_not_open_is_said_so():
    (reply,) = talk("replay:nowhere.jsonl")
    assert reply["error"] == "ArgumentError" and reply["reason"].startswith("nowhere.jsonl records nothing")


def test_an_error_names_who_ran_and_the_worker_goes_on(tmp_path, spec):
    spec = faulty(spec, tmp_path / "faults", ("error", "samplers", BEST, [1]))
    asked = request("final", DEFAULT, BEST, seconds=0, seed=0, default=None)
    _, failed, raced = talk(spec, asked, asked)
    assert failed == {"error": "error", "reason": "RuntimeError: asked of a recording", "running": BEST.id}
    assert "intervals" in raced


def test_after_a_sticky_error_it_ends(tmp_path, spec):
    spec = faulty(spec, tmp_path / "faults", ("device error", "check", None, [1]))
    process = start(spec)
    process.stdin.write(json.dumps(request("check", BEST)) + "\n")
    process.stdin.flush()
    replies = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert replies[1]["error"] == "device error" and process.wait(5) == 0
    process.communicate()


def test_it_ends_with_who_asks_even_amid_a_request(tmp_path, spec):
    process = start(faulty(spec, tmp_path / "faults", ("hang", "check", None, [1])))
    process.stdin.write(json.dumps(request("check", BEST)) + "\n")
    process.stdin.flush()
    process.stdin.close()
    began = time.monotonic()
    assert process.wait(5) == 0 and time.monotonic() - began < 4
    process.stdout.close()
    process.stderr.close()


# -- in this process --------------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    pass


class AcceleratorError(RuntimeError):
    pass


@pytest.mark.parametrize(
    "error, kind, words",
    [
        (OutOfMemoryError("CUDA out of memory.\nTried"), "out of memory", "CUDA out of memory."),
        (
            AcceleratorError("CUDA error: an illegal memory access"),
            "device error",
            "CUDA error: an illegal memory access",
        ),
        (RuntimeError("CUDA error: misaligned address"), "device error", "CUDA error: misaligned address"),
        (LaunchError("the driver refused"), "device error", "the driver refused"),
        (DeviceError("it is gone"), "device error", "it is gone"),
        (ArtefactError("a.so is missing"), "unreadable", "a.so is missing"),
        (ArgumentError("no such policy"), "error", "no such policy"),
        (KeyError("scan"), "error", "KeyError: 'scan'"),
        (ValueError(), "error", "ValueError: "),
    ],
)
def test_kinds_of_errors(error, kind, words):
    assert (worker.kind(error), worker.words(error)) == (kind, words)


def test_torch_out_of_memory_is_one():
    import torch

    assert worker.kind(torch.OutOfMemoryError("CUDA out of memory")) == "out of memory"


class Fake:
    """A device that answers what a test says, and prints."""

    def __init__(self, ms=1.0, errors=None):
        self.ms, self.errors, self.built = ms, errors or {}, []

    def check(self, candidate, compiled):
        return {"ok": False, "reason": "far off", "errors": self.errors, "oracle": "recurrence"}

    def state(self):
        return {}

    def samplers(self, contenders, workload, policy):
        self.built.append([c.id for c, _ in contenders])
        return {c.id: lambda: self.ms for c, _ in contenders}


def test_contenders_are_made_one_at_a_time_and_marked_before_each_call():
    marks, fake = [], Fake()
    answer = Server(fake, marks.append).answer(request("final", DEFAULT, BEST, seconds=0, seed=0, default=DEFAULT.id))
    assert fake.built == [[DEFAULT.id], [BEST.id]] and marks[:2] == [DEFAULT.id, BEST.id]
    calls = sum(i[3] for i in json.loads(answer)["intervals"].values())
    assert len(marks) == 2 + calls and set(marks) == {DEFAULT.id, BEST.id}


def test_infinite_errors_of_a_wrong_kernel_are_text():
    fake = Fake(errors={"out": [float("nan"), 1e-3], "state": [float("inf"), 1e-3]})
    answer = json.loads(Server(fake, print).answer(request("check", BEST)))
    assert answer["errors"] == {"out": ["nan", 1e-3], "state": ["inf", 1e-3]}
    assert answer["oracle"] == "recurrence"


def test_a_time_that_is_no_number_is_an_error():
    answer = json.loads(Server(Fake(ms=float("nan")), print).answer(request("screen", BEST, best_ms=None)))
    assert answer["error"] == "error" and "JSON" in answer["reason"]


def test_what_devices_print_does_not_get_among_replies(tmp_path):
    code = (
        "import sys, os; from kdagen.autotune import worker, devices\n"
        "class Noisy:\n"
        "    def __init__(self): print('opened'); os.write(1, b'raw')\n"
        "    def facts(self): print('asked'); return {}\n"
        "    def state(self): return {}\n"
        "worker.open_device = lambda spec: Noisy()\n"
        "worker.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "noisy"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    process.stdin.write('{"do": "facts"}\n')
    process.stdin.flush()
    assert [json.loads(process.stdout.readline()) for _ in range(2)] == [{"ready": True}, {"facts": {}, "state": {}}]
    os.kill(process.pid, signal.SIGKILL)
    assert "asked" in process.communicate()[1]
