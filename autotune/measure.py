"""Candidates on devices: right first, then a first look on each shape, then finals among the best and the default.

    correct   its outputs are those of the oracle (kdagen.autotune.check); a fast wrong kernel is a failure
    screen    a few calls on each shape, fewer of what is far from the best (kdagen.autotune.timing.screen)
    final     on each shape the best few and the untuned default, in turn (kdagen.autotune.finals)

This is the coordinator: it alone writes the log. Each device is a process (kdagen.autotune.pool) that a thread feeds.
What is in the log for the same kernels on the same machine is not done again, so that a run that was killed goes on
where it was. A candidate that kills its worker is tried again in the next round, until it is quarantined.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

from kdagen.autotune.bench import Bench, Limits, Session, in_threads
from kdagen.autotune.finals import run_finals
from kdagen.autotune.folder import Folder
from kdagen.autotune.measured import Measured, relative
from kdagen.autotune.pool import Worker, WorkerDied
from kdagen.autotune.sweep import Candidate, Study, Workload
from kdagen.autotune.timing import SLOWER

from kdagen.errors import ArgumentError

Todo = Callable[[Folder, Study, list[dict]], list[Candidate]]


def measure(
    folder: Folder,
    devices: list[str],
    deadline: float | None,
    say,
    workers: list | None = None,
    *,
    finals: bool = True,
    limits: Limits | None = None,
    todo: Todo | None = None,
) -> None:
    """Measures all that can be on these devices, until the deadline (of time.monotonic).

    `finals`: without them, time for them is left all the same.
    `workers` instead of local ones: what has `device`, `ask` and `end` as kdagen.autotune.pool.Worker has.
    `todo`: what is to be tried as of now, if not what kdagen.autotune.search says.
    """
    if workers is None and (not devices or len(set(devices)) < len(devices)):
        raise ArgumentError(
            f"devices {', '.join(devices) or '(none)'}: expected one or more, each once, such as cuda:0"
        )
    if todo is None:
        from kdagen.autotune.search import todo
    limits, workers = limits or Limits(), workers or [Worker(device) for device in devices]
    end = math.inf if deadline is None else deadline
    with folder.lock():
        try:
            benches = _open(workers, limits, say)
            for done, study in enumerate(folder.sweep.studies):
                _measure(
                    folder, study, benches, _share(end, len(folder.sweep.studies) - done), say, limits, finals, todo
                )
        finally:
            for worker in workers:
                worker.end()


def _open(workers: list, limits: Limits, say) -> list[Bench]:
    benches = [Bench(worker) for worker in workers]
    if errors := in_threads([partial(bench.open, limits.hang_s, say) for bench in benches]):
        raise errors[0]
    return benches


def _share(end: float, studies: int) -> float:
    """When the next of so many studies must end."""
    now = time.monotonic()
    return now + (end - now) / studies


def _measure(folder, study: Study, benches: list[Bench], end: float, say, limits, finals: bool, todo: Todo) -> None:
    target = study.task.target
    fit = [b for b in benches if not b.lost and b.facts.get("target", target) == target]
    if not fit:
        return say.note(f"{study.task.name} is for {target}: no device that is left runs it")
    if others := [b.device for b in fit if b.machine != fit[0].machine]:
        say.note(f"{study.task.name}: {', '.join(others)} left out, being of another kind than {fit[0].device}")
    fit = [b for b in fit if b.machine == fit[0].machine]
    known = Measured(folder, study, fit[0].facts, folder.log)
    session = Session(folder, known, fit, end, say, limits)
    _Screening(session, todo).run(_reserve(session))
    if finals:
        run_finals(session)
    return None


def _reserve(session: Session) -> float:
    """Seconds that are kept for finals, half as many again for starts and warming up."""
    turns = math.ceil(len(session.study.workloads) / len(session.benches))
    return min(1.5 * session.limits.final_s * turns, session.limits.reserve * session.left)


class _Screening:
    """All but the finals of a study."""

    def __init__(self, session: Session, todo: Todo):
        self.session, self.known, self.todo = session, session.known, todo
        self.workloads, self.policy = session.study.workloads, str(session.folder.sweep.policy)
        self.until = self.kill = session.end
        self.noted: set[str] = set()

    def run(self, reserve: float) -> None:
        """Rounds of what is to be tried, until all of it is settled or time is up."""
        session = self.session
        self.until, self.kill = session.end - reserve, session.end - 0.75 * reserve
        while (ready := self._ready()) and time.monotonic() < self.until:
            session.say.stage(f"measure {session.study.task.name}", len(ready) * len(self.workloads))
            while any(self._is_open_default(c) for c in ready) and time.monotonic() < self.until:
                session.spread([c for c in ready if c.id == self.known.default], self._climb, self.until)
            session.spread([c for c in ready if c.id != self.known.default], self._climb_beside_default, self.until)

    def _is_open_default(self, candidate: Candidate) -> bool:
        return candidate.id == self.known.default and not self.known.finished(candidate.id)

    def _ready(self) -> list[Candidate]:
        """What is to be tried, is fit for it, and has not been."""
        known = self.known
        asked = self.todo(self.session.folder, self.session.study, known.lines)
        open_ = [c for c in asked if not known.refused(c.id) and not known.quarantined(c.id)]
        self._note_missing([c.id for c in open_ if not known.runnable(c.id)])
        return [c for c in open_ if known.runnable(c.id) and not known.finished(c.id)]

    def _note_missing(self, candidates: list[str]) -> None:
        if not self.noted and candidates:
            name, path = self.session.study.task.name, self.session.folder.path
            self.session.say.note(
                f"{name}: {len(candidates)} candidates are not compiled, or damaged, and left out: "
                f"`kdagen tune compile --dir {path}` compiles them"
            )
        self.noted.update(candidates)

    def _climb_beside_default(self, bench: Bench, candidate: Candidate) -> None:
        """After the default was timed on this very device, by which others are judged there."""
        default = self.known.default
        if default and self.session.settled(default, "correct") and not self.known.quarantined(default):
            self._climb(bench, self.known.candidate(default), bench.device)
        self._climb(bench, candidate)

    def _climb(self, bench: Bench, candidate: Candidate, on: str | None = None) -> None:
        """Up to the finals, or to where it dies or is wrong; `on`: a time on this device is wanted."""
        name = candidate.id
        if not self.session.settled(name, "correct"):
            self._check(bench, name)
        right = self.session.settled(name, "correct")
        if right and right["verdict"] == "kept":
            open_ = (w for w in self.workloads if not self.session.settled(name, "screen", w, on=on))
            all(self._screen(bench, name, workload) for workload in open_)

    def _check(self, bench: Bench, name: str) -> None:
        reply = self._ask(bench, name, "correct", {"do": "check"})
        if reply:
            right, reason = reply.pop("ok"), reply.pop("reason")
            verdict = ("kept", "") if right else ("failed", reason or "wrong")
            self.session.record(bench, name, "correct", *verdict, **reply)

    def _screen(self, bench: Bench, name: str, workload: Workload) -> bool:
        """Whether it lived, and so is timed on other shapes too, however slow it is on this one."""
        scale, is_default = self._default_ms(bench, workload) or 1.0, name == self.known.default
        best = min((relative(line) for line in self.session.screened(workload)), default=None)
        best_ms = None if best is None or is_default else best * scale
        request = {"do": "screen", "workload": str(workload), "policy": self.policy, "best_ms": best_ms}
        reply = self._ask(bench, name, "screen", request, workload, 10 * scale / 1000)
        if reply:
            reply["relative"] = 1.0 if is_default else reply["ms"] / scale
            verdict = "rejected" if reply["stopped"] else "kept"
            reason = f"{reply['ms'] / best_ms:.2f}x the best, more than {SLOWER}x" if reply["stopped"] else ""
            self.session.record(bench, name, "screen", verdict, reason, workload, **reply)
        return reply is not None

    def _default_ms(self, bench: Bench, workload: Workload) -> float | None:
        """The default's time here, else on another device of the kind."""
        default, settled = self.known.default, self.session.settled
        lines = [settled(default, "screen", workload, on=on) for on in (bench.device, None)]
        return next((line["ms"] for line in lines if line and line["verdict"] == "kept"), None)

    def _ask(self, bench: Bench, name: str, rung: str, request: dict, workload=None, seconds=0.0) -> dict | None:
        """The reply; None where the candidate died, {} where it raised; both are recorded."""
        try:
            reply = self.session.ask(bench, [name], request, self.kill, seconds)
        except WorkerDied as death:
            return self.session.died(bench, name, rung, death, workload)
        if "error" in reply:
            self.session.failed(bench, name, rung, reply, workload)
            return {}
        return reply
