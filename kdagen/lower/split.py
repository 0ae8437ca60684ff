"""Sequences that are split in segments, exactly: what lies between prepare and the scan then.

A segment takes the state from S to M S + E. Its end E is what the scan makes of no state, its transition M (K x K) what
it makes of the identity without any values. These are found for all segments side by side; the carry kernel goes
through them in order, a few products a segment, and leaves the state before each. From there the scans of all segments
run side by side again (kdagen.lower.scan). A sequence's last segment needs neither E nor M, its only one no carry.
"""

from __future__ import annotations

import dataclasses
import math

from kdagen.derive.transition import transition
from kdagen.errors import ScheduleError
from kdagen.ir.tensor import Op, Program
from kdagen.ir.tile import Buffer, Copy, Gemm, Kernel, Map, Statement
from kdagen.lower.rows import carried, segments
from kdagen.lower.scan import OCTET, STARTS, kept_at, kept_state, scan_kernel, scan_step
from kdagen.lower.step import Step
from kdagen.lower.workspace import Workspace
from kdagen.schedule import Schedule
from kdagen.target import Target

ENDS = "ends_w"  # the state after each segment, where it begins with none
TILE, THREADS = 64, 128  # value channels that a block of the carry kernel holds; threads that do its products
LONGEST = 2**16  # chunks in a segment, so that no count of tokens overflows
EXACT = "bfloat16"  # of which two terms hold a sum to 16 bits: its exponents are those of fp32


def lower_split(
    program: Program, workspace: Workspace, schedule: Schedule, arguments: dict[str, Buffer], target: Target
) -> list[Kernel]:
    """The kernels between prepare and the scan: ends, transitions (unless nothing changes a state) and carry."""
    ops, ends = transition(program), lower_ends(program, workspace, schedule, arguments)
    if ops:
        piece, stages = carrying(workspace.dims["K"], schedule.stages, target)
        made = lower_transitions(program, workspace, schedule, ops, piece)
        return [ends, made, lower_carry(program, workspace, schedule.replace(stages=stages), piece)]
    made = [lower_diagonals(program, workspace, schedule)] if workspace.gamma else []
    return [ends, *made, lower_carry(program, workspace, schedule)]


def carrying(k: int, stages: int, target: Target) -> tuple[int, int]:
    """Rows of a transition that a block of the carry kernel takes at a time, and stages: as shared memory allows."""
    for depth in (stages, 1):
        for piece in (k, 64, 32, 16):
            needed = depth * piece * (2 * 2 * k + 4 * TILE) + (4 * TILE * k if piece < k else 0)
            if needed <= target.shared_bytes:
                return piece, depth
    raise ScheduleError(
        f"split: to carry a state of {k} keys a block needs {needed // 1024} KiB of shared memory, {target.name} has "
        f"{target.shared_bytes // 1024}: expected split 0"
    )


def lower_ends(program: Program, workspace: Workspace, schedule: Schedule, arguments: dict[str, Buffer]) -> Kernel:
    """The scan of each segment that another one follows, from no state, for the state at its end alone."""
    over = segments(schedule.chunk_size, schedule.split, followed=True)
    step = scan_step(program, workspace, schedule, program.scan, over.place)
    loads = step.loads()
    body = step.lower()
    kept, register = kept_state(ENDS, program, workspace), f"{step.carried.register}[i, j]"
    return scan_kernel(
        f"{program.canonical.name}_ends",
        "ends",
        step,
        schedule,
        [*arguments.values(), kept],
        (loads, body, []),
        step.whole((register, "0.0"), eq="S = 0"),
        step.whole((kept_at(kept, "segment", step), register), where="chunks > 0", eq="E, the state of its own"),
        over=over,
    )


def lower_transitions(
    program: Program, workspace: Workspace, schedule: Schedule, ops: tuple[Op, ...], piece: int
) -> Kernel:
    """The same without values, from the identity: its columns take the place of value channels."""
    over = segments(schedule.chunk_size, schedule.split, followed=True)
    width = min(schedule.v_tile, workspace.dims["K"])
    narrow = schedule.replace(v_tile=width, scan_threads=schedule.scan_threads * width // schedule.v_tile)
    step = scan_step(program, workspace, narrow, ops, over.place)
    loads, body = step.loads(), step.lower()
    kept, register = transitions_buffer(workspace), f"{step.carried.register}[i, j]"
    row = f"tile * {width} + i"
    high = f"T.cast({register}, '{EXACT}')"
    low = f"T.cast({register} - T.cast({high}, 'float32'), '{EXACT}')"
    place = f"({row}) // {piece} * {2 * piece} + ({row}) % {piece}"
    store = step.whole((f"{kept.name}[h, segment, {place}, j]", high), where="chunks > 0", eq="M, in two terms")
    store = dataclasses.replace(store, assign=(*store.assign, (f"{kept.name}[h, segment, {place} + {piece}, j]", low)))
    return scan_kernel(
        f"{program.canonical.name}_transitions",
        "transitions",
        step,
        narrow,
        [kept],
        (loads, body, []),
        step.whole((register, f"T.if_then_else({row} == j, 1.0, 0.0)"), eq="S = I"),
        store,
        over=over,
        columns="K",
    )


def lower_diagonals(program: Program, workspace: Workspace, schedule: Schedule) -> Kernel:
    """Transitions of a recurrence that only scales its state: the decay of each segment that another one follows."""
    over, k = segments(schedule.chunk_size, schedule.split, followed=True), workspace.dims["K"]
    decays = next(b for b in workspace.buffers() if b.name == "gamma_w")
    kept, product = diagonals_buffer(workspace), Buffer("gamma_f", (k,), "float32", "fragment")
    loops = (("j", k),)
    return Kernel(
        name=f"{program.canonical.name}_transitions",
        family="transitions",
        skeleton=schedule.prepare_skeleton,
        grid=((over.index, over.extent), ("h", "HV")),
        threads=min(k, THREADS),
        stages=1,
        buffers=(decays, kept, *over.tables, product),
        lets=(("tokens", f"(NC - (N1 - 1) + 1) * {schedule.chunk_size} - 1"), *over.lets, ("rows", "chunks")),
        loads=(),
        body=(
            Map(loops, (("gamma_f[j]", "1.0"),)),
            Map(
                loops,
                (("gamma_f[j]", f"gamma_f[j] * gamma_w[h, {over.place.slot}, j]"),),
                serial=("n", 0, schedule.split),
                eq="M, the product of the chunks' decays",
            ),
        ),
        stores=(Map(loops, ((f"{kept.name}[h, segment, j]", "gamma_f[j]"),), every=schedule.split),),
        chunk_size=schedule.chunk_size,
        segment=schedule.split,
    )


def lower_carry(program: Program, workspace: Workspace, schedule: Schedule, piece: int = 0) -> Kernel:
    """The state before each segment: one block a (V tile and sequence, head), segment after segment.

    With `piece`, M is a matrix, of whose rows so many are taken at a time; else a vector, or nothing at all.
    """
    k = workspace.dims["K"]
    pieces, tile = (k // piece, TILE) if piece else (1, TILE // 2)
    tokens = schedule.chunk_size * schedule.split // pieces  # that an iteration stands for
    narrow = schedule.replace(chunk_size=tokens, v_tile=tile, scan_threads=THREADS)
    over = carried(schedule.chunk_size, schedule.split, pieces)
    step = scan_step(program, workspace, narrow, (), over.place)
    ends, starts = (kept_state(name, program, workspace) for name in (ENDS, STARTS))
    slot, register, n = over.place.slot, f"{step.carried.register}[i, j]", ends.shape[-1]
    own = step.block.shared("ends", (piece or k) // n, tile, n)
    loads: list[Statement] = [
        Copy(own, f"{ENDS}[h, {slot}, {_piece(pieces, (piece or k) // n)}, {step.columns}, 0:{n}]")
    ]
    body = [step.whole((kept_at(starts, slot, step), register), eq="S before the segment", **_first_of(pieces))]
    if piece:
        body += _product(step, own, piece, pieces, loads)
    else:
        body += _scaled(step, own, loads, workspace)
    kept = [ends, starts, transitions_buffer(workspace), diagonals_buffer(workspace)]
    return scan_kernel(
        f"{program.canonical.name}_carry",
        "carry",
        step,
        narrow,
        kept,
        (loads, body, []),
        step.read_from("initial_state", eq="S = S_0"),
        step.whole((kept_at(starts, "last", step), register), where="length > 0", eq="S before the last segment"),
        step.write_to("final_state", where="length == 0", every=math.inf, eq="the state of no tokens"),
        over=over,
    )


def _piece(pieces: int, size: int) -> str:
    """The slice of the piece that an iteration takes."""
    return f"n % {pieces} * {size}:n % {pieces} * {size} + {size}" if pieces > 1 else f"0:{size}"


def _first_of(pieces: int) -> dict:
    """Of a Map that is for the first of a segment's pieces alone."""
    return {"where": f"n % {pieces} == 0", "every": pieces} if pieces > 1 else {}


def _product(step: Step, own: str, piece: int, pieces: int, loads: list[Statement]) -> list[Statement]:
    """S = M S + E. Both factors are sums of two terms; the product of the smaller ones is left out."""
    register, k, tile, block = step.carried.register, step.dims["K"], step.tile, step.block
    made = block.shared("transitions", 2 * piece, k, dtype=EXACT)
    loads.append(Copy(made, f"transitions_w[h, {step.place.slot}, {_piece(pieces, 2 * piece)}, 0:{k}]"))
    state, body = f"{register}[i, j]", []
    part, value, begin = state, f"{own}[j // {OCTET}, i, j % {OCTET}]", ""
    if pieces > 1:  # registers cannot be told apart by number: the state's columns are taken from shared memory
        whole = block.shared(step.carried.name, tile, k)
        body.append(step.whole((f"{whole}[i, j]", state), **_first_of(pieces)))
        part, begin = f"{whole}[i, n % {pieces} * {piece} + j]", f"T.if_then_else(n % {pieces} == 0, 0.0, {state}) + "
        value = f"T.if_then_else(j // {piece} == n % {pieces}, {own}[j % {piece} // {OCTET}, i, j % {OCTET}], 0.0)"
    high, low = (block.fragment(name, tile, piece, dtype=EXACT) for name in ("high", "low"))
    loops = (("i", tile), ("j", piece))
    rest = f"{part} - T.cast({high}[i, j], 'float32')"
    body += [
        Map(loops, ((f"{high}[i, j]", f"T.cast({part}, '{EXACT}')"),), eq="S in two terms"),
        Map(loops, ((f"{low}[i, j]", f"T.cast({rest}, '{EXACT}')"),)),
        step.whole((state, begin + value), eq="S = M S + E"),
    ]
    for term, row in ((high, 0), (low, 0), (high, piece)):
        body.append(Gemm(register, term, f"{made}[{row}:{row + piece}, 0:{k}]", (tile, k, piece), eq="S = M S + E"))
    return body


def _scaled(step: Step, own: str, loads: list[Statement], workspace: Workspace) -> list[Statement]:
    """The same where M is diagonal, or the identity."""
    state, scale = f"{step.carried.register}[i, j]", ""
    if workspace.gamma:
        made = step.block.shared("diagonals", workspace.dims["K"])
        loads.append(Copy(made, f"diagonals_w[h, {step.place.slot}, 0:{workspace.dims['K']}]"))
        scale = f" * {made}[j]"
    return [step.whole((state, f"{state}{scale} + {own}[0, i, j]"), eq="S = M S + E")]


def transitions_buffer(workspace: Workspace) -> Buffer:
    """M of each segment, transposed: its larger terms and its smaller ones, a piece of rows of each in turn."""
    k = workspace.dims["K"]
    return Buffer("transitions_w", ("HV", "NG", 2 * k, k), EXACT, "global", "workspace")


def diagonals_buffer(workspace: Workspace) -> Buffer:
    """M of each segment where it is diagonal."""
    return Buffer("diagonals_w", ("HV", "NG", workspace.dims["K"]), "float32", "global", "workspace")
