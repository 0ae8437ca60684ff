"""Worker processes of one build: starts them, hands out jobs, passes on what they report, and ends them."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kdagen import debug, errors
from kdagen.build.kernel import Job, job_fields
from kdagen.build.toolchain import Died

DEATHS = {-signal.SIGKILL: "out of memory"}  # by exit status: nobody else ends a worker so


@dataclass(frozen=True)
class Event:
    """How far a kernel has come."""

    key: str
    stage: str  # those of kernel.compile_kernel, then "done" or "failed"
    launch: dict | None = None  # with "lowered"
    error: Exception | None = None  # with "failed"

    @property
    def last(self) -> bool:
        return self.stage in ("done", "failed")


def compile_all(jobs: dict[str, Job], cache_root: Path, workers: int, say: Callable[[str, str], None]) -> None:
    """Compiles every job (by cache key) into the cache; `say(key, stage)` hears "done" last.

    The first failure ends the others and is raised.
    """
    waiting = iter(jobs.items())
    with contextlib.closing(compile_each(lambda: next(waiting, None), cache_root, workers)) as events:
        for event in events:
            if event.error:
                raise event.error
            if event.stage != "lowered":
                say(event.key, event.stage)


def compile_each(
    take: Callable[[], tuple[str, Job] | None], cache_root: Path, workers: int, timeout: float | None = None
) -> Iterator[Event]:
    """Compiles what `take()` gives, (key, job), and yields what happens; a failure ends nothing but its own job.

    `take` is asked again after each event; when it has nothing, and nothing is under way, that is the end. A job that
    takes longer than `timeout` seconds is ended and failed; a worker that died is replaced.

    Raises:
        Died: a worker could not start, so that none will.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    idle: list[Worker] = []
    busy: dict[str, Worker] = {}
    try:
        while True:
            while len(busy) < workers and (item := take()):
                busy[item[0]] = worker = idle.pop() if idle else Worker(cache_root)
                threading.Thread(target=_run, args=(worker, *item, events.put, timeout), daemon=True).start()
            if not busy:
                return
            event = events.get()
            if event.last and (worker := busy.pop(event.key)).alive:
                idle.append(worker)
            if isinstance(event.error, Died) and event.error.death == "start":
                raise event.error
            yield event
    finally:
        for worker in (*idle, *busy.values()):
            worker.end()


def _run(worker: Worker, key: str, job: Job, put: Callable[[Event], None], timeout: float | None) -> None:
    """One job, in a thread that listens to its worker; the last event comes from here, whatever happens."""
    try:
        worker.run(key, job, lambda stage, **more: put(Event(key, stage, **more)), timeout)
    except Exception as error:
        put(Event(key, "failed", error=error))
    else:
        put(Event(key, "done"))


class Worker:
    """One `kdagen.build.worker` process, in a process group of its own with the compilers that it starts."""

    def __init__(self, cache_root: Path):
        command = [sys.executable, "-m", "kdagen.build.worker", str(cache_root)]
        self.stderr = None if debug.level() else tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (lives as the worker does)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.stderr, text=True, start_new_session=True
        )
        self.answered = self.overdue = False

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def run(self, key: str, job: Job, say: Callable[..., None], timeout: float | None = None) -> None:
        """Does one job, whose stages `say` hears; raises what the worker raised."""
        with self._limit(timeout):
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps({"key": key, "job": job_fields(job)}) + "\n")
                self.process.stdin.flush()
            for line in self.process.stdout:
                answer, self.answered = json.loads(line), True
                if "stage" in answer:
                    say(**answer)
                    continue
                if "error" in answer:
                    raise _error(**answer)
                return
        raise self._died(job, timeout)

    @contextlib.contextmanager
    def _limit(self, timeout: float | None):
        """The process is ended if this lasts longer."""
        if timeout is None:
            yield
            return
        timer = threading.Timer(timeout, self._expire)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self) -> None:
        self.overdue = True
        self.end()

    def _died(self, job: Job, timeout: float | None) -> Died:
        if self.overdue:
            return Died(f"{job.name} was not compiled within {timeout:g} s, and was given up", "hang")
        status = self.process.wait()
        death = DEATHS.get(status, "crash") if self.answered else "start"
        return Died(
            f"the process that compiled {job.name} died with exit status {status}{self._last_words()}: "
            f"if memory ran out, try fewer jobs (--jobs 1); KDAGEN_DEBUG=1 shows all it prints",
            death,
        )

    def _last_words(self) -> str:
        if self.stderr is None:
            return ""
        self.stderr.seek(0)
        lines = [line.strip() for line in self.stderr if line.strip()]
        return f" ({lines[-1]})" if lines else ""

    def end(self) -> None:
        """Ends the process and the compilers under it; what they were making is not in the cache."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _error(error: str, message: str, trace: str, death: str) -> Exception:
    """What a worker raised."""
    message += f"\n{trace}" if debug.level() else ""
    return Died(message, death) if death else getattr(errors, error)(message)
