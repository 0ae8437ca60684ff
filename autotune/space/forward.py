"""Schedules of inference: a prepare kernel, a scan, and an output kernel where the cut lies before it."""

from __future__ import annotations

from kdagen.autotune.space import Constraint, Space
from kdagen.autotune.space.legal import (
    axes,
    checked,
    decays,
    lowers,
    registers,
    rows_of_warps,
    shared_memory,
    warp_groups,
)
from kdagen.autotune.sweep import Task
from kdagen.autotune.tiles import lowering

PREPARE = ("chunk_size", "decay", "prepare_threads")
SCAN = ("chunk_size", "v_tile", "scan_threads", "output", "scan_skeleton")
CONSTRAINTS = (
    checked("tile divides V", "v_tile"),
    checked("what the target has", "stages", "scan_skeleton"),
    checked("bounded gate", "chunk_size", "decay"),
    rows_of_warps("v_tile", "scan_threads"),
    Constraint("warp groups", ("scan_threads", "scan_skeleton"), warp_groups),
    lowers("products of prepare", *PREPARE),
    shared_memory("shared memory of prepare", ("prepare",), *PREPARE),
    lowers("tiles of the scan", *SCAN),
    registers("registers of the scan", ("scan", "output"), *SCAN),
    shared_memory("shared memory of the scan", ("scan", "output"), *SCAN, "stages"),
    lowers("segments", "stages", "split"),
)


def space(task: Task) -> Space:
    """The space of a task of inference."""
    canonical = lowering(task).canonical
    values = {
        "chunk_size": (16, 32, 64),
        "decay": decays(canonical),  # of a vector gate, also the sub-blocks of a chunk: the tree has them at all sizes
        "prepare_threads": (64, 128, 256),
        "v_tile": (64, 128, 256),
        "scan_threads": (64, 128, 256),
        "stages": (1, 2, 3, 4),
        "output": ("fused", "split"),  # whether the scan writes O, or another kernel from states that it leaves
        "scan_skeleton": ("scan_specialised", "scan_pipelined"),
        "split": (0, 8, 16, 32, 64, 128),  # chunks of a segment that is scanned beside the others; 0: no segments
    }
    return Space(task, axes(values), CONSTRAINTS, lowering(task).complete, canonical)
