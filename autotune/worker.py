"""The process that owns a device: `python -m kdagen.autotune.worker DEVICE MARK`. Its other side is autotune/pool.py.

First a line {"ready"} or {"error", "reason"}; then one request a line on stdin (JSON), one reply a line on stdout:

    {"do": "facts"}                                                      {"facts", "state"}
    {"do": "check", "contenders": [one]}                                 {"ok", "reason", "errors", ...}
    {"do": "screen", "contenders": [one], "workload", "policy", "best_ms"}      {"ms", "calls", "stopped"}
    {"do": "final", "contenders": [...], "workload", "policy", "seconds", "seed", "default"}
                                            {"intervals": {id: [median, low, high, calls]}, "drift", "state"}

or {"error", "reason", "running": id}: one of kdagen.autotune.pool.FATAL, after which it ends, so that another process
finds a clean device; "unreadable", where files are damaged or missing; or "error". Before it touches a candidate it
writes its id to MARK, a file descriptor: that wakes no reader amid timings, and can be read after a crash. It ends at
once when its stdin does, so it does not outlive who asks.
"""

from __future__ import annotations

import gc
import json
import math
import os
import queue
import re
import resource
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from kdagen.autotune import timing
from kdagen.autotune.devices import Compiled, Device, DeviceError, open_device
from kdagen.autotune.pool import FATAL, MARK
from kdagen.autotune.sweep import Candidate, Policy, Task, Workload

from kdagen.errors import ArtefactError, KdagenError, LaunchError


def contender_fields(candidate: Candidate, compiled: Compiled | None) -> dict:
    """A contender as a request has it."""
    fields = {"task": candidate.task.fields(), "schedule": candidate.schedule.fields()}
    return fields | ({"kernels": str(compiled.kernels), "manifest": compiled.manifest} if compiled else {})


def _contender(fields: dict) -> tuple[Candidate, Compiled | None]:
    candidate = Candidate.of(Task.of(fields["task"]), fields["schedule"])
    return candidate, Compiled(Path(fields["kernels"]), fields["manifest"]) if "kernels" in fields else None


class Answering:
    """Answers requests, {"do": "check"} by what `_check` returns; `mark` hears what is about to run."""

    def __init__(self, mark: Callable[[str], None]):
        self._write_mark = mark
        self.running, self.fatal = None, False

    def mark(self, candidate: str) -> None:
        self.running = candidate
        self._write_mark(candidate)

    def answer(self, request: dict) -> str:
        """The reply's JSON, where infinite figures are an error; whatever a candidate raises is a reply."""
        self.running = None
        try:
            return json.dumps(self.do(request), allow_nan=False)
        except Exception as error:
            traceback.print_exc()
            self.fatal = kind(error) in FATAL
            return json.dumps({"error": kind(error), "reason": words(error), "running": self.running})
        finally:
            gc.collect()  # what samplers held

    def do(self, request: dict) -> dict:
        """What a request asks for."""
        return getattr(self, f"_{request['do']}")(request)


class Server(Answering):
    """Answers by one device."""

    def __init__(self, device: Device, mark: Callable[[str], None]):
        super().__init__(mark)
        self.device = device

    def do(self, request: dict) -> dict:
        contenders = [_contender(c) for c in request.get("contenders", ())]
        return getattr(self, f"_{request['do']}")(request, contenders)

    def _facts(self, request: dict, contenders: list) -> dict:
        return {"facts": self.device.facts(), "state": self.device.state()}

    def _check(self, request: dict, contenders: list) -> dict:
        self.mark(contenders[0][0].id)
        found = self.device.check(*contenders[0])
        errors = {name: [e if math.isfinite(e) else str(e) for e in pair] for name, pair in found["errors"].items()}
        return {**found, "ok": bool(found["ok"]), "errors": errors}

    def _screen(self, request: dict, contenders: list) -> dict:
        (sampler,) = self._samplers(request, contenders).values()
        return vars(timing.screen(sampler, request["best_ms"]))

    def _final(self, request: dict, contenders: list) -> dict:
        samplers = {name: self._marked(name, s) for name, s in self._samplers(request, contenders).items()}
        before = self.device.state()
        times = timing.race(samplers, request["seconds"], request["seed"])
        intervals = {name: list(vars(timing.interval(t)).values()) for name, t in times.items()}
        drift = timing.drift(times.get(request["default"]) or next(iter(times.values())))
        return {"intervals": intervals, "drift": drift, "state": {"before": before, "after": self.device.state()}}

    def _samplers(self, request: dict, contenders: list) -> dict:
        workload, policy, samplers = Workload.parse(request["workload"]), Policy.parse(request["policy"]), {}
        for contender in contenders:  # one a time, to know which of them broke
            self.mark(contender[0].id)
            samplers |= self.device.samplers([contender], workload, policy)
        return samplers

    def _marked(self, name: str, sampler):
        def marked() -> float:
            self.mark(name)
            return sampler()

        return marked


def kind(error: Exception) -> str:
    """What an exception means for the worker; by name, since what has no torch must not import it."""
    names = {t.__name__ for t in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return "out of memory"
    if isinstance(error, ArtefactError):
        return "unreadable"
    sticky = isinstance(error, (DeviceError, LaunchError)) or "AcceleratorError" in names
    return "device error" if sticky or re.search(r"CUDA error|CUDA_ERROR|cudaError", str(error)) else "error"


def words(error: Exception) -> str:
    """An exception in one line."""
    text = next(iter(str(error).splitlines()), "")
    told = kind(error) != "error" or isinstance(error, KdagenError)
    return text if told else f"{type(error).__name__}: {text}"


def _requests():
    """Those of stdin. A thread reads them, so that this process ends with its parent even amid a request."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            waiting.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield waiting.get()


def serve(server_of: Callable[[Callable[[str], None]], Answering], mark: int | None = None) -> None:
    """Answers on stdout what is asked on stdin, by what `server_of` makes of a function that writes to MARK."""
    # Whatever a device or its libraries print must not get among the replies.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    resource.setrlimit(
        resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1])
    )  # of a GPU's process: GBs
    mark = os.open(os.devnull, os.O_WRONLY) if mark is None else mark
    try:
        server = server_of(lambda name: os.pwrite(mark, name.encode()[:MARK].ljust(MARK, b"\0"), 0))
    except Exception as error:
        traceback.print_exc()
        ours = type(error if isinstance(error, KdagenError) else LaunchError())
        replies.write(json.dumps({"error": ours.__name__, "reason": words(error)}) + "\n")
        return
    replies.write('{"ready": true}\n')
    for request in _requests():
        replies.write(server.answer(request) + "\n")
        if server.fatal:
            os._exit(0)  # what a broken device's destructors do is anybody's guess


def main() -> None:
    serve(lambda mark: Server(open_device(sys.argv[1]), mark), int(sys.argv[2]) if len(sys.argv) > 2 else None)


if __name__ == "__main__":
    main()
