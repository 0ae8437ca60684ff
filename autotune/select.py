"""The schedule for a recurrence on a target when nothing was tuned: safe everywhere, fast where that is known."""

from __future__ import annotations

from kdagen.ir.canonical import Canonical
from kdagen.lower.decay import decay_form
from kdagen.lower.warps import prepare_threads
from kdagen.schedule import DecayForm, Schedule, TrainingSchedule
from kdagen.target import Target


def default_schedule(canonical: Canonical, dims: dict[str, int], dtype: str, target: Target, **choices) -> Schedule:
    """A legal schedule from facts alone: the decay form, the width of the solve, the chip's shared memory.

    `choices` fixes some fields; the others follow from them.
    """
    rows = max(1, len(canonical.solving))
    chunk = choices.get("chunk_size") or chunk_size(canonical, dims, dtype, target)
    wide = target.warp_specialised and dims["V"] % 128 == 0 and dims["K"] <= 128 and rows == 1
    v_tile = 128 if wide else 64
    return Schedule(
        chunk_size=chunk,
        decay=decay_form(canonical, chunk, dtype)[0],
        prepare_threads=prepare_threads(canonical, chunk, target),
        v_tile=v_tile,
        scan_threads=2 * choices.get("v_tile", v_tile),
        stages=2 if target.bulk_copies else 1,
        scan_skeleton="scan_specialised" if target.warp_specialised else "scan_pipelined",
    ).replace(**choices)


def default_training_schedule(
    canonical: Canonical, dims: dict[str, int], dtype: str, target: Target, **choices
) -> TrainingSchedule:
    """The same for an op in training: states are stored once a chunk, so chunks are longer than in inference."""
    chunk = choices.get("chunk_size") or 32
    forward = default_schedule(canonical, dims, dtype, target, chunk_size=chunk)
    return TrainingSchedule(**vars(forward)).replace(**choices)


def chunk_size(canonical: Canonical, dims: dict[str, int], dtype: str, target: Target) -> int:
    """16 tokens where the midpoint tree is needed or memory is tight, else 32."""
    if decay_form(canonical, 32, dtype)[0] == DecayForm.TREE or dims["K"] > 128 or len(canonical.streams) > 1:
        return 16
    return 32
