"""A worker process from outside: deaths told apart, the process started again, its environment."""

import os
import pickle
import time
from pathlib import Path

import pytest
from kdagen.autotune import pool
from kdagen.autotune.pool import Worker, WorkerDied
from kdagen.autotune.worker import contender_fields
from recordings import BEST, CLOSE, DEFAULT, SHAPE, faulty, recording

from kdagen import debug
from kdagen.errors import LaunchError


@pytest.fixture
def spec(tmp_path):
    return recording(tmp_path / "recorded.jsonl")


@pytest.fixture
def start(tmp_path, spec):
    workers = []

    def start(*faults) -> Worker:
        workers.append(Worker(faulty(spec, tmp_path / "faults", *faults)))
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()


class Notes(list):
    def note(self, text):
        self.append(text)


def gone(process: int) -> bool:
    """Whether it ended, reaped or not."""
    for _ in range(100):
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or status.read_text().split(")")[1].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


def check(candidate) -> dict:
    return {"do": "check", "contenders": [contender_fields(candidate, None)]}


def final(*candidates) -> dict:
    return {
        "do": "final", "contenders": [contender_fields(c, None) for c in candidates], "workload": str(SHAPE),
        "policy": "device cold", "seconds": 0.05, "seed": 0, "default": None,
    }  # fmt: skip


def test_one_process_serves_many_requests(start):
    worker = start()
    assert worker.process is None
    assert worker.ask(check(BEST), 5)["ok"]
    first = worker.process.pid
    assert worker.ask(check(DEFAULT), 5)["ok"] and worker.process.pid == first


@pytest.mark.parametrize(
    "fault, kind, reason",
    [
        ("crash", "crash", "the worker died of SIGKILL, as where the machine's memory runs out"),
        ("hang", "hang", "no answer within 0.5 s"),
        ("out of memory", "out of memory", "asked of a recording"),
        ("device error", "device error", "asked of a recording"),
    ],
)
def test_deaths_are_told_apart_and_the_next_request_finds_a_new_process(start, fault, kind, reason):
    worker, said = start((fault, "check", None, [1])), Notes()
    with pytest.raises(WorkerDied) as death:
        worker.ask(check(BEST), 0.5 if fault == "hang" else 5, said)
    assert (death.value.kind, death.value.reason, death.value.running) == (kind, reason, BEST.id)
    dead = worker.process.pid
    assert gone(dead)
    assert worker.ask(check(BEST), 5, said)["ok"] and worker.process.pid != dead
    assert said == [f"{worker.device}: the worker is started again"]


def test_a_death_amid_finals_is_blamed_on_who_ran(start):
    worker = start(("crash", "sample", CLOSE, [3]))
    with pytest.raises(WorkerDied) as death:
        worker.ask(final(DEFAULT, BEST, CLOSE), 5)
    assert death.value.running == CLOSE.id


def test_an_earlier_candidate_is_not_blamed_for_what_comes_later(start):
    worker = start()
    worker.ask(check(BEST), 5)
    with pytest.raises(WorkerDied) as death:
        worker.ask({"do": "facts"}, 0)
    assert (death.value.kind, death.value.running) == ("hang", None)


def test_an_exit_status_and_last_words_are_told(start, monkeypatch):
    worker = start()
    worker.ask(check(BEST), 5)
    worker._stderr.seek(0, os.SEEK_END)
    worker._stderr.write("terminate called\n\n")
    worker._stderr.flush()
    worker.process.stdin.close()  # ends it with status 0
    worker.process.wait()
    monkeypatch.setattr(worker.process, "poll", lambda: None)  # as if it ended just after it was asked
    with open(os.devnull, "w") as nowhere, pytest.raises(WorkerDied) as death:
        monkeypatch.setattr(worker.process, "stdin", nowhere)
        worker.ask(check(BEST), 5)
    assert death.value.reason == "the worker ended with exit status 0 (terminate called)"


def test_with_debug_the_words_of_a_worker_are_shown(tmp_path, monkeypatch, capfd):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'what it says' >&2; exit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(pool.sys, "executable", str(script))
    monkeypatch.setenv("KDAGEN_DEBUG", "1")
    with pytest.raises(LaunchError, match="ended with exit status 3: try"):
        Worker("cpu").ask({"do": "facts"}, 5)
    assert capfd.readouterr().err == "what it says\n"


def test_a_worker_that_was_killed_between_requests_is_started_again(start):
    worker = start()
    worker.ask(check(BEST), 5)
    worker.process.kill()
    worker.process.wait()
    assert worker.ask(check(BEST), 5)["ok"]


def test_what_a_worker_starts_dies_with_it(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(f"""#!/bin/sh
sleep 60 & echo $! > {tmp_path}/child
echo '{{"ready": true}}'
read request; echo '{{"ok": true}}'; read request
""")
    script.chmod(0o755)
    monkeypatch.setattr(pool.sys, "executable", str(script))
    worker = Worker("cpu")
    assert worker.ask({}, 5) == {"ok": True}
    child = int((tmp_path / "child").read_text())
    os.kill(child, 0)
    worker.end()
    assert gone(child)


def test_a_reply_that_is_torn_is_a_crash(monkeypatch):
    replies = pool.queue.SimpleQueue()
    pool._read(['{"ready": true}\n', '{"ok": tr'], replies)
    assert (replies.get(), replies.get()) == ('{"ready": true}\n', None) and replies.empty()


def test_a_death_can_be_sent_to_another_process():
    death = pickle.loads(pickle.dumps(WorkerDied("crash", "died", "abc")))
    assert (death.kind, death.reason, death.running, str(death)) == ("crash", "died", "abc", "died")


@pytest.mark.parametrize("visible, number, seen", [(None, 1, "1"), ("2,3", 1, "3"), ("2", 1, ""), ("", 0, "")])
def test_a_worker_sees_only_its_own_gpu(monkeypatch, visible, number, seen):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = debug.one_gpu(number)
    assert found["CUDA_VISIBLE_DEVICES"] == seen and found["PATH"] == os.environ["PATH"]


def test_the_gpu_of_a_worker_is_its_first(monkeypatch):
    asked = {}

    def started(command, env, **options):
        asked.update(spec=command[3], visible=env["CUDA_VISIBLE_DEVICES"])
        raise FileNotFoundError

    monkeypatch.setattr(pool.subprocess, "Popen", started)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(FileNotFoundError):
        Worker("cuda:3").ask({"do": "facts"}, 1)
    assert asked == {"spec": "cuda:0", "visible": "3"}


def test_ending_twice_or_before_a_start_is_nothing(start):
    worker = start()
    worker.end()
    worker.ask(check(BEST), 5)
    began = time.monotonic()
    worker.end()
    worker.end()
    assert time.monotonic() - began < 2
