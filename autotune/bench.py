"""A study on its benches: what the threads that feed workers share while it is measured, the log's writer above all.

A bench is a worker and the facts about its device. What is done on it is decided in kdagen.autotune.measure and
kdagen.autotune.finals.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from kdagen.autotune.devices import Compiled
from kdagen.autotune.folder import Folder
from kdagen.autotune.measured import Measured
from kdagen.autotune.pool import WorkerDied
from kdagen.autotune.standing import DEATHS
from kdagen.autotune.sweep import Workload
from kdagen.autotune.worker import contender_fields

from kdagen.errors import KdagenError


@dataclass(frozen=True)
class Limits:
    """How much time things get."""

    hang_s: float = 300.0  # without an answer: the first check of long inputs in float64 takes minutes on few cores
    patience_s: float = 60.0  # the same once such a request was answered, or PATIENCE times as long as that took
    final_s: float = 10.0  # of a shape's finals: hundreds of rounds of calls of milliseconds
    rounds: int = 40  # of longer calls, as far as `most_final_s` goes: half as many tell 10% from noise of 10%
    most_final_s: float = 60.0
    finalists: int = 5  # beside the default: screening errs by a few percent, few are as close
    reserve: float = 0.5  # of a study's time, what is kept back for finals at most


PATIENCE = 10  # candidates of one study are not so far apart in what a check or a first look at them takes


class TimeIsUp(Exception):
    """The deadline came amid a request: nobody's fault, and nothing to record."""


class Bench:
    """A worker, which may be lost, and the facts about its device."""

    def __init__(self, worker):
        self.worker, self.device, self.facts, self.lost = worker, worker.device, {}, False

    def open(self, timeout: float, say) -> None:
        """Starts the worker; a KdagenError says why it does not."""
        try:
            reply = self.worker.ask({"do": "facts"}, timeout, say)
        except WorkerDied as death:
            reply = {"reason": str(death)}
        if "facts" not in reply:
            raise KdagenError(
                f"{self.device} does not answer: {reply['reason']}: expected a device that is free and works"
            )
        self.facts = reply["facts"]

    @property
    def machine(self) -> tuple:
        """What devices must share for their figures to be of one kind."""
        return self.facts["device"], self.facts["processors"], str(self.facts["versions"]), self.facts.get("kernels")


class Session:
    """One study, as long as it is measured."""

    def __init__(self, folder: Folder, known: Measured, benches: list[Bench], end: float, say, limits: Limits):
        self.folder, self.known, self.say, self.limits = folder, known, say, limits
        self.study, self.end = known.study, end
        self._benches, self._lock, self._stopped = benches, threading.RLock(), False
        self._longest: dict[tuple, float] = {}  # seconds of an answered request, by what was to be done, on which shape

    @property
    def benches(self) -> list[Bench]:
        return [bench for bench in self._benches if not bench.lost]

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    # -- the log ------------------------------------------------------------------------------------------------------

    def record(
        self, bench: Bench, candidate: str, rung: str, verdict: str, reason="", workload=None, **figures
    ) -> None:
        """A line, unless measuring was stopped: then workers die without fault."""
        with self._lock:
            if self._stopped:
                return
            under = self.known.under(candidate, workload)
            shape = {"workload": str(workload)} if workload else {}
            line = self.folder.log.append(
                self.study.task.name, candidate, rung, verdict, reason, **shape, **figures, on=bench.device, under=under
            )
            self.known.add(line)
            self.say(line)

    def died(self, bench: Bench, candidate: str, rung: str, death: WorkerDied, workload=None) -> None:
        """The line of a death, and a note where it is the last one."""
        self.record(bench, candidate, rung, "failed", f"{death.kind}: {death}", workload, death=death.kind)
        if self.known.quarantined(candidate):
            self.say.note(f"candidate {candidate} is quarantined after {DEATHS} deaths")

    def failed(self, bench: Bench, candidate: str, rung: str, reply: dict, workload=None) -> None:
        """The line of a reply that is an error; kernels that cannot be read are not the candidate's fault."""
        if reply["error"] == "unreadable":
            self.known.unreadable.add(candidate)
            self.say.note(f"candidate {candidate} is left out: {reply['reason']}")
        else:
            self.record(bench, candidate, rung, "failed", reply["reason"] or reply["error"], workload)

    def settled(self, *what, **on) -> dict | None:
        """Measured.found, amid threads."""
        with self._lock:
            return self.known.found(*what, **on)

    def screened(self, workload: Workload) -> list[dict]:
        """Measured.screened, amid threads."""
        with self._lock:
            return self.known.screened(workload)

    def raced(self, workload: Workload, names: list[str]) -> bool:
        """Whether there were finals among just these."""
        with self._lock:
            return bool(self.known.race(workload, names))

    # -- workers ------------------------------------------------------------------------------------------------------

    def ask(self, bench: Bench, contenders: list[str], request: dict, kill: float, seconds: float = 0.0) -> dict:
        """The reply to a request about candidates, by their ids.

        Raises WorkerDied, or TimeIsUp where it was ended at the time `kill`.
        `seconds`: what the request is known to take.
        """
        began, what = time.monotonic(), (request["do"], request.get("workload"))
        timeout = seconds + self._timeout(what)
        fields = [contender_fields(self.known.candidate(c), self._compiled(c)) for c in contenders]
        try:
            reply = bench.worker.ask({**request, "contenders": fields}, min(timeout, kill - began), self.say)
        except WorkerDied as death:
            if death.kind == "hang" and kill - began < timeout:
                raise TimeIsUp from None
            raise
        self._longest[what] = max(self._longest.get(what, 0.0), time.monotonic() - began)
        return reply

    def _timeout(self, what: tuple) -> float:
        if what not in self._longest:
            return self.limits.hang_s
        return min(self.limits.hang_s, max(self.limits.patience_s, PATIENCE * self._longest[what]))

    def _compiled(self, candidate: str) -> Compiled | None:
        manifest = self.known.manifest(candidate)
        return Compiled(self.folder.kernels, manifest) if manifest else None

    def spread(self, work: Iterable, do: Callable[[Bench, object], None], until: float) -> None:
        """Does all of it, a thread a bench; nothing is begun after the time `until`.

        A bench whose worker does not start any more is lost; where none is left, its error is raised.
        """
        waiting = deque(work)
        try:
            errors = in_threads([partial(self._feed, bench, waiting, do, until) for bench in self.benches])
        except BaseException:
            self._stopped = True
            raise
        bugs = [error for error in errors if not isinstance(error, KdagenError)]
        if bugs or (errors and not self.benches):
            raise (bugs or errors)[0]

    def _feed(self, bench: Bench, waiting: deque, do, until: float) -> None:
        try:
            while not self._stopped and time.monotonic() < until and (item := _next(waiting)) is not None:
                do(bench, item)
        except TimeIsUp:
            return
        except Exception as error:
            bench.lost = True
            self.say.note(f"{bench.device} is given up: {error}")
            raise


def _next(waiting: deque):
    """The next item, None if another thread took the last one."""
    with contextlib.suppress(IndexError):
        return waiting.popleft()


def in_threads(tasks: list[Callable[[], None]]) -> list[Exception]:
    """Runs all at once; returns what they raised. The threads do not outlive this process."""
    errors: list[Exception] = []

    def run(task) -> None:
        try:
            task()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
