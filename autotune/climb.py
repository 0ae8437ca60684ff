"""What is known of candidates and their kernels while these are compiled, and what the log is told of it.

Runs no compiler: kdagen.autotune.compile does, and passes on what it hears. A kernel's failure is that of every
candidate that needs it; if it was an accident (memory ran out, a compiler hung), of the one for which it was compiled,
and the next one tries again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kdagen.autotune.compiled import keep, load
from kdagen.autotune.folder import Folder
from kdagen.autotune.standing import DEATHS
from kdagen.autotune.sweep import Candidate, Study, short_hash

from kdagen.errors import ArtefactError, ScheduleError

RUNGS = ("lowered", "ptxas", "identical")
SERIALISED = "(C7512)"  # ptxas makes each wgmma wait for the one before


class Past:
    """What the log of a sweep says of these rungs."""

    def __init__(self, lines: Iterable[dict]):
        self.last: dict[tuple[str, str], dict] = {}  # by candidate and rung
        self.deaths: Counter[str] = Counter()  # of candidates, and of kernels by their key
        self.faults: dict[str, dict] = {}  # by a kernel's key
        self.defaults: dict[str, str] = {}  # by task
        for line in lines:
            self._add(line)

    def _add(self, line: dict) -> None:
        if line.get("default"):
            self.defaults[line["task"]] = line["candidate"]
        if "death" in line:
            self.deaths.update([line["candidate"], line.get("key", "")])
        if "key" in line and ("death" not in line or self.deaths[line["key"]] >= DEATHS):
            self.faults[line["key"]] = line
        if line["rung"] in RUNGS:
            self.last[line["candidate"], line["rung"]] = line

    def on(self, candidate: str) -> dict[str, dict]:
        """Its last line on each rung, where that says something for good."""
        lines = {rung: self.last[candidate, rung] for rung in RUNGS if (candidate, rung) in self.last}
        return {rung: line for rung, line in lines.items() if "death" not in line}

    def stopped(self, candidate: str) -> bool:
        """Whether there is nothing more to learn: deaths may be accidents, unless they are too many."""
        return self.deaths[candidate] >= DEATHS or any(v["verdict"] != "kept" for v in self.on(candidate).values())

    def binaries(self, task: str) -> dict[str, str]:
        """The candidate of each machine code that was kept."""
        lines = [line for (_, rung), line in self.last.items() if rung == "identical" and line["task"] == task]
        return {line["binary"]: line["candidate"] for line in lines if line["verdict"] == "kept"}


class Kernel:
    """What is known of a kernel that some candidates share."""

    def __init__(self, key: str, job, past: Past):
        self.key, self.job, self.deaths = key, job, past.deaths[key]
        self.launch: dict | None = None  # once lowered
        self.report: dict | None = None  # once compiled
        self.fault: dict | None = None  # of all who need it: rung, verdict, reason
        self.owner: Climb | None = None  # for which it is being compiled
        self.compiling = False  # that is, no longer being lowered
        if line := past.faults.get(key):
            self.fault = {field: line[field] for field in ("rung", "verdict", "reason")}

    @property
    def waiting(self) -> bool:
        return not (self.owner or self.report or self.fault)

    def lower(self, launch: dict) -> None:
        self.launch = {**launch, "threads": math.prod(launch["block"])}

    def finish(self, entry: Path) -> None:
        """`entry`: its folder in the cache."""
        from kdagen.build.kernel import REPORT

        self.entry, self.report, self.fault = entry, json.loads((entry / REPORT).read_text()), None
        self.lower(self.report)
        if not self.report["library"]:
            reason = f"kdagen makes no machine code for {self.job.target}"
            self.fault = {"rung": "ptxas", "verdict": "rejected", "reason": reason}

    def fail(self, error: Exception) -> dict:
        """The line of its owner; of all others too, unless it was an accident."""
        verdict = "rejected" if isinstance(error, ScheduleError) else "failed"
        line = {"rung": "ptxas" if self.compiling else "lowered", "verdict": verdict, "reason": str(error)}
        death = getattr(error, "death", "")
        self.deaths += bool(death)
        if not death or self.deaths >= DEATHS:
            self.fault = line
        self.owner, self.compiling = None, False
        return {**line, "death": death} if death else line

    @property
    def passed(self) -> tuple[str, ...]:
        """Its rungs so far; the launch is told before it is checked."""
        return ("lowered", "ptxas") if self.report else ("lowered",) if self.compiling else ()

    @property
    def figures(self) -> dict[str, dict]:
        """What is known of it, by rung, whether passed or not."""
        found = {"lowered": {n: self.launch[n] for n in ("shared_bytes", "threads", "grid")}} if self.launch else {}
        if self.report:
            spills = (self.report["spill_stores"] or 0) + (self.report["spill_loads"] or 0)
            found["ptxas"] = {"spills": spills, **{n: self.report[n] for n in ("registers", "warnings", "seconds")}}
        return found


class Climb:
    """A candidate on its way."""

    def __init__(self, candidate: Candidate, course: Course, done: Iterable[str]):
        self.candidate, self.course, self.done = candidate, course, set(done)  # the rungs that the log has
        self.source, self.kernels, self.ended = None, (), False

    def figures(self, rung: str) -> dict[str, dict]:
        """What is known of its kernels, by name."""
        return {k.job.name: k.figures[rung] for k in self.kernels if rung in k.figures}

    def has(self, rung: str) -> bool:
        """Whether all of its kernels passed a rung of the compiler's."""
        return self.source is not None and all(rung in k.passed for k in self.kernels)

    def log(self, rung: str, verdict: str, reason: str = "", **figures) -> None:
        """Appends its line, unless it is there."""
        if rung not in self.done or verdict != "kept":
            self.done.add(rung)
            self.course.append(self.candidate.id, rung, verdict, reason, **figures)
        self.ended = verdict != "kept" or rung == "identical"

    def fail(self, kernel: Kernel, fault: dict) -> None:
        """What became of one of its kernels is what becomes of it."""
        self.log(**fault, kernels=self.figures(fault["rung"]), kernel=kernel.job.name, key=kernel.key)

    @property
    def binary(self) -> str:
        """A hash of its machine code and of how that is launched."""
        plan = {n: v for n, v in self.source.plan().items() if n != "schedule"}
        plan["kernels"] = [{n: v for n, v in k.items() if n != "bytes_a_token"} for k in plan["kernels"]]
        libraries = [(k.entry / k.report["library"]).read_bytes() for k in self.kernels]
        return short_hash([plan, [hashlib.sha256(library).hexdigest() for library in libraries]], 16)


class Course:
    """The candidates of one study, in the order of the search."""

    def __init__(self, folder: Folder, study: Study, past: Past, candidates: list[Candidate], say):
        self.folder, self.task, self.past, self.say = folder, study.task.name, past, say
        self.binaries = past.binaries(self.task)
        unsettled = [c for c in candidates if not past.stopped(c.id) and not self._whole(c.id)]
        self.climbs = [Climb(c, self, past.on(c.id)) for c in unsettled]
        self.default = past.defaults.get(self.task)
        self._default = next((c for c in self.climbs if c.candidate.id == self.default), None)

    def append(self, *fields, **figures) -> None:
        self.say(self.folder.log.append(self.task, *fields, **figures))

    def _whole(self, candidate: str) -> bool:
        """Whether it was kept, and lies in the folder undamaged."""
        if "identical" not in self.past.on(candidate):
            return False
        with contextlib.suppress(ArtefactError):
            return bool(load(self.folder, candidate))
        return False

    def settle(self) -> None:
        """Says of each candidate what can be said by now.

        Of candidates whose machine code is the same the first wins, so that each waits for those before it.
        """
        first = True
        for climb in self.climbs:
            if not climb.ended:
                self._settle(climb, first)
                first = first and climb.ended

    def _settle(self, climb: Climb, first: bool) -> None:
        if broken := next((k for k in climb.kernels if k.fault), None):
            return climb.fail(broken, broken.fault)
        if climb.has("lowered"):
            climb.log("lowered", "kept", kernels=climb.figures("lowered"))
        if climb.has("ptxas") and (default := self._default_figures()) is not None:
            figures = climb.figures("ptxas")
            reason = "" if "ptxas" in climb.done else objection(figures, default)
            climb.log("ptxas", "rejected" if reason else "kept", reason, kernels=figures)
            if first and not reason:
                self._compare(climb)

    def _default_figures(self) -> dict | None:
        """What the default's kernels came to: {} if there is none to compare with, None while there may yet be one."""
        if self._default is None:
            return self.past.on(self.default).get("ptxas", {}).get("kernels", {}) if self.default else {}
        return self._default.figures("ptxas") if self._default.ended or self._default.has("ptxas") else None

    def _compare(self, climb: Climb) -> None:
        from kdagen.runtime.manifest import digest

        candidate, hashes = climb.candidate.id, {"binary": climb.binary, "kernels_hash": digest(climb.source)}
        twin = self.binaries.setdefault(hashes["binary"], candidate)
        if twin != candidate != self.default:
            return climb.log("identical", "rejected", f"the same machine code as {twin}", same_as=twin)
        keep(self.folder, candidate, climb.source, {k.key: k.entry for k in climb.kernels})
        if not hashes.items() <= self.past.on(candidate).get("identical", {}).items():
            climb.done.discard("identical")  # it was compiled anew, and otherwise
        climb.log("identical", "kept", **hashes)


def objection(kernels: dict[str, dict], default: dict[str, dict]) -> str:
    """Why ptxas's figures speak against a candidate, given those of the default; "" if they do not."""
    for name, found in kernels.items():
        usual = default.get(name, {"spills": 0, "warnings": []})
        if found["spills"] > usual["spills"]:
            return f"{name} spills {found['spills']} bytes of registers, the default's {usual['spills']}"
        if _serialised(found) and not _serialised(usual):
            return f"ptxas makes the products of {name} wait for each other {SERIALISED}, unlike the default's"
    return ""


def _serialised(figures: dict) -> bool:
    return any(SERIALISED in warning for warning in figures["warnings"])
