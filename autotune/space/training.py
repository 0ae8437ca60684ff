"""Schedules of training: the forward that a backward follows, the reverse scan, and the kernel of all gradients."""

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

from kdagen.schedule import Keep

PREPARE = ("chunk_size", "decay", "prepare_threads")
SCAN = ("chunk_size", "v_tile", "scan_threads", "scan_skeleton")
REVERSE = ("chunk_size", "reverse_v_tile", "scan_skeleton")
GRADIENTS = ("chunk_size", "decay", "segment", "gradient_threads")
SCANS = ("scan", "replay")
CONSTRAINTS = (
    checked("tile divides V", "v_tile"),
    Constraint("reverse tile divides V", ("reverse_v_tile",), lambda s, task, _: _divides(s.reverse_v_tile, task)),
    checked("what the target has", "stages", "scan_skeleton"),
    checked("bounded gate", "chunk_size", "decay"),
    rows_of_warps("v_tile", "scan_threads"),
    Constraint("warp groups", ("scan_threads", "scan_skeleton"), warp_groups),
    lowers("products of prepare", *PREPARE),
    shared_memory("shared memory of prepare", ("prepare",), *PREPARE),
    lowers("products of the gradients", *GRADIENTS),
    registers("registers of the gradients", ("gradients",), *GRADIENTS),
    shared_memory("shared memory of the gradients", ("gradients",), *GRADIENTS),
    lowers("tiles of the scan", *SCAN),
    registers("registers of the scan", SCANS, *SCAN),
    shared_memory("shared memory of the scan", SCANS, *SCAN, "stages"),
    registers("registers of the reverse scan", ("reverse",), *REVERSE),
    shared_memory("shared memory of the reverse scan", ("reverse",), *REVERSE, "stages"),
)


def _divides(tile: int, task: Task) -> str | None:
    v = task.dims["V"]
    return f"reverse_v_tile {tile}: expected a multiple of 64 that divides V = {v}" if tile % 64 or v % tile else None


def space(task: Task) -> Space:
    """The space of a task of training."""
    canonical = lowering(task).canonical
    values = {
        "chunk_size": (16, 32, 64),
        "decay": decays(canonical),
        "prepare_threads": (64, 128, 256),
        "v_tile": (64, 128, 256),
        "scan_threads": (128, 256),
        "stages": (1, 2, 3),
        "scan_skeleton": ("scan_specialised", "scan_pipelined"),
        "keep": tuple(k.value for k in Keep),  # what a forward stores; the rest is formed again
        "segment": (1, 4, 8, 16),  # chunks that a block of the gradients kernel takes
        "reverse_v_tile": (64, 128, 256),
        "gradient_threads": (64, 128, 256),
    }
    return Space(task, axes(values), CONSTRAINTS, lowering(task).complete, canonical)
