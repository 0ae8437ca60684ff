"""The reverse scan: the state's cotangent from the last chunk to the first.

It has the products and the layout of the forward scan (the cotangent transposed, in registers), reads the cotangent of
the output in place of values, and keeps its own state only where a segment of chunks ends.
"""

from __future__ import annotations

from kdagen.ir.tensor import Adjoint
from kdagen.ir.tile import Buffer, Kernel
from kdagen.lower.rows import in_sequence
from kdagen.lower.scan import scan_kernel, state_buffer
from kdagen.lower.step import Carried, Step
from kdagen.lower.workspace import Part, Workspace
from kdagen.schedule import TrainingSchedule

LAST_FIRST = "(chunks - 1 - n)"  # the chunk that iteration n takes


def lower_reverse(
    adjoint: Adjoint, workspace: Workspace, schedule: TrainingSchedule, arguments: dict[str, Buffer]
) -> Kernel:
    """The reverse scan: one block a (V tile and sequence, head), chunk after chunk from the last.

    The slot of a segment in d_S_w [HV, NG, V, K] is left the cotangent of the state after the segment.
    """
    d_out, carried = adjoint.d_out, Carried(adjoint.d_state.name, adjoint.d_next_state, adjoint.d_state)
    given = d_out_buffer(adjoint, workspace)
    parts = {d_out.name: (Part(given.name.removesuffix("_in"), d_out, True),)}
    place = in_sequence(LAST_FIRST, schedule.chunk_size)
    step = Step(workspace, schedule, adjoint.reverse, carried, place, parts=parts)
    loads = step.loads()
    kept = state_buffer(adjoint.d_state, workspace, "NG")
    body = step.lower(_keep_cotangent(step, kept.name, schedule.segment))
    return scan_kernel(
        f"{adjoint.forward.canonical.name}_reverse",
        "reverse",
        step,
        schedule,
        [given, kept],
        (loads, body, []),
        step.read_from("d_final_state", eq="d_S = d_S_T"),
        step.write_to("d_initial_state", eq="d_S_0"),
    )


def d_out_buffer(adjoint: Adjoint, workspace: Workspace) -> Buffer:
    """The output's cotangent, as the caller gives it; under a name that is no argument's."""
    name, taken = "d_o", {a.name for a in adjoint.forward.canonical.arguments}
    while name in taken:
        name += "_"
    return Buffer(f"{name}_in", ("T", "HV", workspace.dims["V"]), workspace.dtype, "global", "d_out")


def _keep_cotangent(step: Step, workspace: str, segment: int):
    """Before the last chunk of a segment: what the chunks that follow owe to the state between them."""
    tokens = segment * step.chunk
    return step.keep(
        workspace,
        f"start // {tokens} + b + {LAST_FIRST} // {segment}",
        where=f"(n == 0) | ((chunks - n) % {segment} == 0)",
        every=segment,
        eq="the cotangent of the state after the segment, before its last chunk",
    )
