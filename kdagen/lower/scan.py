"""Scan and output: everything of a chunk's forward that reads the state, by V tiles.

The scan goes from chunk to chunk and writes O itself, or leaves states and pseudo-values to the output kernel, which
takes all chunks at once. In training it keeps the states for the backward; the replay forms them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from kdagen.derive.transition import transition
from kdagen.ir.tensor import Op, Program, Value
from kdagen.ir.tile import Buffer, Copy, Kernel, Map, Statement, reads, writes
from kdagen.lower.asynchronous import insert_waits
from kdagen.lower.rows import (
    CHUNK,
    CHUNK_ROWS,
    Over,
    Place,
    most_tokens,
    of_chunk,
    segments,
    sequences,
    tile_of,
)
from kdagen.lower.step import Carried, Step
from kdagen.lower.workspace import Workspace, operands
from kdagen.schedule import Schedule

EVERY = Buffer("every", (), "int32", "global", "scalar")  # chunks from one returned state to the next
STARTS = "starts_w"  # the state before each segment, where sequences are split
OCTET = 8
PLAIN = "scan_plain"  # whose warps are all alike
SPECIALISED = "scan_specialised"  # skeletons of this name have asynchronous products


def lower_scan(
    program: Program, workspace: Workspace, schedule: Schedule, arguments: dict[str, Buffer], keep_states: bool = False
) -> Kernel:
    """The scan kernel: one block a (V tile and sequence, head), chunk after chunk; writes O too if output is fused.

    `keep_states` stores the state before each chunk, which a split output does anyway. Where sequences are split, a
    block takes a segment, from the state before it that the carry kernel left (see kdagen.lower.split).
    """
    fused, split = schedule.output == "fused", schedule.split
    over = segments(schedule.chunk_size, split) if split else sequences(schedule.chunk_size)
    step = scan_step(program, workspace, schedule, program.scan + (program.output if fused else ()), over.place)
    loads = step.loads()
    if not fused:
        step.left(program.state)
    body = step.lower(_keep_state(step) if fused and keep_states else None)
    stores = [_stage_output(step), _store_output(step)] if fused else _store_operands(step, program)
    if fused and step.products[program.out.name].add:  # the skip term is one of the chunk's tiles
        body.append(stores.pop(0))
    if not keep_states:
        stores.append(_return_state(step, "skipped + n" if split else "n"))
    before, after = step.read_from("initial_state", eq="S = S_0"), step.write_to("final_state", eq="S_T")
    if split:
        before, after = _of_segment(step, split, kept_state(STARTS, program, workspace))
    known = [*state_buffers(program, workspace), state_buffer(program.state, workspace, "NC")]
    known += [kept_state(STARTS, program, workspace)] * bool(split)
    if not keep_states:
        known += [given_state("states", workspace, "NS"), EVERY]
    return scan_kernel(
        f"{program.canonical.name}_scan",
        "scan",
        step,
        schedule,
        [*arguments.values(), *known, output_buffer(workspace)],
        (loads, body, stores),
        before,
        after,
        over=over,
    )


def lower_replay(program: Program, workspace: Workspace, schedule: Schedule, arguments: dict[str, Buffer]) -> Kernel:
    """The scan once more, for the states before each chunk and nothing else."""
    step = scan_step(program, workspace, schedule, program.scan, sequences(schedule.chunk_size).place)
    loads = step.loads()
    body = step.lower(_keep_state(step))
    return scan_kernel(
        f"{program.canonical.name}_replay",
        "scan",
        step,
        schedule,
        [*arguments.values(), state_buffer(program.state, workspace, "NC")],
        (loads, body, []),
        step.read_from("initial_state", eq="S = S_0"),
    )


def lower_output(program: Program, workspace: Workspace, schedule: Schedule, arguments: dict[str, Buffer]) -> Kernel:
    """The output kernel of a split schedule: O from stored states and pseudo-values, all chunks at once."""
    kept = stored_values(program)
    step = scan_step(program, workspace, schedule, program.output, CHUNK, tuple(v.name for v in kept))
    loads = step.loads()
    for value in kept:
        cols = workspace.size(value.dims[0])
        shared = step.block.shared(value.name, schedule.v_tile, cols, dtype=workspace.dtype)
        loads.append(Copy(shared, f"{value.name}_w[h, n, {step.columns}, 0:{cols}]"))
    body = step.lower()
    stores = [_stage_output(step), _store_output(step)]
    tiles, lets = tile_of(workspace.dims["V"] // schedule.v_tile, ("h", "HV"))
    known = [*arguments.values(), *workspace.buffers(), *state_buffers(program, workspace), output_buffer(workspace)]
    return Kernel(
        name=f"{program.canonical.name}_output",
        family="output",
        skeleton=schedule.output_skeleton,
        grid=(("n", "NC"), tiles),
        threads=schedule.scan_threads,
        stages=1,
        buffers=(*_used(known, loads + stores), CHUNK_ROWS, *step.block.buffers.values()),
        lets=(*lets, *of_chunk()),
        loads=tuple(loads),
        body=tuple(body),
        stores=tuple(stores),
        chunk_size=schedule.chunk_size,
    )


def scan_kernel(
    name: str,
    family: str,
    step: Step,
    schedule: Schedule,
    known: list[Buffer],
    chunk: tuple[list[Statement], list[Statement], list[Statement]],
    before: Map,
    *after: Map,
    over: Over | None = None,
    columns: str = "V",
) -> Kernel:
    """A kernel that goes from chunk to chunk: its grid, its globals in use and the waits of asynchronous products.

    `chunk` is what every iteration loads, does and stores; `before` and `after` read and write whole states. Blocks
    take a sequence each, or what `over` says; `columns` is the dimension that their tiles share.
    """
    loads, body, stores = chunk
    w, over = step.workspace, over or sequences(schedule.chunk_size)
    if schedule.scan_skeleton == SPECIALISED:
        body = insert_waits(body)
    states = [s for edge in (before, *after) for s in (*_states(edge, w, reads), *_states(edge, w, writes))]
    arguments, others = ([b for b in known if (b.role in ("argument", "d_out")) == given] for given in (True, False))
    scalars = [b for b in others if b.role == "scalar"]
    globals_ = _used([*arguments, *states, *w.buffers(), *others], [*loads, *body, *stores, before, *after])
    tiles, lets = tile_of(w.dims[columns] // step.tile, (over.index, over.extent))
    if any("tokens" in text for _, text in over.lets) and not any("T" in b.shape for b in globals_):
        lets += most_tokens(step.chunk, "N" if any("N" in b.shape for b in globals_) else "(N1 - 1)")
    returned = (("returned", f"T.truncdiv(start // {step.chunk}, every)"),) if EVERY in scalars else ()
    return Kernel(
        name=name,
        family=family,
        skeleton=schedule.scan_skeleton,
        grid=(tiles, ("h", "HV")),
        threads=schedule.scan_threads,
        stages=schedule.stages,
        buffers=(*globals_, *over.tables, *scalars, *step.block.buffers.values()),
        lets=(*lets, *over.lets, *returned),
        before=(before,),
        loads=tuple(loads),
        body=tuple(body),
        stores=tuple(stores),
        after=tuple(after),
        chunk_size=schedule.chunk_size,
        segment=over.segment,
    )


def stored_values(program: Program) -> tuple[Value, ...]:
    """What a split schedule's scan keeps for the output kernel: the state before each chunk, the pseudo-values."""
    made = {op.out.name for op in program.scan} | {program.state.name}
    used = [v for op in program.output for v in operands(op) if v.name in made]
    return tuple({v.name: v for v in used}.values())


def state_buffer(value: Value, workspace: Workspace, slots: str) -> Buffer:
    """The workspace that keeps one value a slot, transposed: V channels as rows."""
    shape = ("HV", slots, workspace.dims["V"], workspace.size(value.dims[0]))
    return Buffer(f"{value.name}_w", shape, workspace.dtype, "global", "workspace")


def state_buffers(program: Program, workspace: Workspace) -> tuple[Buffer, ...]:
    """Workspaces of a split schedule, transposed like the values that they keep."""
    return tuple(state_buffer(value, workspace, "NC") for value in stored_values(program))


def kept_state(name: str, program: Program, workspace: Workspace) -> Buffer:
    """A workspace that keeps a state a segment with the precision of sums, as [K / n, V, n].

    So it lies in the order in which it is carried on: by products, whose accumulators have 8 rows by 8 columns in 32
    threads, or row by row.
    """
    v, k = workspace.dims["V"], workspace.dims["K"]
    n = OCTET if transition(program) else k
    return Buffer(name, ("HV", "NG", k // n, v, n), "float32", "global", "workspace")


def kept_at(kept: Buffer, slot: str, step: Step) -> str:
    """Its element that is (i, j) of a block's transposed tile."""
    n = kept.shape[-1]
    return f"{kept.name}[h, {slot}, j // {n}, tile * {step.tile} + i, j % {n}]"


def output_buffer(workspace: Workspace) -> Buffer:
    """O, as the caller gets it."""
    return Buffer("o_out", ("T", "HV", workspace.dims["V"]), workspace.dtype, "global", "out")


def scan_step(
    program: Program,
    workspace: Workspace,
    schedule: Schedule,
    ops: tuple[Op, ...],
    place: Place,
    transposed: tuple[str, ...] = (),
) -> Step:
    """Some of a program's ops on the state that is carried forward."""
    carried = Carried(program.state.name, program.state, program.next_state)
    return Step(workspace, schedule, ops, carried, place, program.out, transposed=transposed)


def _of_segment(step: Step, split: int, starts: Buffer) -> tuple[Map, Map]:
    """The state before a segment, as it was left; the final state, if no other segment follows."""
    start, last = kept_at(starts, "segment", step), f"(left > 0) & (left <= {split})"
    return (
        step.whole((f"{step.carried.register}[i, j]", start), eq="S before the segment"),
        step.write_to("final_state", where=last, every=math.inf, eq="S_T, after the last segment"),
    )


def _keep_state(step: Step) -> Map:
    return step.keep(f"{step.carried.name}_w", step.place.slot, eq="the state before the chunk")


def _return_state(step: Step, n: str) -> Map:
    """The state after every `every` chunks of a sequence, of which this is number `n`, to the caller."""
    return step.store(
        f"states[returned + T.truncdiv({n} + 1, every) - 1",
        where=f"(T.truncmod({n} + 1, every) == 0) & (({n} + 1) * {step.chunk} <= length)",
        every=math.inf,  # as a rule nobody asks for them
        eq="the state after every so many chunks",
    )


def _stage_output(step: Step) -> Map:
    """O' transposed into shared memory, the skip term added."""
    out = step.products[step.out.name]
    staged = step.block.shared("o", step.chunk, step.tile, dtype=step.workspace.dtype)
    skip = f" + T.cast({out.add.name}_s[i, j], 'float32')" if out.add else ""
    value = f"{step.accumulator(out.out)}[j, i]{skip}"
    return Map(
        (("j", step.tile), ("i", step.chunk)), ((f"{staged}[i, j]", value),), eq=f"{out.out.name}, tokens in rows"
    )


def _store_output(step: Step) -> Map:
    """The staged output to its place, rows past the end left out."""
    at, loops = f"o_out[{step.place.row} + i, h, tile * {step.tile} + j]", (("i", step.chunk), ("j", step.tile))
    return Map(loops, ((at, "o_s[i, j]"),), where=f"i < {step.place.rows}", eq="rows of the sequence alone")


def _store_operands(step: Step, program: Program) -> list[Statement]:
    """Keep the operands that the products used, transposed as they are: [V tile, K] and [V tile, rows]."""
    stores: list[Statement] = []
    for value in stored_values(program):
        operand, _ = step.left(value)
        cols = step.workspace.size(value.dims[0])
        stores.append(Copy(f"{value.name}_w[h, {step.place.slot}, {step.columns}, 0:{cols}]", operand))
    return stores


def _states(edge: Map, workspace: Workspace, touched) -> Iterable[Buffer]:
    """The caller's states that a Map touches: what else it touches lies in registers or workspaces."""
    return (given_state(name, workspace) for name in touched(edge) if not name.endswith(("_f", "_w")))


def given_state(name: str, workspace: Workspace, slots: str = "N") -> Buffer:
    """A tensor of states as the caller has them, whose name is its role."""
    shape = (slots, "HV", *(workspace.dims[d] for d in workspace.state.dims))
    return Buffer(name, shape, workspace.state.dtype, "global", name)


def _used(known: Iterable[Buffer], statements: list[Statement]) -> tuple[Buffer, ...]:
    """The globals, in the order given and once each, that some statement touches."""
    used = {name for s in statements for name in reads(s) | writes(s)}
    return tuple({b.name: b for b in known if b.name in used}.values())
