"""What gpu.py found of one GPU, as one JSON file: a record for each unit of work, with what it was found under.

A unit that is there under the same kernels, device and versions need not be done again, so a run that was cut short
goes on where it was. Ratios are formed inside one record only: all figures of a record are of one process.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from kdagen.autotune import gpus
from kdagen.autotune.publish import slug

FORMAT = 1
SAME = ("gpu", "multiprocessors", "versions")  # facts that a record counts under


@dataclass(frozen=True)
class Unit:
    """What is done at once, and found in one record."""

    stage: str
    name: str
    kernels: str  # a hash of those that take part
    asked: dict = field(default_factory=dict, hash=False)  # of a worker: plain data

    def without(self, label: str) -> Unit:
        """The same without one contender."""
        if label not in self.asked.get("labels", ()):
            return replace(self, asked={**self.asked, "peer": False})
        return replace(self, asked={**self.asked, "labels": [x for x in self.asked["labels"] if x != label]})


class Results:
    """The records of a file; of a GPU whose facts are known, those that still count."""

    def __init__(self, path: Path):
        self.path, self.facts = path, {}
        found = json.loads(path.read_text()) if path.exists() else {}
        self.runs: list[dict] = found.get("runs", [])
        self.records: list[dict] = found.get("records", [])
        self.left: list[str] = []

    def find(self, unit: Unit) -> dict | None:
        """The record of a unit that need not be done again."""
        named = (r for r in self.records if (r["stage"], r["name"], r["kernels"]) == _key(unit))
        return next((r for r in named if self._counts(self.runs[r["run"]]["facts"])), None)

    def of(self, stage: str, name: str) -> dict | None:
        """The record of this name, whatever its kernels were."""
        return next((r for r in self.records if (r["stage"], r["name"]) == (stage, name)), None)

    def _counts(self, facts: dict) -> bool:
        return all(facts.get(name) == self.facts.get(name) for name in SAME)

    def add(self, unit: Unit, run: dict, **found) -> dict:
        """A record, in place of an older one, and the file with it."""
        record = {"stage": unit.stage, "name": unit.name, "kernels": unit.kernels, "run": self._run(run), **found}
        stale = [i for i, r in enumerate(self.records) if (r["stage"], r["name"]) == (unit.stage, unit.name)]
        for i in reversed(stale):
            del self.records[i]
        self.records.append(record)
        self.save()
        return record

    def _run(self, run: dict) -> int:
        if run not in self.runs:
            self.runs.append(run)
        return self.runs.index(run)

    def save(self) -> None:
        """Whole or not at all: what is written may be cut off."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"format": FORMAT, "gpu": self.facts.get("gpu"), "left": self.left}
        found |= {"runs": self.runs, "records": self.records}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(found, indent=1) + "\n")
        new.replace(self.path)


def _key(unit: Unit) -> tuple:
    return unit.stage, unit.name, unit.kernels


def name_of(device: str, processors: int) -> str:
    """A GPU as a file's name: "H100", or as it calls itself."""
    known = gpus.find(device)
    return known.name if known else slug(device, processors)


def path_for(folder: Path, facts: dict, fresh: bool = False) -> Path:
    """The last file of this GPU in a folder, or one of today."""
    name = name_of(facts["gpu"], facts["multiprocessors"])
    there = [] if fresh else sorted(folder.glob(f"{name}-????-??-??.json"))
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return there[-1] if there else folder / f"{name}-{today}.json"
