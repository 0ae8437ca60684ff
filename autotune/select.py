"""The schedule for a call among those in tables: exact, else the nearest bucket, else the nearest GPU. Never measures.

Tables are JSON files, one a device, an entry a line: those that ship in autotune/tables, then the user's own (in
kdagen's cache folder), whose entries come first. Where no table speaks, the model or the safe default does: that needs
the compiler, and so is for kdagen.autotune.choose. Needs neither torch nor sympy.
"""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from kdagen import debug
from kdagen.errors import ArtefactError

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
    schedule: dict
    policy: str
    facts: dict = field(default_factory=dict, compare=False, hash=False)  # kernels, ms, low, high, default_ms, versions


@dataclass(frozen=True)
class Selection:
    """A schedule's fields and how they were come by, in words for one log line."""

    schedule: dict | None  # None: no table knows any
    how: str  # "exact", "nearest bucket", "nearest GPU", "model" or "default"
    words: str


def select(key: Key, entries: tuple[Entry, ...] | None = None) -> Selection:
    """The choice for a call: deterministic, whatever the order of entries of one device."""
    fits = [e for e in (tables() if entries is None else entries) if e.key.fixed == key.fixed]
    here = [e for e in fits if (e.key.device, e.key.processors) == (key.device, key.processors)]
    if not fits or (key.target == "cpu" and not here):  # another CPU's cores and caches say nothing of this one's
        return Selection(None, "default", f"no table for {key.device} with {key.processors} processors")
    best = min(here or fits, key=lambda e: _distance(e, key))
    if not here:
        return Selection(best.schedule, "nearest GPU", f"as tuned for {best.key.device}, bucket {best.key.bucket}")
    if best.key.bucket != key.bucket:
        return Selection(best.schedule, "nearest bucket", f"as tuned for bucket {best.key.bucket}, not {key.bucket}")
    return Selection(best.schedule, "exact", f"as tuned for {key.device}, bucket {key.bucket}")


def _distance(entry: Entry, key: Key) -> tuple:
    """First the device, then the bucket; of equals the smaller bucket, then what is first in the alphabet."""
    k = entry.key
    device = abs(k.processors - key.processors) if k.device != key.device else 0
    order = json.dumps([entry.schedule, entry.policy], sort_keys=True)
    return device, k.device, abs(k.bucket - key.bucket), k.bucket, order


def user_tables() -> Path:
    """Where `kdagen tune publish` puts tables unless told otherwise."""
    return debug.cache_dir() / "tables"


@functools.cache
def tables() -> tuple[Entry, ...]:
    """All entries: the user's hide shipped ones of the same key."""
    found: dict[Key, Entry] = {}
    for folder in (SHIPPED, user_tables()):
        for path in sorted(folder.glob("*.json")):
            found |= {entry.key: entry for entry in read(path)}
    return tuple(found.values())


def read(path: Path) -> list[Entry]:
    """The entries of one table."""
    try:
        data = json.loads(path.read_text())
        assert data["format"] == FORMAT
        return [_entry(e) for e in data["entries"]]
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ArtefactError(
            f"{path} is not a table of this kdagen (damaged, or of another version): publish it anew, or remove it"
        ) from None


def _entry(fields: dict) -> Entry:
    key = Key(**{**fields["key"], "head_dim": tuple(fields["key"]["head_dim"])})
    rest = {n: v for n, v in fields.items() if n not in ("key", "schedule", "policy")}
    return Entry(key, fields["schedule"], fields["policy"], rest)
