"""What `kdagen build` compiles beside the untuned kernels: each schedule that tables hold for GPUs of the arch.

A built folder remembers the lines of tables that it was built for, so that its op chooses alike on a machine that has
no tables. Which of them a call runs on is kdagen.autotune.select's to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from kdagen.autotune import gpus
from kdagen.autotune.choose import SHAPES, modelled
from kdagen.autotune.select import Entry, Key, select, tables, warn
from kdagen.autotune.sweep import Task, Workload, canonical

from kdagen.errors import ArgumentError, KdagenError
from kdagen.runtime import manifest as manifests
from kdagen.runtime.signature import recurrence_hash


def variants(
    source, recurrence, gate_dtype: str | None, make: Callable[[dict], object], only: Sequence[str] = ()
) -> list:
    """This OpSource, which is untuned, and one for each other schedule; `make` gives that of a schedule's fields.

    With `only` those for some GPUs alone: where no table speaks of one, what an op there would choose all the same.
    """
    found = {canonical(source.schedule): source}
    for entry in wanted(source, recurrence, gate_dtype, only):
        try:
            tuned = make(entry.schedule)
        except KdagenError as error:
            warn(entry, str(error))
            continue
        name = canonical(tuned.schedule)
        same = found.get(name) or dataclasses.replace(tuned, beside=True)
        found[name] = dataclasses.replace(same, tuned=(*same.tuned, entry.line()))
    return list(found.values())


def wanted(source, recurrence, gate_dtype: str | None, only: Sequence[str] = ()) -> list[Entry]:
    """The entries that calls of this op may be chosen by, sorted."""
    if not source.recurrence:
        return []
    key = key_of_source(source, gate_dtype)
    keep = source.schedule.get("keep", "")
    fits = [e for e in tables() if dataclasses.replace(key, ratio=e.key.ratio).fixed == e.key.fixed]
    found = fits = [e for e in fits if e.schedule.get("keep", "") == keep]
    if only:
        task = Task(recurrence, key.purpose, key.target, "", key.head_dim, source.dtype, gate_dtype, source.state)
        of = ([e for e in fits if is_called(e.key.device, gpu)] or untabled(key, fits, task, keep, gpu) for gpu in only)
        found = [entry for entries in of for entry in entries]
    return sorted({canonical(e.line()): e for e in found}.values(), key=lambda e: canonical(e.line()))


def key_of_source(source, gate_dtype: str | None) -> Key:
    """What all calls of these kernels have in common; device and bucket are nobody's."""
    dtypes, dims = (source.dtype, gate_dtype or source.dtype), (source.dims["K"], source.dims["V"])
    state = f"{source.state.layout} {source.state.dtype}"
    purpose = manifests.purpose({"passes": source.passes})
    recurrence = recurrence_hash(source.recurrence["canonical"])
    return Key(recurrence, purpose, source.target, dims, 1, *dtypes, state, "", 1, 0)


def untabled(key: Key, fits: list[Entry], task: Task, keep: str, gpu: str) -> list[Entry]:
    """What calls of usual sizes would run by on a GPU without a table: the nearest GPU's entries, or the model's."""
    chip = gpus.find(gpu)
    if chip is None or chip.target != key.target:
        return []
    found = []
    for shape in map(Workload.parse, SHAPES[key.purpose]):
        here = dataclasses.replace(key, device=chip.name, processors=chip.processors, bucket=shape.bucket)
        found.append(select(here, fits).entry or modelled(task, here, keep))
    return found


def is_called(device: str, gpu: str) -> bool:
    """Whether a device, as it calls itself, is this GPU: by the name of its facts, or by its own."""
    return device == gpu or (gpus.find(gpu) is not None and gpus.find(device) is gpus.find(gpu))


def check_gpu(gpu: str, archs: list[str]) -> None:
    """A GPU that is asked for is known, and of one of the archs."""
    if (chip := gpus.find(gpu)) and chip.target not in archs:
        raise ArgumentError(
            f"--gpu {gpu} is {chip.target}: expected a GPU of --arch {','.join(archs)}, or that arch too"
        )
    if not chip and gpu not in (devices := sorted({e.key.device for e in tables() if e.key.target != "cpu"})):
        known = ", ".join([*gpus.GPUS, *devices])
        raise ArgumentError(f"--gpu {gpu}: expected one of {known}; `kdagen tune` makes tables for others")
