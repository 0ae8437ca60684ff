"""Tables for tests: keys, entries whose figures are made up, and the user's folder of tables."""

import dataclasses
import json

from kdagen.autotune import select
from kdagen.autotune.select import Entry, Key, Selection

H100, H200 = ("NVIDIA H100 80GB HBM3", 132), ("NVIDIA H200", 132)
KEY = Key("abc", "inference", "sm90", (128, 128), 1, "bfloat16", "bfloat16", "KV float32", *H100, 19)
POLICY = "device cold"


def key(base: Key = KEY, device: tuple[str, int] | None = None, **changed) -> Key:
    """A key that differs from another in some parts."""
    named = {} if device is None else {"device": device[0], "processors": device[1]}
    return dataclasses.replace(base, **named, **changed)


def entry(schedule: dict | str, base: Key = KEY, policy: str = POLICY, facts: dict | None = None, **changed) -> Entry:
    """An entry for such a key; a word stands for some schedule."""
    schedule = {"name": schedule} if isinstance(schedule, str) else schedule
    return Entry(key(base, **changed), schedule, policy, facts or {})


def name(selection: Selection) -> str | None:
    """The word of the schedule that was selected."""
    return selection.schedule and selection.schedule["name"]


def write(folder, entries, name: str = "table.json"):
    """A table in a folder; what is remembered of tables is forgotten."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"format": select.FORMAT, "device": {}, "entries": [e.line() for e in entries]}
    (folder / name).write_text(json.dumps(data))
    select.tables.cache_clear()
    return folder / name
