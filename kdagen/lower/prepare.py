"""Prepare: everything of a chunk that does not read the state, as one block a (chunk, head).

Walks the prepare section of a tensor program op by op. Cheap elementwise values stay expressions and are
formed where they are used; what feeds a product, a sum or a serial loop is given a buffer.
"""

from __future__ import annotations

import math

import sympy

from kdagen.errors import ScheduleError
from kdagen.ir.canonical import Canonical
from kdagen.ir.tensor import (
    Decay,
    Gram,
    Interleave,
    Load,
    MatMul,
    Program,
    RowSum,
    SolveTril,
    Span,
    Value,
)
from kdagen.ir.tensor import (
    Map as TensorMap,
)
from kdagen.ir.tile import Buffer, Copy, Gemm, Kernel, Map, reads, writes
from kdagen.ir.tile import RowSum as TileRowSum
from kdagen.lower.block import Access, Block, element, shifted
from kdagen.lower.expression import tile_text
from kdagen.lower.gram import GramOperands, decayed, lower_gram
from kdagen.lower.rows import CHUNK_ROWS, KEY_HEAD, of_chunk
from kdagen.lower.solve import solve_tril
from kdagen.lower.workspace import Packed, Workspace, streams
from kdagen.schedule import DecayForm, Schedule

LOG2E = math.log2(math.e)


def argument_buffers(canonical: Canonical, dims: dict[str, int], dtypes: dict[str, str]) -> dict[str, Buffer]:
    """The global tensor of each argument, tokens of all sequences in a row."""
    found = {}
    for a in canonical.arguments:
        lead = ("T", canonical.heads(a)) if a.per_token else ("HV",)
        axis = (dims[a.axis],) if a.axis else ()
        found[a.name] = Buffer(f"{a.name}_in", (*lead, *axis), dtypes[a.name], "global", "argument")
    return found


def lower_prepare(program: Program, workspace: Workspace, schedule: Schedule, dtypes: dict[str, str]) -> Kernel:
    """The prepare kernel of a program under a schedule; `dtypes` gives each argument's dtype."""
    lowering = Prepare(program, workspace, schedule, dtypes)
    for op in program.prepare:
        lowering.lower(op)
    lowering.store()
    used = {name for s in lowering.block.statements for name in reads(s) | writes(s)}
    arguments = [b for b in lowering.arguments.values() if b.name in used]
    return Kernel(
        name=f"{program.canonical.name}_prepare",
        family="prepare",
        skeleton=schedule.prepare_skeleton,
        grid=(("n", "NC"), ("h", "HV")),
        threads=schedule.prepare_threads,
        stages=1,
        buffers=(*arguments, CHUNK_ROWS, *workspace.buffers(), *lowering.block.buffers.values()),
        lets=(*of_chunk(), KEY_HEAD),
        loads=(),
        body=tuple(lowering.block.statements),
        stores=(),
        chunk_size=schedule.chunk_size,
        wgmma=schedule.decay != DecayForm.TREE,  # whose many small products wait for each other
    )


class Prepare:
    """Lowering state: how each value is read, and the block under construction."""

    def __init__(self, program: Program, workspace: Workspace, schedule: Schedule, dtypes: dict[str, str]):
        self.ops, self.workspace, self.schedule = program.prepare, workspace, schedule
        self.chunk, self.dims, self.dtype = schedule.chunk_size, workspace.dims, workspace.dtype
        self.canonical, self.arguments = program.canonical, argument_buffers(program.canonical, self.dims, dtypes)
        self.block = Block()
        self.access: dict[str, Access] = {}
        self.dims_of: dict[str, tuple[str, ...]] = {}
        self.row_factor: dict[str, tuple[tuple[Value, tuple[str, ...]], ...]] = {}
        self.zero_past_end: set[str] = set()  # values whose rows past T are zero by themselves
        self.gates = {op.g.name for op in program.prepare if isinstance(op, Gram | Decay) and op.g}

    def lower(self, op) -> None:
        """Append one op's statements and record how its result is read."""
        {
            Load: self.load, TensorMap: self.map, RowSum: self.row_sum, Decay: self.decay, Gram: self.gram,
            Interleave: self.interleave, SolveTril: self.solve, MatMul: self.matmul,
        }[type(op)](op)  # fmt: skip

    def define(self, value: Value, access: Access) -> None:
        """Record how a value's elements are read."""
        self.access[value.name], self.dims_of[value.name] = access, value.dims

    # -- inputs and elementwise values

    def load(self, op: Load) -> None:
        a, name = op.argument, f"{op.argument.name}_in"
        if a.per_token:
            self.zero_past_end.add(op.out.name)
        if not a.per_token:
            self.define(op.out, lambda *index: f"{name}[{', '.join(('h', *index))}]")
        elif a.axis == "V":
            self.define(op.out, lambda i, j: self.guarded(i, f"T.cast({name}[row + {i}, h, {j}], 'float32')"))
        elif a.axis == "K":
            self.define(
                op.out, self.tile(self.arguments[a.name], op.eq, "hk" if self.canonical.heads(a) == "H" else "h")
            )
        else:
            read = self.guarded("i", f"T.cast({name}[row + i, h], 'float32')")
            self.keep(op.out, lambda i: read, op.eq, name=name)
        if op.out.name in self.gates:
            self.keep_gate(op.out, f"{op.eq}, in log2")

    def tile(self, source: Buffer, eq: str, head: str = "h") -> Access:
        """The chunk's rows of a tensor [T, heads, channels] in shared memory as they are, zeros past the end."""
        tile = self.block.shared(source.name, self.chunk, source.shape[2], dtype=source.dtype)
        zero = f"T.cast(0, '{source.dtype}')"
        entry = f"T.if_then_else(i < rows, {source.name}[row + i, {head}, j], {zero})"
        loops = (("i", self.chunk), ("j", source.shape[2]))
        self.block.add(Map(loops, ((f"{tile}[i, j]", entry),), eq=eq))
        return lambda i, j: f"T.cast({tile}[{i}, {j}], 'float32')"

    def guarded(self, row: str, text: str) -> str:
        """`text` where row lies in the chunk's sequence, else zero."""
        return f"T.if_then_else({row} < rows, {text}, 0.0)"

    def keep(self, value: Value, access: Access, eq: str, name: str = "") -> None:
        """Give a value a buffer in shared memory and read it from there."""
        self.define(value, element(self.fill(name or value.name, value.dims, access, eq)))

    def fill(self, name: str, dims: tuple[str, ...], access: Access, eq: str) -> str:
        """A shared buffer holding what `access` reads."""
        loops = tuple(zip("ij", (self.workspace.size(d) for d in dims)))
        index, name = [i for i, _ in loops], self.block.shared(name, *(n for _, n in loops))
        self.block.add(Map(loops, ((element(name)(*index), access(*index)),), eq=eq))
        return name

    def keep_gate(self, value: Value, eq: str) -> None:
        """Keep the log decay in log2, where exponentials are cheapest; a vector gate where its running sums will be.

        The value itself is still read as it was: other expressions may mention the gate.
        """
        access, name = self.access[value.name], "through" if value.dims == ("C", "K") else value.name
        self.fill(name, value.dims, lambda *index: f"{access(*index)} * {LOG2E}", eq)

    def map(self, op: TensorMap) -> None:
        expr = self.hoist(op) if op.out.dims == ("C", "K") else op.expr
        vanishes = self.vanishes(op)
        if op.zero_past_end or vanishes:
            self.zero_past_end.add(op.out.name)

        def access(*index: str) -> str:
            at = dict(zip(op.indices, index))
            symbols = {v.symbol: self.access[v.name](*(at[i] for i in ix)) for v, ix in self.operands(op)}
            symbols |= {sympy.Symbol(name): text for name, text in at.items()}
            text = tile_text(expr, symbols)
            text = f"({text})"
            return self.guarded(index[0], text) if op.zero_past_end and not vanishes else text

        self.define(op.out, access)
        if op.out.name in self.gates:
            self.keep_gate(op.out, op.eq)
        elif op.out.dims == ("C",) or (op.out.dims == ("C", "K") and not cheap(expr)):
            self.keep(op.out, access, op.eq)

    def operands(self, op: TensorMap) -> list[tuple[Value, tuple[str, ...]]]:
        """An op's operands, with the row factor that `hoist` made for it."""
        return [*op.operands, *self.row_factor.get(op.out.name, ())]

    def vanishes(self, op: TensorMap) -> bool:
        """Whether the expression is zero past the end by itself, because token inputs are zero there."""
        rows = {v.symbol: sympy.S.Zero for v, ix in op.operands if ix and v.name in self.zero_past_end}
        return op.expr.xreplace(rows) == 0  # all at once: 0 / 0 is no zero

    def hoist(self, op: TensorMap) -> sympy.Expr:
        """Move factors that depend on the row alone and are not cheap into a vector of their own."""
        vectors = {v.symbol: v for v, ix in op.operands if ix == op.indices[:1] or not ix}
        factors = [
            f
            for f in sympy.Mul.make_args(op.expr)
            if not cheap(f) and f.free_symbols <= set(vectors) and f.free_symbols
        ]
        rows = [f for f in factors if any(self.dims_of[vectors[s].name] == ("C",) for s in f.free_symbols)]
        if not rows:
            return op.expr
        vector = Value(f"{op.out.name}_scale", ("C",))
        product = sympy.Mul(*rows)
        used = tuple((v, ix) for v, ix in op.operands if v.symbol in product.free_symbols)
        self.map(TensorMap(vector, op.indices[:1], product, used, eq=f"row factor of {op.out.name}"))
        self.row_factor[op.out.name] = ((vector, op.indices[:1]),)
        return sympy.Mul(*(f for f in sympy.Mul.make_args(op.expr) if f not in rows)) * vector.symbol

    def row_sum(self, op: RowSum) -> None:
        if op.a.name in self.zero_past_end:
            self.zero_past_end.add(op.out.name)
        channels = self.workspace.size(op.a.dims[1])
        squares = self.block.fragment(f"{op.out.name}_terms", self.chunk, channels)
        total = self.block.fragment(f"{op.out.name}_sum", self.chunk)
        read = self.access[op.a.name]
        self.block.add(
            Map((("i", self.chunk), ("j", channels)), ((f"{squares}[i, j]", read("i", "j")),)),
            TileRowSum(total, squares, eq=op.eq),
        )
        self.keep(op.out, lambda i: f"{total}[{i}]", "")

    # -- decays and products

    def decay(self, op: Decay) -> None:
        scalar = self.dims_of[op.g.name] == ("C",)
        if op.span == Span.ALL:
            last = decayed("through", scalar, self.chunk)
            self.define(op.out, lambda *index: last(str(self.chunk - 1), *index))
        else:
            self.define(op.out, decayed(op.span.value, scalar, self.chunk))

    def gram(self, op: Gram) -> GramOperands:
        form = self.schedule.decay if op.g else DecayForm.NONE
        scalar = op.g is not None and self.dims_of[op.g.name] == ("C",)
        legal = {DecayForm.NONE} if not op.g else {DecayForm.SCALAR} if scalar else {DecayForm.TREE, DecayForm.FACTORED}
        if form not in legal:
            raise ScheduleError(
                f"decay form '{form.value}' does not fit: expected {' or '.join(sorted(f.value for f in legal))}"
            )
        operands = GramOperands(
            readers=tuple(self.access[v.name] for v in op.readers),
            writers=tuple(self.access[v.name] for v in op.writers),
            after=op.after,
            diagonal=any(map(any, op.diagonal)),
            g=self.gate(op.g),
            chunk=self.chunk,
            channels=self.dims["K"],
            dtype=self.dtype,
            own_before=any(any(kept) and not after for kept, after in zip(op.diagonal, op.after, strict=True)),
        )
        lower_gram(self.block, form, operands)
        for r, row in enumerate(op.outs):
            for s, out in enumerate(row):
                self.define(out, self.masked(r, s, op.diagonal[r][s]))
        return operands

    def gate(self, g: Value | None) -> str:
        """The buffer of log2 decays; a vector gate's holds running sums afterwards."""
        return "" if g is None else "through_s" if self.dims_of[g.name] == ("C", "K") else f"{g.name}_s"

    def masked(self, r: int, s: int, diagonal: bool) -> Access:
        """Entry of one secondary matrix: selected, never multiplied by zero, for the rest may be infinite."""
        c, order = self.chunk, "<=" if diagonal else "<"
        return lambda i, j: f"T.if_then_else({j} {order} {i}, gram_s[{shifted(r * c, i)}, {shifted(s * c, j)}], 0.0)"

    def interleave(self, op: Interleave) -> None:
        """Row (i, s) of the result is row i of part s; a table interleaves columns as well."""
        parts = [[self.access[v.name] for v in row] for row in op.parts]

        def access(row: str, *col: str) -> str:
            i, s = split(row, len(parts))
            if len(parts[0]) == 1:
                return choose([across[0](i, *col) for across in parts], s)
            j, t = split(*col, len(parts[0]))
            return choose([choose([p(i, j) for p in across], t) for across in parts], s)

        self.define(op.out, access)

    def solve(self, op: SolveTril) -> None:
        n = self.workspace.size(op.a.dims[0])
        matrix = self.stored(op.a)
        self.define(op.out, element(solve_tril(self.block, matrix, n)))

    def stored(self, value: Value) -> str:
        """The shared buffer of a matrix, formed now if it was an expression so far."""
        text = self.access[value.name]("i", "j")
        name = text.split("[")[0]
        if text == f"{name}[i, j]" and name in self.block.buffers:
            return name
        self.keep(value, self.access[value.name], value.name)
        return f"{value.name}_s"

    def matmul(self, op: MatMul) -> None:
        m, n = (self.workspace.size(d) for d in op.out.dims)
        acc = self.block.fragment(f"{op.out.name}_acc", m, n)
        for step, (a, b, trans_a, trans_b) in enumerate(op.terms):
            k = self.workspace.size(a.dims[0 if trans_a else 1])
            operands = self.stored(a), self.stored(b)
            self.block.add(Gemm(acc, *operands, (m, n, k), trans_a, trans_b, clear=step == 0, eq=op.eq))
        result = self.block.shared(op.out.name, m, n)
        self.block.add(Copy(result, acc))
        self.define(op.out, element(result))

    # -- what the scan will read

    def store(self) -> None:
        """Write every crossing value to its place in the workspace."""
        for name, place in self.workspace.packed.items():
            self.pack(name, place)
        if gamma := self.workspace.gamma:
            read = self.access[gamma.name]
            value = read("j") if gamma.dims == ("K",) else read()
            self.block.add(Map((("j", self.dims["K"]),), (("gamma_w[h, n, j]", value),), eq="e^(g_1 + .. + g_C)"))
        for parts in self.workspace.parts.values():
            for part in parts:
                if not part.is_argument:
                    loops = (("i", self.chunk), ("j", self.dims["V"]))
                    self.block.add(
                        Map(
                            loops,
                            ((f"{part.name}[h, n, i, j]", self.access[part.value.name]("i", "j")),),
                            eq=part.value.name,
                        )
                    )

    def pack(self, name: str, place: Packed) -> None:
        rows, cols = (streams(d) if d[-1] == "C" else 1 for d in self.dims_of[name])
        read, c = self.access[name], self.chunk
        for s in range(rows):
            row = f"i * {rows} + {s}" if rows > 1 else "i"
            for t in range(cols):
                col = f"j * {cols} + {t}" if cols > 1 else "j"
                width = place.cols // cols
                at = f"{place.buffer}[h, n, {shifted(place.row + s * c, 'i')}, {shifted(t * width, 'j')}]"
                self.block.add(Map((("i", c), ("j", width)), ((at, read(row, col)),), eq=name))


def cheap(expr: sympy.Expr) -> bool:
    """Whether forming an expression again costs no more than reading it."""
    return not expr.atoms(sympy.Function) and all(p.exp == 2 for p in expr.atoms(sympy.Pow))


def split(index: str, streams: int) -> tuple[str, str]:
    """Token and stream of an interleaved row index's text; constants where the text shows them."""
    if streams == 1:
        return index, "0"
    head, _, tail = index.rpartition(" + ")
    if tail.isdigit() and head.endswith(f" * {streams}"):
        return head[: -len(f" * {streams}")], tail
    return f"({index}) // {streams}", f"({index}) % {streams}"


def choose(options: list[str], which: str) -> str:
    """The option numbered by the text `which`."""
    if which.isdigit():
        return options[int(which)]
    *rest, last = options
    for number, text in reversed(list(enumerate(rest))):
        last = f"T.if_then_else({which} == {number}, {text}, {last})"
    return last
