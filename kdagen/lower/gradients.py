"""Gradients: the backward of a chunk, given the state before it and the cotangent of the state after it.

One block a (segment of chunks, head), from the segment's last chunk to its first. The state's cotangent goes
from chunk to chunk in registers, transposed like the scan's state (V x K); everything else is formed anew a chunk, from
the arguments: what `Adjoint.recompute` holds, then the reverse scan's ops, then those of `Adjoint.gradients`.

Unlike prepare, which only forms what scans read, a value here may be a product's result, an operand, both, or neither:
results and operands are tiles in shared memory, all else are expressions.
"""

from __future__ import annotations

import math
from functools import cached_property

from kdagen.errors import ScheduleError
from kdagen.ir.tensor import (
    Adjoint,
    ColSum,
    Deinterleave,
    GramAdjoint,
    Interleave,
    Load,
    MatMul,
    RowSum,
    Spread,
    Value,
    reads,
    writes,
)
from kdagen.ir.tensor import (
    Map as TensorMap,
)
from kdagen.ir.tile import Buffer, Copy, Gemm, Kernel, Map
from kdagen.ir.tile import ColSum as TileColSum
from kdagen.ir.tile import RowSum as TileRowSum
from kdagen.ir.tile import reads as tile_reads
from kdagen.ir.tile import writes as tile_writes
from kdagen.lower.block import Access, element
from kdagen.lower.expression import tile_text
from kdagen.lower.gram_adjoint import lower_gram_adjoint, lower_spread
from kdagen.lower.order import least_in_use
from kdagen.lower.prepare import LOG2E, Prepare
from kdagen.lower.reverse import d_out_buffer
from kdagen.lower.rows import CHUNK_ROWS, KEY_HEAD, SEGMENTS, of_chunk, of_segment
from kdagen.lower.scan import state_buffer
from kdagen.lower.workspace import Workspace
from kdagen.schedule import DecayForm, TrainingSchedule

STATE_ELEMENTS = 128 * 128  # of a state's cotangent, which a block keeps in registers
FRAGMENT = 64  # registers a thread may give to terms of a sum


def lower_gradients(
    adjoint: Adjoint, workspace: Workspace, schedule: TrainingSchedule, dtypes: dict[str, str]
) -> Kernel:
    """The gradients kernel of an adjoint; `dtypes` gives each argument's dtype, which is its gradient's too."""
    k, v = workspace.dims["K"], workspace.dims["V"]
    if k * v > STATE_ELEMENTS:
        raise ScheduleError(
            f"head_dim {k, v} has no backward: expected K x V of at most {STATE_ELEMENTS}, as 128 x 128"
        )
    lowering = Gradients(adjoint, workspace, schedule, dtypes)
    results = lowering.results()
    lowering.run()
    name, used = adjoint.forward.canonical.name, set()
    for statement in lowering.block.statements:
        used |= tile_reads(statement) | tile_writes(statement)
    end = f"T.cast({lowering.end.name}[h, segment, i, j], 'float32')"
    carried = f"{lowering.carried}[i, j]"
    start = Map((("i", v), ("j", k)), ((carried, end),), eq="the state's cotangent at the segment's end")
    inputs = [b for b in lowering.inputs() if b.name in used | {lowering.end.name}]
    return Kernel(
        name=f"{name}_gradients",
        family="gradients",
        skeleton=schedule.gradients_skeleton,
        grid=(("segment", "NG"), ("h", "HV")),
        threads=schedule.gradient_threads,
        stages=1,
        buffers=(*inputs, CHUNK_ROWS, SEGMENTS, *results, *lowering.block.buffers.values()),
        lets=(*of_segment(schedule.segment), KEY_HEAD),
        chunk_lets=of_chunk(),
        loads=(),
        before=(start,) if lowering.carries else (),
        body=tuple(lowering.block.statements),
        stores=(),
        chunk_size=schedule.chunk_size,
        segment=schedule.segment,
        merged=True,
    )


class Gradients(Prepare):
    """Lowering state: as prepare's, with tiles for the operands and results of products."""

    def __init__(self, adjoint: Adjoint, workspace: Workspace, schedule: TrainingSchedule, dtypes: dict[str, str]):
        super().__init__(adjoint.forward, workspace, schedule, dtypes)
        self.adjoint, self.dtypes = adjoint, dtypes
        self.ops = (*adjoint.recompute, *adjoint.reverse, *adjoint.gradients)
        self.tiles: dict[str, str] = {}  # values that lie in the operand dtype in shared memory, as products need them
        self.formed: dict = {}  # operands of each Gram
        self.state, self.d_next, self.d_state = adjoint.forward.state, adjoint.d_next_state, adjoint.d_state
        self.end = state_buffer(adjoint.d_state, workspace, "NG")  # the cotangent at the ends of segments
        self.carried = f"{adjoint.d_state.name}_f"
        self.carries = schedule.segment > 1  # else a chunk's cotangent comes from the reverse scan each time
        self.handlers = {
            Load: self.load, TensorMap: self.map, RowSum: self.sums, ColSum: self.sums, Spread: self.spread,
            GramAdjoint: self.gram_adjoint, Interleave: self.interleave, Deinterleave: self.deinterleave,
            MatMul: self.matmul,
        }  # fmt: skip

    # -- global tensors

    def inputs(self) -> tuple[Buffer, ...]:
        """What the kernel may read, in the order arguments, cotangent of the output, states."""
        d_out = d_out_buffer(self.adjoint, self.workspace)
        return (*self.arguments.values(), d_out, state_buffer(self.state, self.workspace, "NC"), self.end)

    def results(self) -> tuple[Buffer, ...]:
        """A gradient for each argument that anything depends on, also of a key for each head of values.

        For a head's parameter, what each chunk adds to it.
        """
        found = []
        for argument, value in self.adjoint.results:
            if value is not None:
                axis = (self.dims[argument.axis],) if argument.axis else ()
                name = f"d_{argument.name}_out"
                if argument.per_token:
                    dtype = self.dtypes[argument.name]
                    found.append(Buffer(name, ("T", "HV", *axis), dtype, "global", "gradient"))
                else:
                    found.append(Buffer(name, ("HV", "NC", *axis), "float32", "global", "partial_gradient"))
        return tuple(found)

    # -- the chunk

    def run(self) -> None:
        """All statements of a chunk: the state's two sides, every op, the gradients, and the cotangent's next step."""
        v, k = self.dims["V"], self.dims["K"]
        if any(self.state in reads(op) for op in self.ops):
            tile = self.block.shared(self.state.name, v, k, dtype=self.dtype)
            self.block.add(Copy(tile, f"{self.state.name}_w[h, n, 0:{v}, 0:{k}]", eq="the state before the chunk"))
            self.define_state(self.state, tile)
        tile = self.block.shared(self.d_next.name, v, k, dtype=self.dtype)
        if self.carries:
            after = self.block.fragment(self.d_state.name, v, k)
        else:
            after = f"{self.end.name}[h, segment, 0:{v}, 0:{k}]"
        self.block.add(Copy(tile, after, eq="the cotangent of the state after the chunk"))
        self.define_state(self.d_next, tile)
        if any(self.adjoint.d_out in reads(op) for op in self.ops):
            given = d_out_buffer(self.adjoint, self.workspace)
            self.load_values(given, self.adjoint.d_out, "cotangent of the output")
        for op in self.order():
            (self.step if op in self.steps else self.lower)(op)
            self.write_made(set(writes(op)))
        self.write_made({self.adjoint.d_out})  # a term of the output that an argument is by itself

    def write_made(self, values: set[Value]) -> None:
        """Gradients among these values to their places, so that their tiles are free again."""
        for argument, value in self.adjoint.results:
            if value in values:
                self.write(argument, value)

    def order(self) -> tuple:
        """Every op after its operands; once the reverse scan's are done, those first that free most tiles."""
        reverse = [op for op in self.adjoint.reverse if op not in self.steps]
        later = (*(self.steps if self.carries else ()), *self.adjoint.gradients)
        before, given = (*self.adjoint.recompute, *reverse), (self.state, self.d_next, self.adjoint.d_out)
        return (*before, *least_in_use(later, before, self.tile_bytes, given))

    def tile_bytes(self, value: Value) -> int:
        elements = math.prod(map(self.workspace.size, value.dims))
        return elements * (4 if len(value.dims) < 2 or value.dims[0] == value.dims[1] else 2)

    @cached_property
    def steps(self) -> tuple:
        """The ops that make the state's next cotangent: its product, and the decay of what is added."""
        makes = {op.out: op for op in self.adjoint.reverse}
        last = makes[self.d_state]
        added = makes.get(last.add) if isinstance(last, MatMul) else None
        return (added, last) if added else (last,)

    def lower(self, op) -> None:
        handler = self.handlers.get(type(op))
        handler(op) if handler else super().lower(op)

    def define_state(self, value: Value, tile: str) -> None:
        """A K x V value, which lies transposed."""
        self.tiles[value.name] = tile
        self.define(value, lambda row, col: f"T.cast({tile}[{col}, {row}], 'float32')")

    def load(self, op: Load) -> None:
        if op.argument.axis != "V" or not op.argument.per_token:
            super().load(op)
            if op.argument.axis == "K" and op.argument.per_token and self.dtypes[op.argument.name] == self.dtype:
                self.tiles[op.out.name] = f"{op.argument.name}_in_s"
            return
        self.zero_past_end.add(op.out.name)
        self.load_values(self.arguments[op.argument.name], op.out, op.eq)

    def load_values(self, source: Buffer, value: Value, eq: str) -> None:
        """A chunk of a V-wide tensor."""
        self.define(value, self.tile(source, eq))
        if source.dtype == self.dtype:
            self.tiles[value.name] = f"{source.name}_s"

    # -- products

    def keep(self, value: Value, access: Access, eq: str, name: str = "") -> None:
        """A K-wide value in the operand dtype, as products need it; others as prepare keeps them."""
        if value.dims != ("C", "K"):
            super().keep(value, access, eq, name)
            return
        self.define(value, access)
        tile = self.operand(value)
        self.define(value, lambda i, j: f"T.cast({tile}[{i}, {j}], 'float32')")

    def operand(self, value: Value) -> str:
        """The tile of a product's operand, formed now if it was an expression so far."""
        if value.name not in self.tiles:
            rows, cols = (self.workspace.size(d) for d in value.dims)
            tile = self.block.shared(f"{value.name}_b", rows, cols, dtype=self.dtype)
            entry = self.access[value.name]("i", "j")
            loops = ("i", rows), ("j", cols)
            self.block.add(Map(loops, ((f"{tile}[i, j]", entry),), eq=f"{value.name}, as an operand"))
            self.tiles[value.name] = tile
        return self.tiles[value.name]

    def matmul(self, op: MatMul) -> None:
        shape = tuple(self.workspace.size(d) for d in op.out.dims)
        acc = self.block.fragment(f"{op.out.name}_acc", *shape)
        if op.add:
            entry = self.access[op.add.name]("i", "j")
            self.block.add(Map((("i", shape[0]), ("j", shape[1])), ((f"{acc}[i, j]", entry),), eq=op.add.name))
        self.products(op, acc, clear=op.add is None)
        tile = self.tiles[op.out.name] = self.block.shared(op.out.name, *shape, dtype=self.dtype)
        self.block.add(Copy(tile, acc))
        self.define(op.out, lambda i, j: f"T.cast({tile}[{i}, {j}], 'float32')")

    def products(self, op: MatMul, acc: str, clear: bool) -> None:
        """The terms of a MatMul, added up in `acc`; K x V operands and results lie transposed."""
        m, n = self.block.buffers[acc].shape
        for step, (a, b, ta, tb) in enumerate(op.terms):
            inner = self.workspace.size(a.dims[0 if ta else 1])
            left, right = (self.operand(a), ta != lies_turned(a)), (self.operand(b), tb != lies_turned(b))
            if lies_turned(op.out):  # (a b)^T = b^T a^T
                left, right = (right[0], not right[1]), (left[0], not left[1])
            flags = {"trans_a": left[1], "trans_b": right[1], "clear": clear and step == 0}
            self.block.add(Gemm(acc, left[0], right[0], (m, n, inner), **flags, eq=op.eq))

    def step(self, op) -> None:
        """The state's cotangent before the chunk, in place: decayed, then the products added."""
        if isinstance(op, MatMul):
            self.products(op, self.carried, clear=op.add is None)
            return
        at = dict(zip(op.indices, ("j", "i")))
        carried, loops = f"{self.carried}[i, j]", (("i", self.dims["V"]), ("j", self.dims["K"]))
        symbols = {
            v.symbol: carried if v == self.d_next else self.access[v.name](*(at[i] for i in ix))
            for v, ix in op.operands
        }
        self.block.add(Map(loops, ((carried, tile_text(op.expr, symbols)),), eq=op.eq))

    # -- sums

    def sums(self, op: RowSum | ColSum) -> None:
        """Over the last dim or the first; of a K x V value, which is formed transposed, the other way around."""
        if op.a.name in self.zero_past_end:
            self.zero_past_end.add(op.out.name)
        read, dims = self.access[op.a.name], op.a.dims
        if len(dims) == 1:  # as a matrix of one row
            shape, entry, rows = (1, self.workspace.size(dims[0])), read("j"), True
        elif dims == ("K", "V"):
            shape, entry, rows = (self.dims["V"], self.dims["K"]), read("j", "i"), isinstance(op, ColSum)
        else:
            shape, entry, rows = tuple(map(self.workspace.size, dims)), read("i", "j"), isinstance(op, RowSum)
        if not rows and math.prod(shape) > FRAGMENT * self.schedule.gradient_threads:
            self.sum_serially(op, shape, entry)
            return
        terms = self.block.fragment(f"{op.out.name}_terms", *shape)
        total = self.block.fragment(f"{op.out.name}_sum", shape[0] if rows else shape[1])
        self.block.add(Map(tuple(zip("ij", shape)), ((f"{terms}[i, j]", entry),)))
        self.block.add((TileRowSum if rows else TileColSum)(total, terms, eq=op.eq))
        kept = self.block.shared(op.out.name, *(self.block.buffers[total].shape))
        self.block.add(Copy(kept, total))
        self.define(op.out, lambda *index: f"{kept}[{index[0] if index else 0}]")

    def sum_serially(self, op: RowSum | ColSum, shape: tuple[int, ...], entry: str) -> None:
        """Column sums of what few threads cannot hold in registers."""
        total, columns = self.block.shared(op.out.name, shape[1]), (("j", shape[1]),)
        self.block.add(
            Map(columns, ((f"{total}[j]", "0.0"),)),
            Map(columns, ((f"{total}[j]", f"{total}[j] + {entry}"),), serial=("i", 0, shape[0]), eq=op.eq),
        )
        self.define(op.out, lambda *index: f"{total}[{index[0]}]")

    def spread(self, op: Spread) -> None:
        """In place on the tile of what is added to, which nothing else reads; a tile of zeros where there is none."""
        shape, index = tuple(map(self.workspace.size, op.a.dims)), ("i", "j")[: len(op.a.dims)]
        name = self.access[op.add.name](*index).split("_s[")[0] if op.add else op.out.name
        if op.add is None:
            self.fill(name, op.a.dims, lambda *index: "0.0", "")
        lower_spread(self.block, name, self.access[op.a.name], op.span, shape)
        self.define(op.out, element(f"{name}_s"))

    # -- secondary matrices, streams

    def gram(self, op) -> None:
        self.formed[op] = super().gram(op)
        products = {v for other in self.ops if isinstance(other, MatMul) for term in other.terms for v in term[:2]}
        for value in products & set(writes(op)):  # at once: the matrices' own tile may be needed for no other
            self.operand(value)

    def gram_adjoint(self, op: GramAdjoint) -> None:
        gram, operands = op.gram, self.formed[op.gram]
        d_outs = tuple(tuple(self.access[v.name] if v else None for v in row) for row in op.d_outs)
        form = self.schedule.decay if gram.g else DecayForm.NONE
        gate = self.access[gram.g.name] if gram.g else None
        log2 = (lambda *index: f"{gate(*index)} * {LOG2E}") if gate else None
        adds = tuple(tuple(self.access[v.name] if v else None for v in side) for side in op.adds)
        d_rows, d_cols, d_gate = lower_gram_adjoint(self.block, form, operands, d_outs, log2, gram.diagonal, adds)
        for value, access in zip((*op.d_readers, *op.d_writers), (*d_rows, *d_cols), strict=True):
            self.define(value, access)
        if op.d_g:
            self.define(op.d_g, d_gate)

    def deinterleave(self, op: Deinterleave) -> None:
        """Row i of part s is row (i, s) of the whole; a table's columns likewise."""
        read, rows, cols = self.access[op.a.name], len(op.outs), len(op.outs[0])
        for r, row in enumerate(op.outs):
            for s, value in enumerate(row):
                self.define(value, part(read, rows, r, cols if value.dims == ("C", "C") else 1, s))

    # -- results

    def write(self, argument, value: Value) -> None:
        """A gradient to its place, rows past the end left out."""
        name = f"d_{argument.name}_out"
        loops = tuple(zip("ij", (self.workspace.size(d) for d in value.dims)))
        index = [i for i, _ in loops]
        at = "row + i, h" if argument.per_token else "h, n"
        inside = "i < rows" if argument.per_token else ""
        rest = index[1:] if argument.per_token else index
        target = f"{name}[{', '.join((at, *rest))}]"
        entry = self.access[value.name](*index)
        if not argument.per_token and index == ["i"]:
            loops, target, entry = (("j", loops[0][1]),), f"{name}[h, n, j]", self.access[value.name]("j")
        self.block.add(Map(loops or (("j", 1),), ((target, entry),), where=inside, eq=f"gradient of {argument.name}"))


def lies_turned(value: Value) -> bool:
    """Whether a value's tile is its transpose: V channels as rows."""
    return value.dims == ("K", "V")


def part(read, rows: int, r: int, cols: int, s: int):
    """Access to one stream's part of interleaved rows (and columns)."""

    def access(row: str, *col: str) -> str:
        index = [f"({row}) * {rows} + {r}" if rows > 1 else row]
        index += [f"{c} * {cols} + {s}" if cols > 1 else c for c in col]
        return read(*index)

    return access
