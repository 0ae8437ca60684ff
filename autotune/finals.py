"""Finals of a study: on each shape the best by screening and the untuned default, in turn, on one device.

Lines of one race share "race", and say how many there are "among": a race that was cut off does not count.
"""

from __future__ import annotations

import math

from kdagen.autotune.bench import Bench, Session
from kdagen.autotune.pool import WorkerDied
from kdagen.autotune.standing import DEATHS
from kdagen.autotune.sweep import Workload, short_hash
from kdagen.autotune.timing import FEWEST_ROUNDS, Interval


def run_finals(session: Session) -> None:
    """All that are not in the log yet; a device that is lost leaves its shapes to others."""
    benches = None
    while benches != session.benches and (open_ := [w for w in session.study.workloads if _open(session, w)]):
        benches = session.benches
        session.say.stage("final", sum(len(contenders(session, w)) for w in open_))
        session.spread(open_, lambda bench, workload: _Final(session, bench, workload).run(), session.end)


def contenders(session: Session, workload: Workload) -> list[str]:
    """The default, if it runs, and the best few others; none that failed in finals."""
    names = [line["candidate"] for line in session.screened(workload)]
    names = [name for name in names if session.known.runnable(name) and not _failed(session, name, workload)]
    default = [name for name in names if name == session.known.default]
    return default + [name for name in names if name not in default][: session.limits.finalists]


def _failed(session: Session, candidate: str, workload: Workload) -> bool:
    line = session.settled(candidate, "final", workload)
    return line is not None and line["verdict"] == "failed"


def _open(session: Session, workload: Workload) -> bool:
    """Whether a race is due; one alone has nothing to win, and would stand in the place of a race among several."""
    names = contenders(session, workload)
    if len(names) == 1:
        return not session.known.was_raced(names[0], workload)
    return bool(names) and not session.raced(workload, names)


class _Final:
    """One shape's, on one device."""

    def __init__(self, session: Session, bench: Bench, workload: Workload):
        self.session, self.bench, self.workload = session, bench, workload
        self.unsteady = ""  # why the first race does not count
        self.astray = 0  # deaths and errors that are no candidate's

    def run(self) -> None:
        """Until a race is whole and steady, or was repeated; whoever breaks it is out of the next one."""
        while _open(self.session, self.workload) and self.astray < DEATHS:
            names = contenders(self.session, self.workload)
            if (seconds := self._seconds(names)) is None:
                return self.session.say.note(
                    f"no time is left for finals of {self.session.study.task.name} {self.workload}"
                )
            reply = self._race(names, seconds)
            if reply is None:
                continue
            unsteady = reply["drift"] or slowed(reply["state"])
            if unsteady and not self.unsteady:
                self.unsteady = unsteady
                continue
            self._record(names, reply, unsteady)
        if self.astray == DEATHS:
            self.session.say.note(f"finals of {self.session.study.task.name} {self.workload} are given up")

    def _seconds(self, names: list[str]) -> float | None:
        """How long a race may take: its share of what is left; None if that is too short for it."""
        session, limits, each = self.session, self.session.limits, self._round(names)
        wanted = max(limits.final_s, min(limits.rounds * each, limits.most_final_s))
        if session.end == math.inf:
            return wanted
        rest = sum(_open(session, w) for w in session.study.workloads) / len(session.benches)
        seconds = min(wanted, session.left / max(1.0, rest) / 2)  # as much again to start and warm up
        return seconds if seconds > FEWEST_ROUNDS * each else None

    def _round(self, names: list[str]) -> float:
        """Seconds of a call of each."""
        lines = [self.session.settled(name, "screen", self.workload) for name in names]
        return sum(line["ms"] for line in lines) / 1000

    def _race(self, names: list[str], seconds: float) -> dict | None:
        """The worker's reply; None where somebody broke it, which is recorded."""
        session = self.session
        seed = session.folder.sweep.seed
        request = {"do": "final", "workload": str(self.workload), "policy": str(session.folder.sweep.policy)}
        request |= {"seconds": seconds, "seed": seed, "default": session.known.default}
        takes = seconds + 2 * FEWEST_ROUNDS * self._round(names)
        try:
            reply = session.ask(self.bench, names, request, session.end, takes)
        except WorkerDied as death:
            self._broke(names, death.running, death)
            return None
        if "error" in reply:
            self._broke(names, reply["running"], reply)
            return None
        return reply

    def _broke(self, names: list[str], running: str | None, why: WorkerDied | dict) -> None:
        """Memory that was enough for each in screening ran out for all together: no death of the one that was last."""
        session, what = self.session, (self.bench, running, "final")
        if running not in names:
            self.astray += 1
            reason = why["reason"] if isinstance(why, dict) else why
            session.say.note(f"{self.bench.device}: finals of {self.workload} broke outside of any candidate: {reason}")
        elif isinstance(why, dict):
            session.failed(*what, why, self.workload)
        elif why.kind == "out of memory" and len(names) > 1:
            reason = f"{why.kind}: {why} (beside {len(names) - 1} others)"
            session.record(*what, "failed", reason, self.workload)
        else:
            session.died(*what, why, self.workload)

    def _record(self, names: list[str], reply: dict, unsteady: str) -> None:
        marks = {"repeated": self.unsteady} if self.unsteady else {}
        marks |= {"unsteady": unsteady} if unsteady else {}
        race = short_hash([names, str(self.workload), reply["intervals"], len(self.session.known.lines)], 8)
        for name in names:
            figures = vars(Interval(*reply["intervals"][name]))
            self.session.record(
                self.bench, name, "final", "kept", "", self.workload, **figures, race=race, among=len(names),
                state=reply["state"], **marks,
            )  # fmt: skip


def slowed(state: dict) -> str:
    """Why a device was slower than it could be, in words; "" where it was not."""
    reasons = {reason for moment in state.values() for reason in moment.get("throttling") or ()}
    return f"throttled: {', '.join(sorted(reasons))}" if reasons else ""
