"""The schedule for a call where a compiler is at hand: tables, else the model, else the default. Never measures.

kdagen.autotune.select, which this builds on, knows tables alone, and needs no compiler: what a package's ops choose by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from kdagen.autotune.select import Entry, Key, Selection, select_compiling, tables
from kdagen.autotune.sweep import Task, Workload


def choose(
    key: Key,
    compiles: Callable[[dict], object],
    usable: Callable[[dict], bool] | None = None,
    entries: Iterable[Entry] | None = None,
) -> Selection:
    """The choice for a call; its schedule is None where the default is to be taken.

    `compiles` raises one of kdagen's errors for a schedule that is none (any more), `usable` is false for one that does
    not give what was asked for.
    """
    return select_compiling(key, tables() if entries is None else entries, compiles, usable)


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
