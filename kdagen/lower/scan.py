"""Scan and output: everything of a chunk that reads the state, by V tiles, with the state held transposed.

The state tile is S' (v_tile x K, fp32, in registers): then every product has the V tile as its rows,
    R' = S' Z'     P' = Y' T' + R' T'     O' = S' Q' + P' A'     S' = S' . gamma + P' X
so that the left operand comes from registers and the right one from shared memory, for any chunk size.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdagen.errors import KdagenError, ScheduleError
from kdagen.ir.tensor import Map as TensorMap
from kdagen.ir.tensor import MatMul, Program, Value
from kdagen.ir.tile import Buffer, Copy, Gemm, Kernel, Map, Statement, base, reads
from kdagen.lower.asynchronous import insert_waits
from kdagen.lower.block import Block
from kdagen.lower.expression import tile_text
from kdagen.lower.workspace import Packed, Workspace, operands
from kdagen.schedule import Schedule

SPECIALISED = "scan_specialised"  # skeletons of this name have asynchronous products


@dataclass(frozen=True)
class Term:
    """One product of a MatMul: prepared matrix times a V-wide value, accumulated into `op.out`."""

    op: MatMul
    matrix: Value
    transpose: bool
    value: Value
    level: int  # how many products stand between the chunk's inputs and `value`


class Step:
    """Lowers the V-wide ops of one chunk: products ordered so that none waits for another that it does not need."""

    def __init__(
        self, program: Program, workspace: Workspace, schedule: Schedule, ops: tuple, skip_names: tuple[str, ...] = ()
    ):
        self.program, self.workspace, self.schedule = program, workspace, schedule
        self.tile, self.dims, self.chunk = schedule.v_tile, workspace.dims, schedule.chunk_size
        self.block = Block()
        self.products = {op.out.name: op for op in ops if isinstance(op, MatMul)}
        self.maps = [op for op in ops if isinstance(op, TensorMap)]
        self.cast: set[str] = set()
        self.given = set(skip_names)  # V-wide values that lie in shared memory already transposed

    # -- ordering

    def level(self, value: Value) -> int:
        op = self.products.get(value.name)
        if op is None or value.name in self.given:
            return 0
        return 1 + max(self.level(term.b) for term in op.terms)

    def terms(self) -> list[Term]:
        """All products, ordered by how early their operand is ready; at equal level the state's update comes last."""
        found = []
        for op in self.products.values():
            for a, b, transpose, _ in op.terms:
                found.append(Term(op, a, transpose, b, self.level(b)))
                inner = self.products.get(b.name)
                if inner and inner.add and b.name not in self.given:  # a (b + add) = a b + a add
                    found.append(Term(op, a, transpose, inner.add, self.level(inner.add)))
        return sorted(found, key=lambda t: (t.level, t.op.out == self.program.next_state, t.op.out == self.program.out))

    # -- statements

    def lower(self) -> list[Statement]:
        """The chunk's statements in order: casts just before first use, the decay just before the state's update."""
        started: set[str] = set()
        for term in self.terms():
            out = term.op.out
            if out == self.program.next_state and out.name not in started:
                self.decay_state()
            self.product(term, clear=out.name not in started and out != self.program.next_state)
            started.add(out.name)
        return self.block.statements

    def accumulator(self, value: Value) -> str:
        if value in (self.program.next_state, self.program.state):
            return self.block.fragment("S", self.tile, self.dims["K"])
        return self.block.fragment(value.name, self.tile, self.workspace.size(value.dims[0]))

    def product(self, term: Term, clear: bool) -> None:
        acc = self.accumulator(term.op.out)
        left, transposed = self.left(term.value)
        place = self.workspace.packed[term.matrix.name]
        right = self.right(place)
        n, k = (place.cols, place.rows) if term.transpose else (place.rows, place.cols)
        self.block.add(
            Gemm(
                acc,
                left,
                right,
                (self.tile, n, k),
                trans_a=transposed,
                trans_b=not term.transpose,
                clear=clear,
                eq=term.op.eq,
            )
        )

    def left(self, value: Value) -> tuple[str, bool]:
        """The V-wide operand, and whether it lies as [rows, V] rather than [V, rows]."""
        if value.name in self.workspace.parts:
            return f"{value.name}_s", True
        if value.name in self.given:
            return f"{value.name}_s", False
        acc = self.accumulator(value)
        shape, name = self.block.buffers[acc].shape, f"{base(acc)[:-2]}b"
        operand = self.block.fragment(name, *shape, dtype=self.workspace.dtype)
        if name not in self.cast:
            self.cast.add(name)
            self.block.add(Copy(operand, acc))
        return operand, False

    def right(self, place: Packed) -> str:
        first, _ = self.rows(place.buffer)
        return f"{shared_name(place.buffer)}[{place.row - first}:{place.row - first + place.rows}, 0:{place.cols}]"

    def decay_state(self) -> None:
        for op in self.maps:
            if self.program.state in operands(op):
                index = dict(zip(op.indices, ("j", "i")))
                symbols = {v.symbol: self.read(v, [index[i] for i in ix]) for v, ix in op.operands}
                loops = (("i", self.tile), ("j", self.dims["K"]))
                self.block.add(Map(loops, (("S_f[i, j]", tile_text(op.expr, symbols)),), eq=op.eq))

    def read(self, value: Value, index: list[str]) -> str:
        if value == self.program.state:
            return "S_f[i, j]"
        if value == self.workspace.gamma:
            return "gamma_s[j]"
        raise KdagenError(f"a scan may scale its state by the chunk's decay only, not by '{value.name}'")

    # -- what the chunk needs from global memory

    def rows(self, buffer: str) -> tuple[int, int]:
        """The rows of a packed workspace that this kernel's products use."""
        used = {t.matrix.name for t in self.terms()}
        places = [p for name, p in self.workspace.packed.items() if p.buffer == buffer and name in used]
        return min(p.row for p in places), max(p.row + p.rows for p in places)

    def loads(self, n: str) -> list[Statement]:
        """Copies of chunk `n` into shared memory."""
        used = {t.matrix.name for t in self.terms()}
        copies: list[Statement] = []
        for buffer in dict.fromkeys(p.buffer for name, p in self.workspace.packed.items() if name in used):
            first, end = self.rows(buffer)
            cols = next(p.cols for p in self.workspace.packed.values() if p.buffer == buffer)
            tile = self.block.shared(buffer[:-2], end - first, cols, dtype=self.workspace.dtype)
            copies.append(Copy(tile, f"{buffer}[b, h, {n}, {first}:{end}, 0:{cols}]"))
        for value in self.v_operands():
            copies += self.load_parts(value, n)
        if any(self.workspace.gamma in operands(op) for op in self.maps):
            copies.append(Copy(self.block.shared("gamma", self.dims["K"]), f"gamma_w[b, h, {n}, 0:{self.dims['K']}]"))
        return copies

    def v_operands(self) -> list[Value]:
        """Prepared V-wide values in use, the skip term included."""
        values = [t.value for t in self.terms()]
        values += [op.add for op in self.products.values() if op.add]
        return list({v.name: v for v in values if v.name in self.workspace.parts}.values())

    def load_parts(self, value: Value, n: str) -> list[Statement]:
        c, parts = self.chunk, self.workspace.parts[value.name]
        if len(parts) > 1 and self.tile > 64:  # a wider tile is laid out in halves, which one copy cannot fill by rows
            raise ScheduleError(f"v_tile {self.tile}: {len(parts)} streams are stacked in '{value.name}', expected 64")
        tile = self.block.shared(value.name, len(parts) * c, self.tile, dtype=self.workspace.dtype)
        columns = f"tile * {self.tile}:tile * {self.tile} + {self.tile}"
        copies = []
        for s, part in enumerate(parts):
            source = (
                f"{part.name}_in[b, {n} * {c}:{n} * {c} + {c}, h, {columns}]" if part.is_argument
                else f"{part.name}[b, h, {n}, 0:{c}, {columns}]"
            )  # fmt: skip
            copies.append(Copy(f"{tile}[{s * c}:{(s + 1) * c}, 0:{self.tile}]" if len(parts) > 1 else tile, source))
        return copies

    def stage_output(self) -> Map:
        """O' transposed into shared memory, the skip term added."""
        c, out = self.chunk, self.products[self.program.out.name]
        staged = self.block.shared("o", c, self.tile, dtype=self.workspace.dtype)
        skip = f" + T.cast({out.add.name}_s[i, j], 'float32')" if out.add else ""
        value = f"{self.accumulator(out.out)}[j, i]{skip}"
        return Map((("j", self.tile), ("i", c)), ((f"{staged}[i, j]", value),), eq=f"{out.out.name}, tokens in rows")

    def store_output(self, n: str) -> Copy:
        """The staged output to its place, rows past the end left out."""
        rows, columns = f"{n} * {self.chunk}", f"tile * {self.tile}"
        return Copy(f"o_out[b, {rows}:{rows} + {self.chunk}, h, {columns}:{columns} + {self.tile}]", "o_s")


def shared_name(workspace: str) -> str:
    """The shared tile that a workspace tensor is loaded into."""
    return f"{workspace[:-2]}_s"


def lower_scan(program: Program, workspace: Workspace, schedule: Schedule, arguments: dict[str, Buffer]) -> Kernel:
    """The scan kernel: one block a (V tile, head, sequence), chunk after chunk; writes O too if output is fused."""
    fused = schedule.output == "fused"
    step = Step(program, workspace, schedule, program.scan + (program.output if fused else ()))
    loads = step.loads("n")
    if not fused:
        step.left(program.state)
    body = step.lower()
    stores = [step.stage_output(), step.store_output("n")] if fused else _store_states(step)
    if fused and step.products[program.out.name].add:  # the skip term is one of the chunk's tiles
        body.append(stores.pop(0))
    if schedule.scan_skeleton == SPECIALISED:
        body = insert_waits(body)
    tile, k = schedule.v_tile, workspace.dims["K"]
    whole = (("i", tile), ("j", k))
    return Kernel(
        name=f"{program.canonical.name}_scan",
        family="scan",
        skeleton=schedule.scan_skeleton,
        grid=_grid(workspace, tile),
        threads=schedule.scan_threads,
        stages=schedule.stages,
        buffers=_buffers(step, arguments, loads + stores, ("initial_state", "final_state")),
        before=(Map(whole, (("S_f[i, j]", f"initial_state[b, h, j, tile * {tile} + i]"),), eq="S = S_0"),),
        loads=tuple(loads),
        body=tuple(body),
        stores=tuple(stores),
        after=(Map(whole, ((f"final_state[b, h, j, tile * {tile} + i]", "S_f[i, j]"),), eq="S_T"),),
        chunk_size=schedule.chunk_size,
    )


def lower_output(program: Program, workspace: Workspace, schedule: Schedule, arguments: dict[str, Buffer]) -> Kernel:
    """The output kernel of a split schedule: O from stored states and pseudo-values, all chunks at once."""
    kept = stored_values(program)
    step = Step(program, workspace, schedule, program.output, tuple(v.name for v in kept))
    loads = step.loads("n")
    tile = schedule.v_tile
    for value in kept:
        cols = _cols(workspace, value)
        shared = step.block.shared(value.name, tile, cols, dtype=workspace.dtype)
        loads.append(Copy(shared, f"{value.name}_w[b, h, n, tile * {tile}:tile * {tile} + {tile}, 0:{cols}]"))
    body = step.lower()
    stores = [step.stage_output(), step.store_output("n")]
    return Kernel(
        name=f"{program.canonical.name}_output",
        family="output",
        skeleton=schedule.output_skeleton,
        grid=(("n", "NC"), ("tile_h", f"{workspace.dims['V'] // tile} * H"), ("b", "B")),
        threads=schedule.scan_threads,
        stages=1,
        buffers=_buffers(step, arguments, loads + stores, ()),
        loads=tuple(loads),
        body=tuple(body),
        stores=tuple(stores),
        chunk_size=schedule.chunk_size,
    )


def stored_values(program: Program) -> tuple[Value, ...]:
    """What a split schedule's scan keeps for the output kernel: the state before each chunk, the pseudo-values."""
    made = {op.out.name for op in program.scan} | {program.state.name}
    used = [v for op in program.output for v in operands(op) if v.name in made]
    return tuple({v.name: v for v in used}.values())


def _cols(workspace: Workspace, value: Value) -> int:
    return workspace.size(value.dims[0])


def _store_states(step: Step) -> list[Statement]:
    """Keep the operands that the products used, transposed as they are: [V tile, K] and [V tile, rows]."""
    stores: list[Statement] = []
    for value in stored_values(step.program):
        operand, _ = step.left(value)
        cols = _cols(step.workspace, value)
        stores.append(
            Copy(f"{value.name}_w[b, h, n, tile * {step.tile}:tile * {step.tile} + {step.tile}, 0:{cols}]", operand)
        )
    return stores


def _grid(workspace: Workspace, tile: int) -> tuple[tuple[str, str], ...]:
    return (("tile", str(workspace.dims["V"] // tile)), ("h", "H"), ("b", "B"))


def _buffers(
    step: Step, arguments: dict[str, Buffer], copies: list[Statement], states: tuple[str, ...]
) -> tuple[Buffer, ...]:
    """Globals in use, in the order arguments, states, workspaces, output; then the block's own."""
    w = step.workspace
    known = {b.name: b for b in arguments.values()}
    known |= {s: Buffer(s, ("B", "H", w.dims["K"], w.dims["V"]), "float32", "global", s) for s in states}
    known |= {b.name: b for b in (*w.buffers(), *state_buffers(step.program, w))}
    known["o_out"] = Buffer("o_out", ("B", "T", "H", w.dims["V"]), w.dtype, "global", "out")
    used = {name for s in copies for name in reads(s) | {base(s.dst) if isinstance(s, Copy) else ""}} | set(states)
    return (*(b for n, b in known.items() if n in used), *step.block.buffers.values())


def state_buffers(program: Program, workspace: Workspace) -> tuple[Buffer, ...]:
    """Workspaces of a split schedule, transposed like the values that they keep."""
    v = workspace.dims["V"]
    return tuple(
        Buffer(f"{value.name}_w", ("B", "H", "NC", v, _cols(workspace, value)), workspace.dtype, "global", "workspace")
        for value in stored_values(program)
    )
