"""Lowering: tensor IR to tile IR, under a schedule and for a target."""

from __future__ import annotations

import dataclasses

from kdagen.errors import ScheduleError
from kdagen.ir.canonical import Canonical
from kdagen.ir.tensor import Program
from kdagen.ir.tile import Gemm, Kernel, verify
from kdagen.lower.decay import factored_rows
from kdagen.lower.prepare import argument_buffers, lower_prepare
from kdagen.lower.rows import lower_index
from kdagen.lower.scan import PLAIN, SPECIALISED, lower_output, lower_scan
from kdagen.lower.split import LONGEST, lower_split
from kdagen.lower.warps import divides
from kdagen.lower.workspace import Workspace
from kdagen.schedule import DecayForm, Schedule, TrainingSchedule
from kdagen.state import DEFAULT, StateType
from kdagen.target import Target

HEAD_DIMS = (64, 128, 256)


def lower(
    program: Program,
    dims: dict[str, int],
    dtypes: dict[str, str],
    dtype: str,
    schedule: Schedule,
    target: Target,
    state: StateType = DEFAULT,
) -> tuple[Kernel, ...]:
    """The forward kernels in launch order: index, prepare, scan and, when the schedule has them apart, output.

    Where it splits sequences, those of kdagen.lower.split stand before the scan.
    `dims` gives K and V, `dtypes` each argument's dtype, `dtype` that of operands, workspaces and the output.
    """
    check(program.canonical, dims, dtype, schedule, target)
    workspace = Workspace(program, schedule.chunk_size, dims, dtype, state)
    arguments = argument_buffers(program.canonical, dims, dtypes)
    prepare = lower_prepare(program, workspace, schedule, dtypes)
    check_products(prepare, target, "prepare_threads")
    kernels = [lower_index(program.canonical.name, schedule.chunk_size, split=schedule.split), prepare]
    if schedule.split:
        kernels += lower_split(program, workspace, schedule, arguments, target)
    kernels.append(lower_scan(program, workspace, schedule, arguments))
    if schedule.output == "split":
        kernels.append(lower_output(program, workspace, schedule, arguments))
    doc = describe(program.canonical, dims, dtype, schedule)
    return tuple(verify(dataclasses.replace(kernel, doc=doc)) for kernel in kernels)


def describe(canonical: Canonical, dims: dict[str, int], dtype: str, schedule: Schedule) -> tuple[str, ...]:
    """What a generated module says of itself: the recurrence, and the choices that shaped it."""
    how = (
        f"Chunks of {schedule.chunk_size} tokens, K = {dims['K']}, V = {dims['V']}, operands in {dtype}; "
        f"{schedule.decay.value} decays."
    )
    names = (
        "Buffers: _in arguments, _w workspaces, _s shared memory, _f registers. Tokens of all sequences lie in a row. "
        "b, h, hk, n: sequence, head of values, of keys, chunk."
    )
    return (*said(canonical), how, names)


def said(canonical: Canonical) -> list[str]:
    """The first line that its author wrote of a recurrence, as it may stand in a docstring."""
    lines = canonical.doc.strip().replace("\\", "\\\\").replace('"', "'").splitlines()[:1]
    return [f"{canonical.name}: {line}" for line in lines]


def check(canonical: Canonical, dims: dict[str, int], dtype: str, schedule: Schedule, target: Target) -> None:
    """Refuses dims and schedules that no kernels can be made for."""
    _check_dims(dims, schedule)
    _check_scan(schedule, target)
    _check_split(schedule)
    _check_decay(canonical, schedule, dtype)


def check_head_dims(dims: dict[str, int]) -> None:
    """Refuses dims that no kernels can be made for, whatever the schedule."""
    if any(d not in HEAD_DIMS for d in dims.values()):
        raise ScheduleError(f"head_dim {dims['K'], dims['V']} has no kernels: expected K and V among {HEAD_DIMS}")


def _check_dims(dims: dict[str, int], schedule: Schedule) -> None:
    check_head_dims(dims)
    if schedule.chunk_size not in (16, 32, 64):
        raise ScheduleError(f"chunk_size {schedule.chunk_size}: expected 16, 32 or 64")
    if schedule.v_tile % 64 or dims["V"] % schedule.v_tile:
        raise ScheduleError(f"v_tile {schedule.v_tile}: expected a multiple of 64 that divides V = {dims['V']}")


def _check_scan(schedule: Schedule, target: Target) -> None:
    if schedule.stages > 1 and not target.bulk_copies:  # a pipelined loop of unknown length needs a constant wait count
        raise ScheduleError(f"stages {schedule.stages}: {target.name} has no TMA, expected 1")
    if schedule.scan_skeleton == SPECIALISED and not target.warp_specialised:
        raise ScheduleError(
            f"scan_skeleton '{SPECIALISED}' needs wgmma, which {target.name} lacks: expected scan_pipelined"
        )
    if (
        schedule.scan_skeleton == PLAIN and schedule.stages > 1
    ):  # without a producer, TileLang counts what is on its way
        raise ScheduleError(f"stages {schedule.stages}: in '{PLAIN}' all warps fetch, one chunk ahead: expected 1")
    if schedule.output not in ("fused", "split"):
        raise ScheduleError(f"output '{schedule.output}': expected 'fused' or 'split'")


def _check_split(schedule: Schedule) -> None:
    if not isinstance(schedule.split, int) or not 0 <= schedule.split <= LONGEST:
        raise ScheduleError(f"split {schedule.split}: expected chunks in a segment, 1 to {LONGEST}, or 0 for no split")
    if schedule.split and isinstance(schedule, TrainingSchedule):
        raise ScheduleError(f"split {schedule.split}: sequences are split in inference alone, expected 0 in training")


def check_products(kernel: Kernel, target: Target, field: str) -> None:
    """Refuses a kernel whose threads, a field of the schedule, cannot share its products."""
    for rows, cols in undivided(kernel, target):
        raise ScheduleError(
            f"{field} {kernel.threads}: its {kernel.threads // 32} warps cannot share a product of "
            f"{rows} x {cols} evenly on {target.name}: expected 64"
        )


def undivided(kernel: Kernel, target: Target) -> list[tuple[int, int]]:
    """Rows and columns of the products that the kernel's warps cannot share evenly."""
    sizes = [s.size[:2] for s in kernel.body if isinstance(s, Gemm)]
    return [size for size in sizes if not divides(*size, kernel.threads, target, kernel.wgmma)]


def _check_decay(canonical: Canonical, schedule: Schedule, dtype: str) -> None:
    rows = factored_rows(canonical.decay_lower, dtype, isinstance(schedule, TrainingSchedule))
    if schedule.decay == DecayForm.FACTORED and schedule.chunk_size > rows:
        raise ScheduleError(
            f"decay 'factored' with chunk_size {schedule.chunk_size}: a gate bounded by {canonical.decay_lower:g} "
            f"a token allows {rows} rows in {dtype}, expected a smaller chunk_size or decay 'tree'"
        )
