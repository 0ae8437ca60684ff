"""The schedule for a call among those in tables: exact, else the nearest bucket, else the nearest GPU. Never measures.

Tables are JSON files, one a device, an entry a line: those that ship in autotune/tables, then the user's own (in
kdagen's cache folder), whose entries come first. Where no table speaks, the model or the safe default does: that needs
the compiler, and so is for kdagen.autotune.choose. Needs neither torch nor sympy.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kdagen.autotune import gpus
from kdagen.autotune.sweep import CPU

from kdagen import debug
from kdagen.errors import ArtefactError, KdagenError

FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
log = logging.getLogger("kdagen")


@dataclass(frozen=True)
class Key:
    """What a schedule is looked up for; all but bucket and device must agree, head dims never match nearly."""

    recurrence: str  # hash of the canonical form (kdagen.runtime.signature.recurrence_hash)
    purpose: str
    target: str  # of kdagen.target.TARGETS, or "cpu"
    head_dim: tuple[int, int]
    ratio: int  # HV / H
    dtype: str
    gate_dtype: str
    state: str  # such as "KV float32"
    device: str  # as it calls itself: "NVIDIA H100 80GB HBM3"
    processors: int  # multiprocessors of a GPU, cores of a CPU
    bucket: int  # of B T HV: kdagen.autotune.sweep.bucket

    @property
    def fixed(self) -> tuple:
        """What an entry must agree with."""
        return tuple(v for n, v in vars(self).items() if n not in ("device", "processors", "bucket"))


@dataclass(frozen=True)
class Entry:
    """A line of a table: what won, for what, and what was measured."""

    key: Key
    schedule: dict = field(hash=False)
    policy: str
    facts: dict = field(default_factory=dict, compare=False, hash=False)  # kernels, ms, low, high, default_ms, versions

    @property
    def modelled(self) -> bool:
        """Whether nobody measured it: a build chose it for a GPU that no table speaks of."""
        return self.facts.get("how") == "model"

    def line(self) -> dict:
        """The inverse of `entry_of`, as a table has it."""
        return {"key": vars(self.key), "policy": self.policy, "schedule": self.schedule, **self.facts}


@dataclass(frozen=True)
class Selection:
    """A schedule's fields and how they were come by, in words for one log line."""

    schedule: dict | None  # None: no table knows any
    how: str  # "exact", "nearest bucket", "nearest GPU", "model" or "default"
    words: str
    entry: Entry | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.how}: {self.words}"


def select(key: Key, entries: Iterable[Entry] | None = None, usable: Callable[[dict], bool] | None = None) -> Selection:
    """The choice for a call: deterministic, whatever the order of entries; schedules that are not `usable` are none."""
    fits = [e for e in (tables() if entries is None else entries) if e.key.fixed == key.fixed]
    fits = [e for e in fits if usable is None or usable(e.schedule)]
    measured, device = [e for e in fits if not e.modelled], (key.device, key.processors)
    devices = {(e.key.device, e.key.processors) for e in measured}
    if key.target == CPU:  # another CPU's cores and caches say nothing of this one's
        devices &= {device}
    if devices:
        nearest = device if device in devices else min(devices, key=lambda other: _apart(device, other))
        best = min((e for e in measured if (e.key.device, e.key.processors) == nearest), key=lambda e: _order(e, key))
        return _selected(best, key)
    chip = gpus.find(key.device)
    if chip and (modelled := [e for e in fits if e.modelled and gpus.find(e.key.device) is chip]):
        best = min(modelled, key=lambda e: _order(e, key))
        return Selection(best.schedule, "model", f"as chosen for {chip.name}, bucket {best.key.bucket}", best)
    return Selection(None, "default", f"no table for {key.device} with {key.processors} processors")


def _selected(best: Entry, key: Key) -> Selection:
    """An entry that was measured, and how near it is."""
    device, bucket = best.key.device, best.key.bucket
    if (device, best.key.processors) != (key.device, key.processors):
        return Selection(best.schedule, "nearest GPU", f"as tuned for {device}, bucket {bucket}", best)
    if bucket != key.bucket:
        return Selection(best.schedule, "nearest bucket", f"as tuned for bucket {bucket}, not {key.bucket}", best)
    return Selection(best.schedule, "exact", f"as tuned for {device}, bucket {bucket}", best)


def select_compiling(
    key: Key, entries: Iterable[Entry], compiles: Callable[[dict], object], usable: Callable[[dict], bool] | None = None
) -> Selection:
    """The same among schedules that `compiles` takes: what it raises of kdagen's errors is warned of, once."""
    left = list(entries)
    while (found := select(key, left, usable)).schedule is not None:
        try:
            compiles(found.schedule)
            return found
        except KdagenError as error:
            warn(found.entry, str(error))
            left = [e for e in left if e.schedule != found.schedule]
    return found


@functools.cache
def warn(entry: Entry, problem: str) -> None:
    """Says once that an entry's schedule is none any more."""
    k = entry.key
    log.warning(
        "the schedule of %s %s that was tuned for %s, bucket %d, is passed over, for it does not compile any more: %s: "
        "tune again with `kdagen tune`",
        k.recurrence, k.purpose, k.device, k.bucket, problem,
    )  # fmt: skip


def _order(entry: Entry, key: Key) -> tuple:
    """Among entries of one device: the nearest bucket, of two the smaller, then what is first in the alphabet."""
    apart = abs(entry.key.bucket - key.bucket)
    return apart, entry.key.bucket, entry.policy, json.dumps(entry.schedule, sort_keys=True)


def _apart(device: tuple[str, int], other: tuple[str, int]) -> tuple:
    """How far two devices are apart, in processors and, where it is known, rate of memory; then by name."""
    mine, theirs = gpus.find(device[0]), gpus.find(other[0])
    known = mine is not None and theirs is not None
    apart = abs(math.log(device[1] / other[1])) + (abs(math.log(mine.memory / theirs.memory)) if known else 0)
    return not known, apart, *other


def user_tables() -> Path:
    """Where `kdagen tune publish` puts tables unless told otherwise."""
    return debug.cache_dir() / "tables"


@functools.cache
def tables() -> tuple[Entry, ...]:
    """All entries: the user's hide shipped ones of the same key."""
    shipped, own = (
        [entry for path in sorted(f.glob("*.json")) for entry in read(path)] for f in (SHIPPED, user_tables())
    )
    hidden = {entry.key for entry in own}
    return tuple(own + [entry for entry in shipped if entry.key not in hidden])


def read(path: Path) -> list[Entry]:
    """The entries of one table."""
    try:
        data = json.loads(path.read_text())
        assert data["format"] == FORMAT
        return [entry_of(e) for e in data["entries"]]
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ArtefactError(
            f"{path} is not a table of this kdagen (damaged, or of another version): publish it anew, or remove it"
        ) from None


def entry_of(line: dict) -> Entry:
    """The entry that a table's line says."""
    key = Key(**{**line["key"], "head_dim": tuple(line["key"]["head_dim"])})
    facts = {n: v for n, v in line.items() if n not in ("key", "schedule", "policy")}
    return Entry(key, line["schedule"], line["policy"], facts)
