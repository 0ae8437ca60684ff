"""Which candidates are tried, and in which order: all of them where they are few, else those that a search comes to.

A search has no memory of its own: the sweep, the tables and the log's lines say what should be climbed as of now. Seeds
(winners of tables, the model's best) and their neighbours come first; then, as figures come in, the neighbours of the
best candidate of each workload, axis by axis, until none is untried.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from kdagen.autotune import gpus, select
from kdagen.autotune.folder import Folder
from kdagen.autotune.neighbours import neighbours
from kdagen.autotune.select import Entry
from kdagen.autotune.sweep import Candidate, Study, Sweep, Task, Workload

from kdagen.errors import ScheduleError

FEW = 3  # of the model's best of each workload, that a search starts from


def todo(folder: Folder, study: Study, lines: list[dict]) -> list[Candidate]:
    """All candidates of a study that should be climbed as of now, the untuned default first; those tried are in it."""
    return chosen(folder.sweep, study, lines, select.tables)


def chosen(sweep: Sweep, study: Study, lines: Iterable[dict], tables) -> list[Candidate]:
    """The same; `tables` gives the entries of all tables, and is called only where there is a search."""
    field = Field.of(study, lines)
    if sum(not line.get("audit") for line in field.kept.values()) <= sweep.exhaustive:
        ids = sorted(field.kept, key=field.order)
    else:
        ids = list(dict.fromkeys(_searched(field, sweep, study, tables)))
    return [Candidate.of(study.task, field.kept[i]["schedule"]) for i in ids]


def _searched(field: Field, sweep: Sweep, study: Study, tables) -> Iterator[str]:
    seeds = list(dict.fromkeys([*field.default, *_from_tables(field, study, tables()), *field.model_best()]))
    yield from seeds
    workloads = [str(w) for w in study.workloads]
    for seed in seeds:
        yield from field.neighbours(seed, sweep.seed)
    for workload in workloads:
        if best := field.best(workload):
            yield from field.neighbours(best, f"{sweep.seed} {workload}")
    yield from sorted((i for i, line in field.kept.items() if line.get("audit")), key=field.order)


@dataclass(frozen=True)
class Field:
    """The candidates that the model kept, by id, and what was measured of them."""

    study: Study
    kept: dict[str, dict]  # lines of the rung "model"
    measured: dict[str, dict[str, float]]  # by workload and candidate: screened time, over the default's on its device
    ranks: dict[str, float]  # predicted time over the best that is predicted, on the workload where that is least

    @staticmethod
    def of(study: Study, lines: Iterable[dict]) -> Field:
        kept, measured = {}, {}
        for line in lines:
            if line.get("task") != study.task.name or line["verdict"] != "kept":
                continue
            if line["rung"] == "model":
                kept[line["candidate"]] = line
            elif line["rung"] == "screen":
                found = measured.setdefault(line["workload"], {})
                time = line.get("relative", line["ms"])
                found[line["candidate"]] = min(time, found.get(line["candidate"], time))
        return Field(study, kept, measured, _ranks(kept))

    @property
    def default(self) -> list[str]:
        return [i for i, line in self.kept.items() if line.get("default")]

    def order(self, candidate: str) -> tuple:
        """The default first, then by predicted time; where nothing is predicted as the plan has them."""
        return not self.kept[candidate].get("default"), self.ranks.get(candidate, 0.0)

    def fields(self, candidate: str) -> dict:
        return self.kept[candidate]["schedule"]

    def best(self, workload: str) -> str | None:
        """The fastest candidate that was measured on a workload."""
        times = {i: time for i, time in self.measured.get(workload, {}).items() if i in self.kept}
        return min(times, key=lambda i: (times[i], i), default=None)

    def model_best(self) -> Iterator[str]:
        """The few of each workload that the model thinks best."""
        for workload in map(str, self.study.workloads):
            times = {
                i: line["predicted_ms"][workload] for i, line in self.kept.items() if workload in line["predicted_ms"]
            }
            yield from sorted(times, key=lambda i: (times[i], i))[:FEW]

    def neighbours(self, centre: str, seed) -> Iterator[str]:
        """Along each axis, the axes in an order of chance."""
        axes = sorted(self.fields(centre))
        random.Random(f"{seed} {self.study.task.name}").shuffle(axes)
        others = {i: line["schedule"] for i, line in self.kept.items()}
        found = neighbours(self.fields(centre), others, lambda i: (self.ranks.get(i, 0.0), i))
        for _, _, candidate in sorted((axes.index(axis), str(value), i) for (axis, value), i in found.items()):
            yield candidate


def _ranks(kept: dict[str, dict]) -> dict[str, float]:
    best: dict[str, float] = {}
    for line in kept.values():
        for workload, ms in line.get("predicted_ms", {}).items():
            best[workload] = min(ms, best.get(workload, ms))
    return {
        i: min(ms / best[workload] for workload, ms in line["predicted_ms"].items())
        for i, line in kept.items()
        if line.get("predicted_ms")
    }


# -- tables


def _from_tables(field: Field, study: Study, entries: Iterable[Entry]) -> Iterator[str]:
    """Candidates that won before: on this GPU, and on the one that is most like it."""
    ids = {Candidate.of(study.task, line["schedule"]).schedule.json(): i for i, line in field.kept.items()}
    entries = list(entries)
    for workload in study.workloads:
        for entry in winners(study.task, workload, entries):
            fields = {**field.fields(field.default[0]), **entry.schedule} if field.default else entry.schedule
            if (found := _id(ids, study.task, fields)) is not None:
                yield found


def _id(ids: dict[str, str], task: Task, fields: dict) -> str | None:
    try:
        return ids.get(task.schedule_type().replace(**fields).json())
    except ScheduleError:  # an entry of another version of kdagen
        return None


def winners(task: Task, workload: Workload, entries: list[Entry]) -> list[Entry]:
    """The measured entry nearest in size of this GPU, and that of the GPU nearest to it."""
    gpu = gpus.find(task.device)
    if gpu is None or not entries:
        return []
    by_gpu: dict[gpus.Gpu, list[Entry]] = {}
    for entry in entries:
        chip = gpus.find(entry.key.device)
        if chip and not entry.modelled and _fits(entry, task, workload):
            by_gpu.setdefault(chip, []).append(entry)
    other = gpus.nearest(gpu, [chip for chip in by_gpu if chip != gpu])
    chips = [chip for chip in (gpu, other) if chip in by_gpu]
    return [min(by_gpu[chip], key=lambda e: (abs(e.key.bucket - workload.bucket), e.key.bucket)) for chip in chips]


def _fits(entry: Entry, task: Task, workload: Workload) -> bool:
    """Whether an entry speaks of such calls, be it of another target."""
    from kdagen.autotune.choose import key_of

    key = key_of(task, workload, entry.key.device, entry.key.processors)
    return replace(key, target=entry.key.target).fixed == entry.key.fixed
