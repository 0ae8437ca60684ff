"""The schedule for a recurrence on a target when nothing was tuned: safe everywhere, fast where that is known."""

from __future__ import annotations

from functools import cache

from kdagen.derive.adjoint import adjoint
from kdagen.derive.chunk import chunk_form
from kdagen.errors import ScheduleError
from kdagen.ir.canonical import Canonical
from kdagen.lower.decay import decay_form
from kdagen.lower.gradients import lower_gradients
from kdagen.lower.warps import prepare_threads
from kdagen.lower.workspace import Workspace
from kdagen.schedule import DecayForm, DecodeSchedule, Schedule, TrainingSchedule
from kdagen.target import Target

PACKING = 1.08  # of shared memory that merged tiles take, at most, over what is in use at once


def default_schedule(canonical: Canonical, dims: dict[str, int], dtype: str, target: Target, **choices) -> Schedule:
    """A legal schedule from facts alone: the decay form, the width of the solve, the chip's shared memory.

    `choices` fixes some fields; the others follow from them.
    """
    rows = max(1, len(canonical.solving))
    chunk = choices.get("chunk_size") or chunk_size(canonical, dims, dtype, target)
    wide = target.warp_specialised and dims["V"] % 128 == 0 and dims["K"] <= 128 and rows == 1
    v_tile = 128 if wide else 64
    decay = decay_form(canonical, chunk, dtype)[0]
    return Schedule(
        chunk_size=chunk,
        decay=decay,
        prepare_threads=prepare_threads(canonical, chunk, target, choices.get("decay", decay) == DecayForm.TREE),
        v_tile=v_tile,
        scan_threads=2 * choices.get("v_tile", v_tile),
        stages=2 if target.bulk_copies else 1,
        scan_skeleton="scan_specialised" if target.warp_specialised else "scan_pipelined",
    ).replace(**choices)


def default_decode_schedule(
    canonical: Canonical, dims: dict[str, int], dtype: str, target: Target, **choices
) -> DecodeSchedule:
    """The same for decoding: tiles of a line of memory in width, small enough that several blocks share a processor."""
    return DecodeSchedule().replace(**choices)


def default_training_schedule(
    canonical: Canonical, dims: dict[str, int], dtype: str, target: Target, **choices
) -> TrainingSchedule:
    """The same for an op in training: the longest chunks with which a chunk's whole backward fits in shared memory.

    States are stored once a chunk. Chunks of 16 have products that 2 warps share at most, too few to hold a state's
    cotangent in registers: then each chunk is a segment of its own.
    """
    if "chunk_size" in choices:
        return _training(canonical, dims, dtype, target, choices["chunk_size"], choices)
    for chunk in (32, 16):
        schedule = _training(canonical, dims, dtype, target, chunk, choices)
        needed = PACKING * gradients_bytes(canonical, dims, dtype, schedule)
        if needed <= target.shared_bytes:
            return schedule
    raise ScheduleError(
        f"{canonical.name} has no training kernels for {target.name} at head_dim {dims['K'], dims['V']}: the backward "
        f"of a chunk of {chunk} tokens needs {needed / 1024:.0f} KiB of shared memory, a block there has "
        f"{target.shared_bytes // 1024}: expected a smaller head_dim"
    )


def _training(canonical, dims, dtype, target, chunk: int, choices: dict) -> TrainingSchedule:
    decay = decay_form(canonical, chunk, dtype, training=True)[0]
    shared = {"decay": decay, **{f: v for f, v in choices.items() if f in vars(Schedule())}}
    forward = default_schedule(canonical, dims, dtype, target, **{**shared, "chunk_size": chunk})
    wide = target.warp_specialised and dims["V"] % 128 == 0 and dims["K"] <= 128
    short = {"segment": 1, "gradient_threads": 64} if chunk == 16 else {}
    return TrainingSchedule(**vars(forward), reverse_v_tile=128 if wide else 64, **short).replace(**choices)


@cache
def _adjoint(canonical: Canonical):
    return adjoint(chunk_form(canonical))


def gradients_bytes(canonical: Canonical, dims: dict[str, int], dtype: str, schedule: TrainingSchedule) -> int:
    """Shared memory that a block of the gradients kernel needs, as the tile IR counts it."""
    backward = _adjoint(canonical)
    workspace = Workspace(backward.forward, schedule.chunk_size, dims, dtype)
    return lower_gradients(backward, workspace, schedule, canonical.dtypes(dtype, dtype)).shared_bytes


def chunk_size(canonical: Canonical, dims: dict[str, int], dtype: str, target: Target) -> int:
    """16 tokens where the midpoint tree is needed or memory is tight, else 32."""
    if decay_form(canonical, 32, dtype)[0] == DecayForm.TREE or dims["K"] > 128 or len(canonical.streams) > 1:
        return 16
    return 32
