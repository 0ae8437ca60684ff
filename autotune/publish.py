"""Winners of a sweep as tables, a file a device: of each study and bucket the fastest schedule, or else the default.

A function of sweep.json and the log alone. Only finals count, those of the default among them: what does not lie wholly
below it is not published, but the default itself is, for that was found out too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

from kdagen.autotune.choose import key_of
from kdagen.autotune.folder import Folder
from kdagen.autotune.select import FORMAT, Entry, read, tables, user_tables
from kdagen.autotune.sweep import Study, Workload, canonical
from kdagen.autotune.timing import Interval, winner

from kdagen.build.folder import write_file
from kdagen.schedule import changes

RECORDING = "replay:"


@dataclass(frozen=True, order=True)
class Race:
    """What was timed together, and may be compared."""

    device: str
    processors: int
    policy: str
    ratio: int
    bucket: int


def publish(folder: Folder, into: Path | None = None) -> list[Path]:
    """Puts the winners of a sweep into the tables of `into`, the user's own unless given; returns the files.

    What a recording answered is no finding of a machine here: it goes into tables that are named alone.
    """
    lines = [line for line in folder.log if into or not line.get("on", "").startswith(RECORDING)]
    into = Path(into or user_tables())
    found = [entry for study in folder.sweep.studies for entry in winners(study, lines)]
    devices = sorted({(e.key.device, e.key.processors) for e in found})
    paths = [
        _merge(into / f"{slug(*d)}.json", [e for e in found if (e.key.device, e.key.processors) == d]) for d in devices
    ]
    tables.cache_clear()
    return paths


def slug(device: str, processors: int) -> str:
    """A device as a file's name: "nvidia-h100-80gb-hbm3-132"."""
    return "-".join([*re.findall(r"[a-z0-9]+", device.lower()), str(processors)])


def winners(study: Study, lines: Iterable[dict]) -> list[Entry]:
    """An entry for each race of a study that has a winner."""
    mine = [line for line in lines if line.get("task") == study.task.name]
    models = {line["candidate"]: line for line in mine if line["rung"] == "model" and "schedule" in line}
    default = next((name for name, line in models.items() if line.get("default")), None)
    raced = any((x["candidate"], x["rung"], x["verdict"]) == (default, "final", "kept") for x in mine)
    broken = not raced and any(x["candidate"] == default and x["verdict"] == "failed" for x in mine)
    races: dict[Race, list[dict]] = {}
    for line in mine:
        if line["rung"] == "final" and line["candidate"] in models:
            races.setdefault(_race(line), []).append(line)
    schedules = {name: line["schedule"] for name, line in models.items()}
    found = (_winner(study, race, _latest(run), schedules, default, broken) for race, run in sorted(races.items()))
    return [entry for entry in found if entry]


def _race(line: dict) -> Race:
    under, shape = line["under"], Workload.parse(line["workload"])
    device = under["device"], under["processors"], under["policy"]
    return Race(*device, shape.value_heads // shape.heads, shape.bucket)


def _latest(lines: list[dict]) -> dict[str, dict[str, dict]]:
    """By workload and candidate, the lines of the last race of each that was not cut off, under the last versions."""
    versions, races = lines[-1]["under"].get("versions"), {}
    for line in lines:
        if line["under"].get("versions") == versions and line["verdict"] == "kept":
            races.setdefault((line["workload"], line.get("race")), {})[line["candidate"]] = line
    whole = {
        place: run for place, run in races.items() if all(x.get("among", len(run)) == len(run) for x in run.values())
    }
    return {workload: run for (workload, _), run in whole.items()}


def _winner(study: Study, race: Race, finals: dict, schedules: dict, default: str | None, broken: bool) -> Entry | None:
    """The entry of a race, unless the default was not in it and not found to be broken either."""
    order = [str(w) for w in study.workloads]
    finals = {w: finals[w] for w in sorted(finals, key=lambda w: (order.index(w) if w in order else len(order), w))}
    if not broken:
        finals = {w: lines for w, lines in finals.items() if default in lines}
    common = set.intersection(*map(set, finals.values())) if finals else set()
    if not common:
        return None
    # A schedule is as good as its times are relative to the default's, or where that is broken to the least.
    scale = {w: lines[default if not broken else min(common)]["median"] for w, lines in finals.items()}
    intervals = {c: _together([(finals[w][c], scale[w]) for w in finals]) for c in sorted(common)}
    untuned = schedules.get(default, {})
    best = winner(intervals, None if broken else default, lambda c: len(changes(schedules[c], untuned)))
    task, shape = study.task, Workload.parse(next(iter(finals)))
    key = key_of(task, shape, race.device, race.processors)
    return Entry(key, schedules[best], race.policy, _facts(task.op, best, None if broken else default, finals))


def _together(timed: list[tuple[dict, float]]) -> Interval:
    """Geometric means over workloads of what a candidate took, relative to a time each."""
    mean = (geometric_mean([line[part] / scale for line, scale in timed]) for part in ("median", "low", "high"))
    return Interval(*mean, min(line["calls"] for line, _ in timed))


def _facts(op: str, best: str, default: str | None, finals: dict) -> dict:
    """What an entry says for people: times are geometric means over its workloads."""
    lines = [by[best] for by in finals.values()]
    untuned = [by[default]["median"] for by in finals.values()] if default else None
    ms, low, high = (_rounded([line[part] for line in lines]) for part in ("median", "low", "high"))
    default_ms = _rounded(untuned) if untuned else None
    unsteady = sorted({line["unsteady"] for line in lines if "unsteady" in line})
    return {
        "op": op.rpartition(":")[2],
        "workload": ", ".join(finals),
        "ms": ms,
        "low": low,
        "high": high,
        "default_ms": default_ms,
        "gain": default_ms and float(f"{default_ms / ms:.4g}"),
        "kernels": lines[0]["under"].get("kernels", ""),
        "versions": lines[0]["under"].get("versions", {}),
        "date": max(line["at"] for line in lines)[:10],
        **({"unsteady": "; ".join(unsteady)} if unsteady else {}),
    }


def _rounded(times: list[float]) -> float:
    return float(f"{geometric_mean(times):.6g}")


def _merge(path: Path, entries: list[Entry]) -> Path:
    """A table with these entries; it keeps those of other keys that it has."""
    old = read(path) if path.exists() else []
    merged = {_place(entry): entry for entry in [*old, *entries]}
    key = entries[0].key
    head = json.dumps({"format": FORMAT, "device": {"name": key.device, "processors": key.processors}})
    lines = ",\n".join(canonical(merged[place].line()) for place in sorted(merged))
    write_file(path, f'{head[:-1]}, "entries": [\n{lines}\n]}}\n')
    return path


def _place(entry: Entry) -> tuple:
    """Where an entry stands in its table; of one place there is one."""
    return *vars(entry.key).values(), entry.policy
