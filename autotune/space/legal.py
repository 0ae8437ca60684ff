"""Constraints that several families have: the compiler's own checks, asked, and what a chip's block has room for."""

from __future__ import annotations

from collections.abc import Iterable

from kdagen.autotune.space import Axis, Constraint
from kdagen.autotune.sweep import Task
from kdagen.autotune.tiles import Tile, lowering

from kdagen.errors import ScheduleError
from kdagen.lower import check
from kdagen.schedule import Choices, DecayForm, Schedule

KIB = 1024
REGISTERS = 65536  # of a block, on every NVIDIA GPU that kdagen compiles for
MOST_A_THREAD = 255
# What the skeleton scan_specialised gives each thread that does products, by how many there are at most.
SPECIALISED = ((256, 240), (1 << 30, 160))


def axes(values: dict[str, tuple]) -> tuple[Axis, ...]:
    """Axes by the fields of the schedule."""
    return tuple(Axis(field, given) for field, given in values.items())


def decays(canonical) -> tuple[str, ...]:
    """The forms of decay that a recurrence's gate has at all; whether its bound allows one is the compiler's to say."""
    if canonical.decay == 0:
        return (DecayForm.NONE.value,)
    if canonical.decay_axis == "":
        return (DecayForm.SCALAR.value,)
    return DecayForm.TREE.value, DecayForm.FACTORED.value


def checked(name: str, *fields: str) -> Constraint:
    """What the compiler refuses before it lowers anything."""

    def refusal(schedule: Choices, task: Task, canonical) -> str | None:
        return _said(check, canonical, task.dims, task.dtype, schedule, lowering(task).target)

    return Constraint(name, fields, refusal)


def lowers(name: str, *fields: str) -> Constraint:
    """What the compiler refuses while it lowers, but not before."""

    def refusal(schedule: Choices, task: Task, canonical) -> str | None:
        if isinstance(schedule, Schedule) and _said(
            check, canonical, task.dims, task.dtype, schedule, lowering(task).target
        ):
            return None
        return _said(lowering(task).lowered, **vars(schedule))

    return Constraint(name, fields, refusal)


def shared_memory(name: str, families: Iterable[str], *fields: str) -> Constraint:
    """Tiles that do not fit into a block's shared memory however they are laid out."""

    def refusal(schedule: Choices, task: Task, canonical) -> str | None:
        gpu = lowering(task).target
        for tile in _tiles(schedule, task, families):
            if tile.shared_bytes > gpu.shared_bytes:
                return (
                    f"{tile.kernel.name} needs {tile.shared_bytes / KIB:.0f} KiB of shared memory at least, a block of "
                    f"{gpu.name} has {gpu.shared_bytes // KIB}"
                )
        return None

    return Constraint(name, fields, refusal)


def registers(name: str, families: Iterable[str], *fields: str) -> Constraint:
    """Fragments that do not fit into a thread's registers however they are laid out."""

    def refusal(schedule: Choices, task: Task, canonical) -> str | None:
        for tile in _tiles(schedule, task, families):
            most = most_registers(tile)
            if tile.registers > most:
                return (
                    f"{tile.kernel.name} keeps {tile.registers} registers in use in each of its {tile.kernel.threads} "
                    f"threads, which have {most}"
                )
        return None

    return Constraint(name, fields, refusal)


def most_registers(tile: Tile) -> int:
    """Registers that a thread of a kernel may have."""
    if tile.specialised:
        return next(most for threads, most in SPECIALISED if tile.kernel.threads <= threads)
    return min(MOST_A_THREAD, REGISTERS // tile.kernel.threads)


def rows_of_warps(tile: str, threads: str) -> Constraint:
    """Fragments feed other products as they are where warps stand above one another, 16 rows each or more."""

    def refusal(schedule: Choices, task: Task, canonical) -> str | None:
        rows, warps = getattr(schedule, tile), getattr(schedule, threads) // 32
        if rows % (16 * warps):
            return (
                f"{tile} {rows}: its rows are not shared evenly by {warps} warps of 16 rows each, or multiples of these"
            )
        return None

    return Constraint("rows of warps", (tile, threads), refusal)


def warp_groups(schedule: Choices, task: Task, canonical) -> str | None:
    """wgmma is for 4 warps together; those that do products must leave registers to those that fetch."""
    threads = schedule.scan_threads
    if schedule.scan_skeleton != "scan_specialised":
        return None
    if threads % 128:
        return f"scan_threads {threads}: wgmma is for groups of 4 warps, expected a multiple of 128"
    most = next(most for limit, most in SPECIALISED if threads <= limit)
    if threads * most > REGISTERS:
        return f"scan_threads {threads}: {most} registers each are more than the {REGISTERS} of a block"
    return None


def _tiles(schedule: Choices, task: Task, families: Iterable[str]) -> list[Tile]:
    try:
        passes = lowering(task).lowered(**vars(schedule))
    except ScheduleError:  # another constraint's to say
        return []
    return [tile for tiles in passes.values() for tile in tiles if tile.kernel.family in families]


def _said(function, *args, **named) -> str | None:
    try:
        function(*args, **named)
    except ScheduleError as error:
        return str(error)
    return None
