"""What of a study was measured already, as the log has it, under what a machine and its kernels are now.

measure asks it what is left to do. (kdagen.autotune.standing tells people what a log comes to, under whatever it was
measured.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kdagen.autotune.folder import Folder
from kdagen.autotune.log import MEASURED
from kdagen.autotune.standing import DEATHS
from kdagen.autotune.sweep import Candidate, Study, Workload, short_hash

from kdagen.errors import ArtefactError

COMPILER = ("lowered", "ptxas", "identical")


class Measured:
    """The lines of one study, for a machine of these facts (kdagen.autotune.devices.Device.facts)."""

    def __init__(self, folder: Folder, study: Study, facts: dict, lines: Iterable[dict] = ()):
        self.folder, self.study, self.facts = folder, study, facts
        self.lines: list[dict] = []
        self.deaths: Counter[str] = Counter()
        self.unreadable: set[str] = set()  # candidates whose machine code is damaged
        self._default: str | None = None
        self._schedules: dict[str, dict] = {}
        self._compiled: dict[str, dict] = {}  # the last line of each on a rung of the compiler
        self._measured: dict[tuple, list[dict]] = {}  # by candidate, rung and shape
        self._manifests: dict[str, dict | None] = {}
        for line in lines:
            self.add(line)

    def add(self, line: dict) -> None:
        """One more line; those of other studies do not count."""
        if line["task"] != self.study.task.name:
            return
        self.lines.append(line)
        self.deaths[line["candidate"]] += "death" in line
        if "schedule" in line:
            self._schedules[line["candidate"]] = line["schedule"]
        if line.get("default"):
            self._default = line["candidate"]
        if line["rung"] in COMPILER:
            self._compiled[line["candidate"]] = line
        if line["rung"] in MEASURED:
            key = line["candidate"], line["rung"], line.get("workload")
            self._measured.setdefault(key, []).append(line)

    # -- candidates, by their ids -------------------------------------------------------------------------------------

    @property
    def default(self) -> str | None:
        """The untuned default, or what was found to be the same binary."""
        return self._compiled.get(self._default, {}).get("same_as", self._default)

    def candidate(self, name: str) -> Candidate:
        """That of an id."""
        return Candidate.of(self.study.task, self._schedules[name])

    def quarantined(self, candidate: str) -> bool:
        return self.deaths[candidate] >= DEATHS

    def refused(self, candidate: str) -> bool:
        """Whether the compiler's rungs stopped it."""
        return self._compiled.get(candidate, {"verdict": "kept"})["verdict"] != "kept"

    def manifest(self, candidate: str) -> dict | None:
        """That of its machine code, where the device runs any; read once."""
        if candidate not in self._manifests and self.facts.get("compiled", True):
            self._manifests[candidate] = self.folder.manifest(candidate)
        return self._manifests.get(candidate)

    def runnable(self, candidate: str) -> bool:
        """Whether there is machine code for it that can be read, or need be none."""
        if not self.facts.get("compiled", True):
            return True
        try:
            return candidate not in self.unreadable and self.manifest(candidate) is not None
        except ArtefactError:
            return False

    def finished(self, candidate: str) -> bool:
        """Whether it was found wrong, or was right and screened on each shape, or is not to be tried again."""
        if self.quarantined(candidate) or candidate in self.unreadable:
            return True
        checked = self.found(candidate, "correct")
        if checked is None or checked["verdict"] == "failed":
            return checked is not None
        return all(self.found(candidate, "screen", w) for w in self.study.workloads)

    # -- lines --------------------------------------------------------------------------------------------------------

    def under(self, candidate: str, workload: Workload | None = None) -> dict:
        """All that a figure of it depends on, here and now."""
        task, facts = self.study.task, self.facts
        under = {"kernels": self._kernels(candidate), "policy": str(self.folder.sweep.policy)}
        under |= {name: facts[name] for name in ("device", "processors")}
        under |= {"versions": {**self._compilers(candidate), **facts["versions"]}}
        under |= {"dtype": task.dtype, "head_dim": list(task.head_dim)}
        shape = {"ratio": workload.value_heads // workload.heads, "bucket": workload.bucket} if workload else {}
        return under | shape

    def _compilers(self, candidate: str) -> dict:
        """The versions of what made its machine code."""
        return (self.manifest(candidate) or {}).get("versions", {}) if self.runnable(candidate) else {}

    def _kernels(self, candidate: str) -> str:
        known = self._compiled.get(candidate, {}).get("kernels_hash") or self.facts.get("kernels")
        return known or short_hash(self.manifest(candidate))

    def found(self, candidate: str, rung: str, workload: Workload | None = None, on: str | None = None) -> dict | None:
        """The last line that settles it there (and on that device, if one is said); a death settles nothing."""
        under = self.under(candidate, workload)
        for line in reversed(self._measured.get((candidate, rung, str(workload) if workload else None), ())):
            if "death" not in line and line["under"] == under and on in (None, line.get("on")):
                return line
        return None

    def screened(self, workload: Workload) -> list[dict]:
        """A line of each that is right and was not stopped on a shape, the fastest first."""
        ids = {candidate for candidate, rung, shape in self._measured if (rung, shape) == ("screen", str(workload))}
        lines = [self.found(candidate, "screen", workload) for candidate in ids if not self.quarantined(candidate)]
        kept = [line for line in lines if line and line["verdict"] == "kept"]
        return sorted(kept, key=lambda line: (relative(line), line["candidate"]))

    def race(self, workload: Workload, contenders: list[str]) -> list[dict]:
        """The lines of the last finals that were run among these, whole; [] if there were none."""
        lines = [self.found(candidate, "final", workload) for candidate in contenders]
        runs = {(line.get("race"), line.get("among")) for line in lines if line}
        return lines if len(runs) == 1 and all(lines) and runs.pop()[1] == len(contenders) else []

    def was_raced(self, candidate: str, workload: Workload) -> bool:
        """Whether it was in finals there that were whole, whoever else was in them."""
        last = self.found(candidate, "final", workload)
        race = [x for x in self.lines if last and x["rung"] == "final" and x.get("race") == last.get("race")]
        return last is not None and len(race) == last.get("among", 1)


def relative(line: dict) -> float:
    """A screened time over the default's on the same device, or where there is none the time itself."""
    return line.get("relative", line["ms"])
