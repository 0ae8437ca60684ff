"""Schedules of decoding: how much of a head's state a block has in registers, and how many threads share it."""

from __future__ import annotations

from kdagen.autotune.space import Space
from kdagen.autotune.space.legal import axes, lowers, registers
from kdagen.autotune.sweep import Task
from kdagen.autotune.tiles import lowering

TILE = ("v_tile", "threads")
CONSTRAINTS = (
    lowers("vectors of the state", *TILE),
    registers("registers", ("decode",), *TILE),
)


def space(task: Task) -> Space:
    """The space of a task of decoding."""
    values = {"v_tile": (8, 16, 32, 64, 128, 256), "threads": (32, 64, 128, 256, 512)}
    return Space(task, axes(values), CONSTRAINTS, lowering(task).complete, lowering(task).canonical)
