"""A worker process a device: asked one thing at a time, killed where it hangs, started again where it died.

Its side of the pipe is kdagen.autotune.worker. The process has a group of its own, sees no GPU but its own, and ends
when this one does. (kdagen.build.pool is the like for compilers, which share no state that a crash could break.)
"""

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

from kdagen import debug, errors

START_SECONDS = 180  # to import torch and to wake a GPU, on a slow disk
DEATHS = ("crash", "hang", "out of memory", "device error")
FATAL = ("out of memory", "device error")  # replies after which a worker ends, so that the next finds a clean device
KILL_SECONDS = 30  # a process that a hung driver holds may not die at all
MARK = 64  # bytes of the shared file that says what is running


class WorkerDied(Exception):
    """A worker is no more; the next request finds a new one."""

    def __init__(self, kind: str, reason: str, running: str | None):
        super().__init__(kind, reason, running)  # all of them, so that it can be pickled
        self.kind, self.reason, self.running = kind, reason, running  # of DEATHS; in words; the candidate's id

    def __str__(self) -> str:
        return self.reason


class Worker:
    """One process on one device; it starts at the first request. Asked by one thread at a time."""

    program: tuple[str, ...] = ("-m", "kdagen.autotune.worker")  # Python runs it, with a device and the mark behind

    def __init__(self, device: str):
        self.device = device
        self.process: subprocess.Popen | None = None
        self._mark = tempfile.TemporaryFile()  # noqa: SIM115 (lives as the worker does)

    def ask(self, request: dict, timeout: float, say=None) -> dict:
        """The reply to a request, which may be {"error", "reason", "running"}; raises WorkerDied where there is none.

        Raises the KdagenError that says why where no worker can be started. `say` (of kdagen.autotune.progress) hears
        of a start after a death.
        """
        if self.process is None or self.process.poll() is not None:
            self._start(say)
        os.ftruncate(self._mark.fileno(), 0)
        with contextlib.suppress(BrokenPipeError):  # it died meanwhile: then no reply comes, which is seen below
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        reply = self._reply(timeout)
        if reply.get("error") in FATAL:
            self._died(reply["error"], reply["reason"])
        return reply

    def end(self) -> None:
        """Ends the process and whatever it started; one that a driver holds is left behind."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_SECONDS)

    def _start(self, say) -> None:
        if say is not None and self.process:
            say.note(f"{self.device}: the worker is started again")
        self.end()
        spec, environment = self.device, None
        if spec.startswith("cuda:"):
            spec, environment = "cuda:0", debug.one_gpu(int(spec.removeprefix("cuda:")))
        command = [sys.executable, *self.program, spec, str(self._mark.fileno())]
        self._stderr = None if debug.level() else tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (as above)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, env=environment,
            start_new_session=True, pass_fds=[self._mark.fileno()],
        )  # fmt: skip
        self._replies: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self.process.stdout, self._replies), daemon=True).start()
        try:
            reply = self._reply(START_SECONDS)
        except WorkerDied as death:
            raise errors.LaunchError(
                f"no worker starts on {self.device}: {death}: try `{' '.join(command[:-1])}` by hand"
            ) from None
        if "error" in reply:
            self.end()
            raise getattr(errors, reply["error"], errors.LaunchError)(f"{self.device}: {reply['reason']}")

    def _reply(self, timeout: float) -> dict:
        try:
            text = self._replies.get(timeout=max(0.0, timeout))
        except queue.Empty:
            self._died("hang", f"no answer within {round(timeout, 1):g} s")
        if text is None:
            self._died("crash", _ending(self.process.wait()))
        return json.loads(text)

    def _died(self, kind: str, reason: str):
        self.end()
        words = _last_words(self._stderr) if kind == "crash" else ""
        running = os.pread(self._mark.fileno(), MARK, 0).decode().strip("\0 ") or None
        raise WorkerDied(kind, reason + words, running)


def _read(stdout, replies: queue.SimpleQueue) -> None:
    """Passes on whole lines, then None. A thread, since a hung process may keep its pipe open whatever befalls it."""
    for line in stdout:
        if line.endswith("\n"):
            replies.put(line)
    replies.put(None)


def _ending(status: int) -> str:
    if status >= 0:
        return f"the worker ended with exit status {status}"
    hint = ", as where the machine's memory runs out" if -status == signal.SIGKILL else ""
    return f"the worker died of {signal.Signals(-status).name}{hint}"


def _last_words(stderr) -> str:
    if stderr is None:  # they were shown
        return ""
    stderr.seek(0)
    lines = [line.strip() for line in stderr if line.strip()]
    return f" ({lines[-1]})" if lines else ""
