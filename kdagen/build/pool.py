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
from collections.abc import Callable
from pathlib import Path

from kdagen import debug, errors
from kdagen.build.kernel import Job, job_fields


def compile_all(jobs: dict[str, Job], cache_root: Path, workers: int, say: Callable[[str, str], None]) -> None:
    """Compiles every job (by cache key) into the cache; `say(key, stage)` hears "done" last.

    The first failure ends the others and is raised.
    """
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for item in jobs.items():
        waiting.put(item)
    pool = [Worker(cache_root) for _ in range(min(workers, len(jobs)))]
    failures: list[Exception] = []
    threads = [threading.Thread(target=_feed, args=(w, waiting, say, failures, pool), daemon=True) for w in pool]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for worker in pool:
            worker.end()
    if failures:
        raise failures[0]


def _feed(worker: Worker, waiting, say, failures: list, pool: list) -> None:
    """Gives one worker jobs until there are none, or until something failed."""
    while not failures:
        try:
            key, job = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            worker.run(key, job, say)
        except Exception as error:
            failures.append(error)
            for other in pool:
                other.end()


class Worker:
    """One `kdagen.build.worker` process, in a process group of its own with the compilers that it starts."""

    def __init__(self, cache_root: Path):
        command = [sys.executable, "-m", "kdagen.build.worker", str(cache_root)]
        self.stderr = None if debug.level() else tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (lives as the worker does)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self.stderr, text=True, start_new_session=True
        )

    def run(self, key: str, job: Job, say: Callable[[str, str], None]) -> None:
        """Does one job; raises what the worker raised."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"key": key, "job": job_fields(job)}) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            answer = json.loads(line)
            if "stage" in answer:
                say(key, answer["stage"])
                continue
            if "error" in answer:
                trace = f"\n{answer['trace']}" if debug.level() else ""
                raise getattr(errors, answer["error"])(answer["message"] + trace)
            say(key, "done")
            return
        raise errors.ToolchainError(
            f"the process that compiled {job.name} died with exit status {self.process.wait()}{self._last_words()}: "
            f"if memory ran out, try fewer jobs (--jobs 1); KDAGEN_DEBUG=1 shows all it prints"
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
