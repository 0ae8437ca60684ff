"""Lowering of an op in training: the kernels of a forward that a backward follows, and those of the backward.

Unlike kdagen.lower, whose kernels serve inference, these agree on one chunk size, and what the backward needs of the
forward is kept or formed again as the schedule says.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from kdagen.ir.tensor import Adjoint
from kdagen.ir.tile import Kernel, verify
from kdagen.lower import check, check_products, describe, undivided
from kdagen.lower.gradients import lower_gradients
from kdagen.lower.prepare import argument_buffers, lower_prepare
from kdagen.lower.reverse import lower_reverse
from kdagen.lower.rows import CHUNK_ROWS, lower_index
from kdagen.lower.scan import lower_replay, lower_scan
from kdagen.lower.workspace import Workspace
from kdagen.schedule import Keep, TrainingSchedule
from kdagen.state import DEFAULT, StateType
from kdagen.target import Target


@dataclass(frozen=True)
class TrainingKernels:
    """Kernels in launch order; a prepare kernel may be in both passes."""

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    kept: tuple[str, ...]  # workspaces that the forward leaves for the backward


def lower_training(
    adjoint: Adjoint,
    dims: dict[str, int],
    dtypes: dict[str, str],
    dtype: str,
    schedule: TrainingSchedule,
    target: Target,
    state: StateType = DEFAULT,
) -> TrainingKernels:
    """Both passes of an op; arguments as of kdagen.lower.lower."""
    program = adjoint.forward
    check(program.canonical, dims, dtype, schedule, target)
    workspace = Workspace(program, schedule.chunk_size, dims, dtype, state)
    arguments = argument_buffers(program.canonical, dims, dtypes)
    doc = describe(program.canonical, dims, dtype, schedule)

    def ready(kernel: Kernel) -> Kernel:
        return verify(dataclasses.replace(kernel, doc=doc))

    kept = schedule.keep != Keep.INPUTS
    index = ready(lower_index(program.canonical.name, schedule.chunk_size, schedule.segment))
    prepare = ready(lower_prepare(program, workspace, schedule, dtypes))
    scan = ready(lower_scan(program, workspace, schedule, arguments, keep_states=kept))
    wide = schedule.replace(v_tile=schedule.reverse_v_tile, scan_threads=2 * schedule.reverse_v_tile)
    reverse = ready(lower_reverse(adjoint, workspace, wide, arguments))
    gradients = ready(lower_gradients(adjoint, workspace, schedule, dtypes))
    if undivided(gradients, target):  # into whole warp groups, then into warps
        gradients = dataclasses.replace(gradients, wgmma=False)
    check_products(prepare, target, "prepare_threads")
    check_products(gradients, target, "gradient_threads")
    again = {
        Keep.INPUTS: lambda: (prepare, ready(lower_replay(program, workspace, schedule, arguments))),
        Keep.STATES: lambda: (prepare,),
        Keep.ALL: lambda: (),
    }[schedule.keep]()
    forward, backward = (index, prepare, scan), (index, *again, reverse, gradients)
    return TrainingKernels(forward, backward, _kept(schedule.keep, prepare, scan, backward))


def _kept(keep: Keep, prepare: Kernel, scan: Kernel, backward: tuple[Kernel, ...]) -> tuple[str, ...]:
    """Workspaces that the forward writes and the backward reads before it writes them itself."""
    if keep == Keep.INPUTS:
        return ()
    made = {b.name for kernel in (prepare, scan) for b in kernel.params if b.role == "workspace"} - {CHUNK_ROWS.name}
    if keep == Keep.STATES:
        made -= {b.name for b in prepare.params}
    read = dict.fromkeys(b.name for kernel in backward for b in kernel.params if b.role == "workspace")
    return tuple(name for name in read if name in made)
