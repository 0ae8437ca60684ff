"""The schedule for a call where the compiler is at hand: tables, else the model, else the default. Never measures.

kdagen.autotune.select, which this builds on, knows tables alone, and needs no compiler: what a package's ops choose by.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from kdagen.autotune import gpus
from kdagen.autotune.select import Entry, Key, Selection, select_compiling, tables
from kdagen.autotune.sweep import Task, Workload, short_hash, source_hash

import kdagen
from kdagen import debug
from kdagen.build.folder import write_file

# What the model is asked about, each for all calls whose buckets are nearest to its own: a choice may mean to compile.
SHAPES = {
    "inference": ("1x2048x16", "1x8192x64", "8x8192x64"),
    "training": ("1x2048x16", "1x8192x64", "8x8192x64"),
    "decode": ("1x1x64", "32x1x64", "256x1x64"),
}
DECIDING = ("kdagen.autotune", "kdagen.lower", "kdagen.derive", "kdagen.ir")  # what a pick of the model depends on


def choose(
    key: Key,
    compiles: Callable[[dict], object],
    task: Task | None = None,
    usable: Callable[[dict], bool] | None = None,
    keep: str = "",
    entries: Iterable[Entry] | None = None,
) -> Selection:
    """The choice for a call; its schedule is None where the default is to be taken.

    `compiles` raises one of kdagen's errors for a schedule that is none (any more), `usable` is false for one that does
    not give what was asked for. The model is asked about `task`, if there is one, with what training is to `keep`.
    """
    known = list(tables() if entries is None else entries)
    found = select_compiling(key, known, compiles, usable)
    if found.schedule is None and task and (entry := modelled(task, key, keep)):
        return select_compiling(key, [entry], compiles, usable)
    return found


def modelled(task: Task, key: Key, keep: str = "") -> Entry | None:
    """What the model would choose for a call on a GPU that it knows."""
    chip = gpus.find(key.device)
    if not chip or chip.target != key.target:
        return None
    usual = min(map(Workload.parse, SHAPES[key.purpose]), key=lambda w: (abs(w.bucket - key.bucket), w.bucket))
    heads = max(1, usual.heads // key.ratio)
    shape = dataclasses.replace(usual, heads=heads, value_heads=heads * key.ratio)
    at = dataclasses.replace(key, device=chip.name, processors=chip.processors, bucket=shape.bucket)
    fixed = {"keep": keep} if keep else {}
    return Entry(at, picked(dataclasses.replace(task, device=chip.name), at, shape, fixed), "", {"how": "model"})


def picked(task: Task, at: Key, shape: Workload, fixed: dict) -> dict:
    """The model's schedule for a shape, remembered in kdagen's cache folder: to find it takes seconds."""
    name = short_hash([vars(at), str(shape), fixed, kdagen.__version__, _code()], 32)
    path = debug.cache_dir() / "picks" / f"{name}.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    from kdagen.autotune.model import pick

    schedule = pick(task, shape, **fixed).fields()
    write_file(path, json.dumps(schedule, sort_keys=True))
    return schedule


@cache
def _code() -> str:
    folders = (Path(importlib.import_module(package).__file__).parent for package in DECIDING)
    return source_hash(path for folder in folders for path in folder.rglob("*.py"))


def key_of(task: Task, shape: Workload, device: str, processors: int) -> Key:
    """What a call of this shape is looked up for on this device, as kdagen.runtime.tuned works it out from tensors."""
    state = f"{task.state.layout} {task.state.dtype}"
    dtypes = task.dtype, task.gate_dtype or task.dtype
    ratio = shape.value_heads // shape.heads
    what = recurrence_of(task.op), task.purpose, task.target, tuple(task.head_dim), ratio, *dtypes, state
    return Key(*what, device, processors, shape.bucket)


@cache
def recurrence_of(op: str) -> str:
    """The hash of what an op of the zoo, or of a file, computes."""
    from kdagen.derive.canonical import canonical
    from kdagen.ir.canonical_json import to_json
    from kdagen.recurrence import load
    from kdagen.runtime.signature import recurrence_hash

    return recurrence_hash(to_json(canonical(load(op))))
