"""Schedules of the CPU backend: tokens of a chunk and of a span, and torch's threads."""

from __future__ import annotations

from kdagen.autotune.space import Axis, Constraint, Space
from kdagen.autotune.sweep import Task

from kdagen.runtime.tuned import this_cpu
from kdagen.schedule import CPU_ROWS, CpuSchedule

THREADS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # 0: all
# Values of "span". On 2048 tokens of 8 heads of 128 a forward takes 28, 47, 85 MiB by them, a forward and backward 180,
# 299 and 523.
SPANS = {"inference": (1, 2, 4), "training": (1, 2)}


def _threads(schedule: CpuSchedule, task: Task, canonical) -> str | None:
    _, cores = this_cpu()
    if schedule.threads < cores:
        return None
    return f"{schedule.threads} threads are all of {cores} cores, or more: 0 stands for all"


def space(task: Task) -> Space:
    """The space of a task on the CPU; decoding has no chunks."""
    from kdagen.derive.canonical import canonical
    from kdagen.recurrence import load

    axes = [Axis("threads", THREADS)]
    if task.purpose != "decode":
        rows = sorted(CPU_ROWS, key=lambda n: n != CpuSchedule().rows)
        axes = [Axis("rows", tuple(rows)), Axis("span", SPANS[task.purpose]), *axes]
    constraints = (Constraint("cores", ("threads",), _threads),)
    return Space(task, tuple(axes), constraints, CpuSchedule().replace, canonical(load(task.op)))
