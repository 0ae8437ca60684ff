"""What a log comes to, line by line: what became of each candidate, and who leads on each shape and machine.

Progress reads it while a sweep runs, why and report afterwards. A later line counts instead of an earlier one of the
same candidate, rung, shape and machine. Nothing is decided here: what is published is publish's to say.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from kdagen.autotune.log import MEASURED, RUNGS
from kdagen.autotune.sweep import Study, Sweep, canonical
from kdagen.autotune.timing import Interval, winner

from kdagen.schedule import changes, in_words

BEFORE = ("lowered", "ptxas", "identical", "correct")  # before a candidate is timed
DEATHS = 3  # after which a candidate is quarantined


@dataclass(frozen=True, order=True)
class Place:
    """Where and how something was measured; figures of two places are never compared."""

    device: str
    processors: int
    policy: str
    versions: str  # canonical JSON

    @staticmethod
    def of(line: dict) -> Place:
        under = line.get("under") or {}
        versions = canonical(under.get("versions") or {})
        return Place(under.get("device", "?"), under.get("processors", 0), under.get("policy", "?"), versions)

    def __str__(self) -> str:
        return f"{self.device} ({self.processors} processors), {self.policy}"


@dataclass(frozen=True)
class Timed:
    """A candidate's time on one shape."""

    candidate: str
    ms: float
    low: float
    high: float
    rung: str  # "screen" or "final"
    unsteady: str = ""  # why it is not to be relied upon

    @staticmethod
    def of(line: dict) -> Timed:
        ms = line["median"] if line["rung"] == "final" else line["ms"]
        interval = line.get("low", ms), line.get("high", ms)
        return Timed(line["candidate"], ms, *interval, line["rung"], line.get("unsteady", ""))

    @property
    def interval(self) -> Interval:
        return Interval(self.ms, self.low, self.high, 0)


@dataclass(frozen=True)
class Step:
    """A rung of the funnel: how many candidates came to it, and what it said to them."""

    rung: str
    verdicts: dict[str, int]  # by verdict
    reasons: tuple[tuple[int, str], ...]  # of those not kept: how many of each kind, and one of them as it was said

    @property
    def reached(self) -> int:
        return sum(self.verdicts.values())


class Standing:
    """All studies of a sweep."""

    def __init__(self, sweep: Sweep, lines: Iterable[dict] = ()):
        self.sweep = sweep
        self.studies = {study.task.name: StudyStanding(study) for study in sweep.studies}
        for line in lines:
            self.add(line)

    def add(self, line: dict) -> None:
        if (study := self.studies.get(line.get("task"))) is not None:
            study.add(line)

    @property
    def there(self) -> str:
        """How far the log has come, in words; "" for an empty one."""
        words = {"model": "candidates planned", "identical": "compiled", "screen": "screened", "final": "in finals"}
        counts = {word: sum(len(s.lines[rung]) for s in self.studies.values()) for rung, word in words.items()}
        return ", ".join(f"{n} {word}" for word, n in counts.items() if n)


class StudyStanding:
    """One study: its lines by rung and candidate."""

    def __init__(self, study: Study):
        self.study = study
        self.lines: dict[str, dict[str, dict[tuple, dict]]] = {rung: {} for rung in RUNGS}
        self.deaths: Counter[str] = Counter()
        self.races: dict[tuple, dict[str, dict[str, dict]]] = {}  # finals by machine and shape, race and candidate
        self.default: str | None = None
        self.places: dict[Place, None] = {}  # in the order in which they came

    def add(self, line: dict) -> None:
        rung, candidate, key = line["rung"], line["candidate"], ()
        if rung in MEASURED:
            key = (Place.of(line), line.get("workload", ""))
            self.places[key[0]] = None
        self.lines[rung].setdefault(candidate, {})[key] = line
        if rung == "final" and line["verdict"] == "kept":
            self.races.setdefault(key, {}).setdefault(line.get("race", ""), {})[candidate] = line
        self.deaths[candidate] += "death" in line
        if line.get("default"):
            self.default = candidate

    # -- candidates ---------------------------------------------------------------------------------------------------

    def model(self, candidate: str | None) -> dict:
        """Its line at the rung of the model; empty where there is none."""
        return self.lines["model"].get(candidate, {}).get((), {})

    def schedule(self, candidate: str | None) -> dict:
        """Its fields."""
        return self.model(candidate).get("schedule", {})

    def difference(self, candidate: str) -> str:
        """Its schedule, as people say it: where it differs from the default."""
        if candidate == self.default:
            return "the default"
        return in_words(dict(sorted(self._changes(candidate).items()))) or candidate

    def _changes(self, candidate: str) -> dict:
        return changes(self.schedule(candidate), self.schedule(self.default))

    def twin(self, candidate: str | None) -> str | None:
        """The candidate that was measured in its place, where their binaries are the same."""
        return self.lines["identical"].get(candidate, {}).get((), {}).get("same_as", candidate)

    @property
    def quarantined(self) -> list[str]:
        return sorted(c for c, deaths in self.deaths.items() if deaths >= DEATHS)

    def waits(self, candidate: str) -> bool:
        """Whether something is yet to be learned of it: neither stopped nor screened; a death may be an accident."""
        last = [line for rung in BEFORE for line in self.lines[rung].get(candidate, {}).values()]
        stopped = any(line["verdict"] != "kept" and "death" not in line for line in last)
        return not (stopped or candidate in self.lines["screen"] or candidate in self.quarantined)

    @property
    def finished(self) -> bool:
        """Whether there were finals on each shape, on the machine that measured last."""
        place = next(reversed(self.places), None)
        finals = {key for lines in self.lines["final"].values() for key in lines}
        return all((place, str(workload)) in finals for workload in self.study.workloads)

    @property
    def audited(self) -> list[str]:
        """What the model rejected and is tried all the same."""
        return sorted(c for c in self.lines["model"] if self.model(c).get("audit"))

    # -- times --------------------------------------------------------------------------------------------------------

    def times(self, place: Place, workload: str) -> dict[str, Timed]:
        """The time of each candidate that is right there: of its final, else of its screening."""
        found = {}
        for rung in ("screen", "final"):
            for candidate, lines in self.lines[rung].items():
                line = lines.get((place, workload))
                if line and line["verdict"] != "failed" and not self._wrong(candidate, place):
                    found[candidate] = Timed.of(line)
        return {c: t for c, t in found.items() if c not in self.quarantined}

    def ranking(self, place: Place, workload: str) -> list[Timed]:
        """Those of the finals, or where there were none of the screening: the one to use, then the fastest first."""
        times = self.times(place, workload)
        finals = {c: t for c, t in self._last_race(place, workload).items() if c in times}
        ranked = sorted((finals or times).values(), key=lambda t: (t.ms, t.candidate != self.default, t.candidate))
        if finals:
            intervals, effort = {c: t.interval for c, t in finals.items()}, lambda c: len(self._changes(c))
            best = winner(intervals, self.twin(self.default), effort)
            ranked.sort(key=lambda t: t.candidate != best)
        return ranked

    def _last_race(self, place: Place, workload: str) -> dict[str, Timed]:
        """The finals that were run together, the last time that all of them came to an end."""
        races = self.races.get((place, workload), {}).values()
        whole = [run for run in races if all(line.get("among", len(run)) == len(run) for line in run.values())]
        return {c: Timed.of(line) for c, line in whole[-1].items()} if whole else {}

    def _wrong(self, candidate: str, place: Place) -> bool:
        checks = self.lines["correct"].get(candidate, {})
        return any(line["verdict"] == "failed" for (where, _), line in checks.items() if where == place)

    def roofline(self, timed: Timed, workload: str) -> float | None:
        """The part of the least possible time, as the model has it, in the time that was measured."""
        bound = (self.model(timed.candidate).get("bound_ms") or {}).get(workload)
        return bound / timed.ms if bound else None

    # -- the model ----------------------------------------------------------------------------------------------------

    def pick(self, workload: str) -> str | None:
        """What the model alone would run: the least time predicted."""
        predicted = {c: (self.model(c).get("predicted_ms") or {}).get(workload) for c in self.lines["model"]}
        known = {c: ms for c, ms in predicted.items() if ms is not None}
        return min(known, key=lambda c: (known[c], c != self.default, c)) if known else None

    def pick_ratio(self, place: Place, workload: str) -> float | None:
        """The time of the model's pick over the best that was measured."""
        times, pick = self.times(place, workload), self.pick(workload)
        picked = times.get(self.twin(pick)) if pick else None
        return picked.ms / min(t.ms for t in times.values()) if picked else None

    def audit(self, place: Place, workload: str) -> tuple[list[str], list[str]]:
        """Of what the model rejected, what was timed all the same, and what of it beats all that the model kept."""
        times = self.times(place, workload)
        tried = [c for c in self.audited if self.twin(c) in times]
        best = min((t.ms for c, t in times.items() if c not in tried), default=float("inf"))
        return tried, [c for c in tried if times[self.twin(c)].ms < best]

    # -- what became of them ------------------------------------------------------------------------------------------

    def funnel(self) -> list[Step]:
        """The rungs that were reached, in order."""
        return [self._step(rung) for rung in RUNGS if self.lines[rung]]

    def _step(self, rung: str) -> Step:
        verdicts, kinds, examples = Counter(), Counter(), {}
        if rung == "space":  # which logs rejections alone: what came to the model was kept
            verdicts["kept"] = len(self.lines["model"])
        for line in (self.verdict(rung, candidate) for candidate in self.lines[rung]):
            count = line.get("candidates", 1)  # a line of the space may be about several
            verdicts[line["verdict"]] += count
            if line["verdict"] != "kept":
                reason = line.get("constraint") or line["reason"]
                kinds[examples.setdefault(kind(reason), reason)] += count
        reasons = tuple((n, reason) for reason, n in sorted(kinds.items(), key=lambda r: (-r[1], r[0])))
        return Step(rung, dict(verdicts), reasons)

    def verdict(self, rung: str, candidate: str) -> dict:
        """Its one line there: of several shapes a failure first, then a success."""
        order = ("failed", "kept", "rejected")
        return min(self.lines[rung][candidate].values(), key=lambda line: order.index(line["verdict"]))

    def failures(self) -> list[dict]:
        """The last line of every candidate and rung that ended in a failure, rung by rung."""
        lines = [self.verdict(rung, candidate) for rung in RUNGS for candidate in self.lines[rung]]
        return [line for line in lines if line["verdict"] == "failed"]


def kind(reason: str) -> str:
    """A reason without its figures, so that those of one kind count as one."""
    return re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", reason)
