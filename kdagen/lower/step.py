"""The products of one chunk for one V tile: what the scans in both directions and the output kernel have in common.

What is carried from chunk to chunk is held transposed (v_tile x K, fp32, in registers), be it the state or its
cotangent: then every product has the V tile as its rows, for example
    R' = S' Z'     P' = Y' T' + R' T'     O' = S' Q' + P' A'     S' = S' . gamma + P' X
so that the left operand comes from registers and the right one from shared memory, for any chunk size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdagen.errors import KdagenError, ScheduleError
from kdagen.ir.tensor import Map as TensorMap
from kdagen.ir.tensor import MatMul, Op, Value
from kdagen.ir.tile import Copy, Gemm, Map, Statement, base
from kdagen.lower.block import Block
from kdagen.lower.expression import tile_text
from kdagen.lower.rows import Place
from kdagen.lower.workspace import Packed, Part, Workspace, operands
from kdagen.schedule import Schedule


@dataclass(frozen=True)
class Carried:
    """What goes from chunk to chunk: its name, the value that a chunk is given, the value that it hands on."""

    name: str
    given: Value
    made: Value

    @property
    def register(self) -> str:
        """The buffer that holds both."""
        return f"{self.name}_f"


@dataclass(frozen=True)
class Term:
    """One product of a MatMul: prepared matrix times a V-wide value, accumulated into `op.out`."""

    op: MatMul
    matrix: Value
    transpose: bool
    value: Value
    level: int  # how many products stand between the chunk's inputs and `value`


class Step:
    """Lowers the V-wide ops of one chunk: products ordered so that none waits for another that it does not need.

    `place` says where the chunk lies, `out` names a result that nothing else waits for. V-wide inputs lie as [rows, V]
    if the workspace or `parts` has them, as [V, rows] in shared memory already if they are `transposed`.
    """

    def __init__(
        self,
        workspace: Workspace,
        schedule: Schedule,
        ops: tuple[Op, ...],
        carried: Carried,
        place: Place,
        out: Value | None = None,
        parts: Mapping[str, tuple[Part, ...]] | None = None,
        transposed: tuple[str, ...] = (),
    ):
        self.workspace, self.carried, self.place, self.out = workspace, carried, place, out
        self.tile, self.dims, self.chunk = schedule.v_tile, workspace.dims, schedule.chunk_size
        self.parts = {**workspace.parts, **(parts or {})}
        self.transposed = set(transposed)
        self.block = Block()
        self.products = {op.out.name: op for op in ops if isinstance(op, MatMul)}
        self.maps = [op for op in ops if isinstance(op, TensorMap)]
        self.cast: set[str] = set()

    # -- ordering

    def level(self, value: Value) -> int:
        op = self.products.get(value.name)
        if op is None or value.name in self.transposed:
            return 0
        return 1 + max(self.level(term.b) for term in op.terms)

    def terms(self) -> list[Term]:
        """All products, ordered by how early their operand is ready; at equal level what is carried on comes last."""
        found = []
        for op in self.products.values():
            for a, b, transpose, _ in op.terms:
                found.append(Term(op, a, transpose, b, self.level(b)))
                inner = self.products.get(b.name)
                if inner and inner.add and b.name not in self.transposed:  # a (b + add) = a b + a add
                    found.append(Term(op, a, transpose, inner.add, self.level(inner.add)))
        return sorted(found, key=lambda t: (t.level, t.op.out == self.carried.made, t.op.out == self.out))

    # -- statements

    def lower(self, keep: Statement | None = None) -> list[Statement]:
        """The chunk's statements in order: casts just before first use, the decay just before the update.

        `keep` stores what is carried as the chunk found it: in the shadow of the first products, before anything waits.
        """
        started: set[str] = set()
        for term in self.terms():
            out = term.op.out
            if keep and (term.level or out == self.carried.made):
                self.block.add(keep)
                keep = None
            if out == self.carried.made and out.name not in started:
                self.decay()
            self.product(term, clear=out.name not in started and out != self.carried.made)
            started.add(out.name)
        return self.block.statements

    def accumulator(self, value: Value) -> str:
        if value in (self.carried.given, self.carried.made):
            return self.block.fragment(self.carried.name, self.tile, self.dims["K"])
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
        if value.name in self.parts:
            return self.given(value)
        if value.name in self.transposed:
            return f"{value.name}_s", False
        acc = self.accumulator(value)
        shape, name = self.block.buffers[acc].shape, f"{base(acc)[:-2]}b"
        operand = self.block.fragment(name, *shape, dtype=self.workspace.dtype)
        if name not in self.cast:
            self.cast.add(name)
            self.block.add(Copy(operand, acc))
        return operand, False

    def given(self, value: Value) -> tuple[str, bool]:
        """A V-wide operand from memory; of an argument, rows past the end are another sequence's and count as zero."""
        shared, parts = f"{value.name}_s", self.parts[value.name]
        if not any(part.is_argument for part in parts):
            return shared, True
        rows, name = len(parts) * self.chunk, f"{value.name}_b"
        if name not in self.cast:
            self.cast.add(name)
            operand, token = self.block.fragment(name, self.tile, rows, dtype=self.workspace.dtype), "j"
            if len(parts) > 1:
                token = f"j % {self.chunk}"
            zero = f"T.cast(0, '{self.workspace.dtype}')"
            entry = f"T.if_then_else({token} < {self.place.rows}, {shared}[j, i], {zero})"
            loops = (("i", self.tile), ("j", rows))
            self.block.add(Map(loops, ((f"{operand}[i, j]", entry),), eq=f"{value.name}^T, zero past the end"))
        return f"{name}_f", False

    def right(self, place: Packed) -> str:
        first, _ = self.rows(place.buffer)
        return f"{place.buffer[:-2]}_s[{place.row - first}:{place.row - first + place.rows}, 0:{place.cols}]"

    def decay(self) -> None:
        """What is carried, scaled by the chunk's whole decay, if there is one."""
        register = f"{self.carried.register}[i, j]"
        for op in self.maps:
            if self.carried.given in operands(op):
                index = dict(zip(op.indices, ("j", "i")))
                symbols = {v.symbol: self.read(v, [index[i] for i in ix]) for v, ix in op.operands}
                loops = (("i", self.tile), ("j", self.dims["K"]))
                self.block.add(Map(loops, ((register, tile_text(op.expr, symbols)),), eq=op.eq))

    def read(self, value: Value, index: list[str]) -> str:
        if value == self.carried.given:
            return f"{self.carried.register}[i, j]"
        if value == self.workspace.gamma:
            return "gamma_s[j]"
        raise KdagenError(f"a scan may scale its state by the chunk's decay only, not by '{value.name}'")

    # -- what the chunk needs from global memory

    def rows(self, buffer: str) -> tuple[int, int]:
        """The rows of a packed workspace that this kernel's products use."""
        used = {t.matrix.name for t in self.terms()}
        places = [p for name, p in self.workspace.packed.items() if p.buffer == buffer and name in used]
        return min(p.row for p in places), max(p.row + p.rows for p in places)

    def loads(self) -> list[Statement]:
        """Copies of the chunk into shared memory."""
        used = {t.matrix.name for t in self.terms()}
        copies: list[Statement] = []
        for buffer in dict.fromkeys(p.buffer for name, p in self.workspace.packed.items() if name in used):
            first, end = self.rows(buffer)
            cols = next(p.cols for p in self.workspace.packed.values() if p.buffer == buffer)
            tile = self.block.shared(buffer[:-2], end - first, cols, dtype=self.workspace.dtype)
            copies.append(Copy(tile, f"{buffer}[h, {self.place.slot}, {first}:{end}, 0:{cols}]"))
        for value in self.v_operands():
            copies += self.load_parts(value)
        if any(self.workspace.gamma in operands(op) for op in self.maps):
            copies.append(
                Copy(self.block.shared("gamma", self.dims["K"]), f"gamma_w[h, {self.place.slot}, 0:{self.dims['K']}]")
            )
        return copies

    def v_operands(self) -> list[Value]:
        """V-wide inputs in use, the skip term included."""
        values = [t.value for t in self.terms()]
        values += [op.add for op in self.products.values() if op.add]
        return list({v.name: v for v in values if v.name in self.parts}.values())

    def load_parts(self, value: Value) -> list[Statement]:
        c, parts, (slot, row, _) = self.chunk, self.parts[value.name], self.place
        if len(parts) > 1 and self.tile > 64:  # a wider tile is laid out in halves, which one copy cannot fill by rows
            raise ScheduleError(f"v_tile {self.tile}: {len(parts)} streams are stacked in '{value.name}', expected 64")
        tile = self.block.shared(value.name, len(parts) * c, self.tile, dtype=self.workspace.dtype)
        columns = self.columns
        copies = []
        for s, part in enumerate(parts):
            source = (
                f"{part.name}_in[{row}:{row} + {c}, h, {columns}]" if part.is_argument
                else f"{part.name}[h, {slot}, 0:{c}, {columns}]"
            )  # fmt: skip
            copies.append(Copy(f"{tile}[{s * c}:{(s + 1) * c}, 0:{self.tile}]" if len(parts) > 1 else tile, source))
        return copies

    # -- what it leaves there

    @property
    def columns(self) -> str:
        """The tile's own channels."""
        return f"tile * {self.tile}:tile * {self.tile} + {self.tile}"

    def whole(self, assign: tuple[str, str], **fields) -> Map:
        """A Map over the carried tile, i counting its value channels and j its keys."""
        self.accumulator(self.carried.given)
        return Map((("i", self.tile), ("j", self.dims["K"])), (assign,), **fields)

    def read_from(self, state: str, eq: str) -> Map:
        """Fill the carried tile from a tensor of states."""
        value = f"T.cast({self.element(f'{state}[b')}, 'float32')"
        return self.whole((f"{self.carried.register}[i, j]", value), eq=eq)

    def write_to(self, state: str, **fields) -> Map:
        """Write the carried tile to a tensor of states."""
        return self.store(f"{state}[b", **fields)

    def store(self, place: str, **fields) -> Map:
        """Write the carried tile to a slot of a tensor of states: "states[slot"."""
        value = f"T.cast({self.carried.register}[i, j], '{self.workspace.state.dtype}')"
        return self.whole((self.element(place), value), **fields)

    def element(self, place: str) -> str:
        return f"{place}, h, {self.workspace.state.index('j', f'tile * {self.tile} + i')}]"

    def keep(self, workspace: str, slot: str, **fields) -> Map:
        """Store what is carried, transposed as it is, in a slot of a workspace [HV, slots, V, K]."""
        value = f"T.cast({self.carried.register}[i, j], '{self.workspace.dtype}')"
        return self.whole((f"{workspace}[h, {slot}, tile * {self.tile} + i, j]", value), **fields)
