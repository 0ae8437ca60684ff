"""From the canonical form to the chunk form: the tensor program of one chunk of one head.

    A_ij = q_i . (decay from j to i) x_j          L likewise, by the streams' own reads, j < i
    P = (I - L)^{-1} scale (Y + Z S + L_n Y_n)      S' = gamma S + X^T P + X_n^T Y_n      O = Q S + A P + A_n Y_n

Streams that read the state (or each other) enter the solve; the others (suffix _n) are known beforehand, P = Y.
Unlike the canonical form, which speaks of one token, this speaks of C at once. No recurrence is special here.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from kdagen.derive.prepared import Prepare, indices
from kdagen.ir.canonical import Argument, Canonical, Intra, Reader
from kdagen.ir.functions import axis_of
from kdagen.ir.tensor import (
    Decay,
    Gram,
    Interleave,
    Map,
    MatMul,
    Op,
    Program,
    SolveTril,
    Span,
    Term,
    Value,
)

SAME_TOKEN = sympy.KroneckerDelta(sympy.Symbol("i"), sympy.Symbol("j"))
STATE = Value("S", ("K", "V"))


def chunk_form(canonical: Canonical) -> Program:
    """The chunk form of a recurrence: what is prepared for all chunks at once, the step of the state, the output."""
    return _ChunkForm(canonical).program()


def rows(streams: int) -> str:
    """The row dimension of `streams` interleaved streams."""
    return "C" if streams == 1 else f"{streams}C"


class _ChunkForm:
    """Derives each matrix of the chunk form in turn."""

    def __init__(self, canonical: Canonical):
        self.canonical = canonical
        self.prepare = Prepare(used_arguments(canonical))
        self.solving = canonical.solving
        self.others = tuple(i for i in range(len(canonical.streams)) if i not in self.solving)
        self.rows = rows(len(self.solving))
        self.decays: dict[Span, Value] = {}

    def program(self) -> Program:
        c, p = self.canonical, self.prepare
        self.g = None if c.decay == 0 else p.token("log_decay", c.decay, c.decay_axis)
        self.x = [p.token(f"x{self.suffix(i)}", s.x, "K") for i, s in enumerate(c.streams)]
        self.passed = self.passed_stream()
        self.z = {r: p.token(f"z{self.suffix(r)}", self.reader(r).z, "K") for r in self.reading}
        self.gram = self.gram_matrices()
        scan, output = self.scan(), self.output()
        return Program(c, tuple(p.ops), scan, output, STATE, scan[-1].out, output[-1].out)

    # -- readers are numbered like the streams they belong to; the output is number -1

    def reader(self, r: int) -> Reader:
        return self.canonical.output if r < 0 else self.canonical.streams[r].reader

    @property
    def reading(self) -> list[int]:
        return [r for r in (*self.solving, -1) if self.reader(r).reads]

    def suffix(self, i: int) -> str:
        """Tells streams apart in names: nothing for the only one of its kind, else its number; others carry _n."""
        if i < 0:
            return "_o"
        kind, mark = (self.solving, "") if i in self.solving else (self.others, "_n" if self.solving else "")
        return mark + (str(kind.index(i) + 1) if len(kind) > 1 else "")

    def block_name(self, r: int, s: int) -> str:
        """A for the output's matrix, L for a stream's; then the suffixes of reader and stream."""
        return f"A{self.suffix(s)}" if r < 0 else f"L{self.suffix(r)}{self.suffix(s)}"

    # -- secondary matrices

    def gram_matrices(self) -> dict[tuple[int, int], Value]:
        """The products of all readers with all streams, decayed, one value a pair."""
        p, streams = self.prepare, range(len(self.canonical.streams))
        if not self.reading or not streams:
            return {}
        outs = {(r, s): p.fresh(self.gram_name(r, s), "C", "C") for r in self.reading for s in streams}
        p.add(Gram(
            outs=tuple(tuple(outs[r, s] for s in streams) for r in self.reading),
            readers=tuple(self.z[r] for r in self.reading),
            writers=tuple(self.x),
            g=self.g,
            after=tuple(self.reader(r).after for r in self.reading),
            diagonal=tuple(tuple(self.reader(r).intra[s] == Intra.GRAM for s in streams) for r in self.reading),
            eq="G_ij = sum_k z_ik x_jk" + (" exp(g_j+1 + .. + g_i)" if self.g else ""),
        ))  # fmt: skip
        return outs

    def gram_name(self, r: int, s: int) -> str:
        """The block's own name if the product is all there is to it, else one with G for the product."""
        name, scaled = self.block_name(r, s), (r < 0 or s in self.solving) and self.reader(r).scale != 1
        return f"G{name.removeprefix('L')}" if scaled or self.coefficient(r, s) != 0 else name

    def coefficient(self, r: int, s: int) -> sympy.Expr:
        """The explicit coefficient with which reader r sees stream s at its own token."""
        intra = self.reader(r).intra[s]
        own = sympy.S.Zero if isinstance(intra, Intra) else intra
        return own + self.passed.get(s, 0) if r < 0 else own

    def passed_stream(self) -> dict[int, sympy.Expr]:
        """The known stream that the output's skip term is a scalar multiple of: it joins the diagonal of A_n."""
        for s in self.others:
            known = self.reader(s).scale * self.reader(s).y
            factor = self.canonical.output.y / known
            if factor != 0 and axis_of(factor, self.prepare.axes) == "":
                return {s: factor}
        return {}

    def block(self, r: int, s: int, scale: sympy.Expr = sympy.S.One) -> Value:
        """scale_i (G_ij + coefficient on the diagonal): how reader r sees stream s within the chunk."""
        p, name = self.prepare, self.block_name(r, s)
        gram, coefficient = self.gram.get((r, s)), self.coefficient(r, s)
        if gram is not None and coefficient == 0 and scale == 1:
            return gram
        factor, factors = self.scalar(f"scale{self.suffix(r)}", scale)
        diagonal, diagonals = self.scalar(f"c_{name}", coefficient)
        expr = factor * ((gram.symbol if gram else 0) + diagonal * SAME_TOKEN)
        operands = dict.fromkeys(v for v in (gram, *factors, *diagonals) if v)
        rows = {v.symbol: sympy.Symbol(f"{v.name}_{'ij' if v == gram else 'i'}") for v in operands}
        return p.map(p.fresh(name, "C", "C"), expr, operands, f"{name}_ij = {expr.xreplace(rows)}")

    def scalar(self, name: str, expr: sympy.Expr) -> tuple[sympy.Expr, list[Value]]:
        """A scalar a token as a factor, and the value behind it unless it is a number."""
        if expr.is_Number:
            return expr, []
        value = self.prepare.token(name, expr, "")
        return value.symbol, [value]

    def stack(self, name: str, table: list[list[Value]]) -> Value:
        """Interleaves a table of per-stream parts token by token; one part stays as it is."""
        if len(table) == len(table[0]) == 1:
            return table[0][0]
        tail = table[0][0].dims[1:]
        columns = (rows(len(table[0])),) if tail == ("C",) else tail
        out = self.prepare.fresh(name, rows(len(table)), *columns)
        return self.prepare.add(
            Interleave(out, tuple(map(tuple, table)), eq=f"{name}: streams interleaved token by token")
        )

    # -- decayed operands

    def decay(self, span: Span) -> Value | None:
        """exp of the log decay over `span`, formed once; None if the state does not decay."""
        if self.g is None:
            return None
        if span not in self.decays:
            name, eq = DECAY_NAMES[span]
            dims = self.g.dims[1:] if span == Span.ALL else self.g.dims
            self.decays[span] = self.prepare.add(Decay(self.prepare.fresh(name, *dims), self.g, span, eq=eq))
        return self.decays[span]

    def decayed(self, name: str, value: Value, span: Span) -> Value:
        """The operand that meets the state at the chunk's start or end."""
        factor = self.decay(span)
        if factor is None:
            return value
        out = self.prepare.fresh(name, *value.dims)
        return self.prepare.map(
            out, value.symbol * factor.symbol, (value, factor), f"{name} = {value.name} {factor.name}"
        )

    def read_operand(self, name: str, r: int) -> Value:
        """scale z, decayed from the chunk's start; the streams' scale is left to the solve."""
        reader = self.reader(r)
        if not reader.reads:
            return self.prepare.token(name.lower(), sympy.S.Zero, "K")
        z = self.z[r]
        if r < 0 and reader.scale != 1:
            z = self.prepare.token("z_o", reader.scale * reader.z, "K")
        return self.decayed(name, z, Span.THROUGH if reader.after else Span.BEFORE)

    def write_operands(self) -> list[Value]:
        """The x, decayed to the chunk's end; those of solving streams stacked, first."""
        hats = [self.decayed(f"X{self.suffix(i)}", x, Span.REST) for i, x in enumerate(self.x)]
        stacked = [self.stack("X", [[hats[i]] for i in self.solving])] if self.solving else []
        return stacked + [hats[i] for i in self.others]

    # -- what reads the state

    def scan(self) -> tuple[Op, ...]:
        """R, P and the next state."""
        p = self.prepare
        self.known = [p.token(f"y{self.suffix(i)}", r.scale * r.y, "V") for i in self.others for r in (self.reader(i),)]
        solved = self.solve() if self.solving else []
        self.values = [op.out for op in solved[-1:]] + self.known
        products = tuple(Term(x, v, True) for x, v in zip(self.write_operands(), self.values, strict=True))
        decay, kept, eq = self.decay(Span.ALL), STATE, "S' = S"
        if decay is not None:
            operands = ((decay, indices(decay)), (STATE, indices(STATE)))
            kept, eq = Value("S_kept", STATE.dims), f"S' = {decay.name} S"
            solved.append(
                Map(kept, indices(STATE), decay.symbol * STATE.symbol, operands, eq=f"S_kept = {decay.name} S")
            )
        return (*solved, MatMul(Value("S_next", STATE.dims), products, kept, f"{eq} + {_sum_of_products(products)}"))

    def solve(self) -> list[Op]:
        """R = Y + Z S + L_n Y_n, what the solving streams see of all but each other; P = T scale R, T the inverse."""
        p, solving = self.prepare, self.solving
        lower = self.stack("L", [[self.block(r, s, self.reader(r).scale) for s in solving] for r in solving])
        inverse = self.scaled(p.add(SolveTril(p.fresh("T", *lower.dims), lower, eq=f"T = (I - {lower.name})^-1")))
        seen, y, ops = self.seen(), self.stacked_y(), []
        if seen:
            eq = f"R = {y.name + ' + ' if y else ''}{_sum_of_products(seen)}"
            ops.append(MatMul(Value("R", (self.rows, "V")), seen, y, eq))
        right = ops[-1].out if ops else y
        return [
            *ops,
            MatMul(Value("P", (self.rows, "V")), (Term(inverse, right),), None, f"P = {inverse.name} {right.name}"),
        ]

    def seen(self) -> tuple[Term, ...]:
        """Products by which the solving streams see the state, and the streams known beforehand."""
        found = []
        if any(self.reader(r).reads for r in self.solving):
            operands = [[self.read_operand(f"Z{self.suffix(r)}", r)] for r in self.solving]
            found.append(Term(self.stack("Z", operands), STATE))
        for s, y in zip(self.others, self.known, strict=True):
            found.append(Term(self.stack(f"L{self.suffix(s)}", [[self.block(r, s)] for r in self.solving]), y))
        return tuple(found)

    def stacked_y(self) -> Value | None:
        """Y of the solving streams; None if it is zero throughout."""
        if all(self.reader(r).y == 0 for r in self.solving):
            return None
        return self.stack(
            "Y", [[self.prepare.token(f"y{self.suffix(r)}", self.reader(r).y, "V")] for r in self.solving]
        )

    def scaled(self, inverse: Value) -> Value:
        """T with its columns scaled, so that it applies to R as it is."""
        p, scales = self.prepare, [self.reader(r).scale for r in self.solving]
        if all(s == 1 for s in scales):
            return inverse
        column = self.stack(
            "scale", [[p.token(f"scale{self.suffix(r)}", self.reader(r).scale, "")] for r in self.solving]
        )
        out, operands = p.fresh("Ts", *inverse.dims), ((inverse, ("i", "j")), (column, ("j",)))
        eq = f"{out.name}_ij = T_ij {column.name}_j"
        return p.add(Map(out, ("i", "j"), inverse.symbol * column.symbol, operands, eq=eq))

    def output(self) -> tuple[Op, ...]:
        """O = Q S + A P + A_n Y_n + skip."""
        p, reader, operands = self.prepare, self.canonical.output, []
        if reader.reads:
            operands.append(Term(self.read_operand("Q", -1), STATE))
        if self.solving:
            operands.append(
                Term(self.stack("A", [[self.block(-1, s, reader.scale) for s in self.solving]]), self.values[0])
            )
        operands += [Term(self.block(-1, s, reader.scale), v) for s, v in zip(self.others, self.known, strict=True)]
        skip = None if reader.y == 0 or self.passed else p.token("y_o", reader.scale * reader.y, "V")
        eq = "O = " + _sum_of_products(operands) + (f" + {skip.name}" if skip else "")
        return (MatMul(Value("O", ("C", "V")), tuple(operands), skip, eq),)


DECAY_NAMES = {
    Span.THROUGH: ("through", "exp(g_1 + .. + g_i)"),
    Span.BEFORE: ("before", "exp(g_1 + .. + g_i-1)"),
    Span.REST: ("rest", "exp(g_i+1 + .. + g_C)"),
    Span.ALL: ("gamma", "exp(g_1 + .. + g_C)"),
}


def _sum_of_products(terms: Iterable[Term]) -> str:
    return " + ".join(map(str, terms))


def used_arguments(canonical: Canonical) -> list[Argument]:
    """Arguments that the canonical form still mentions, in the order in which the user named them."""
    readers = [s.reader for s in canonical.streams] + [canonical.output]
    expressions = [canonical.decay, *(s.x for s in canonical.streams)]
    expressions += [e for r in readers for e in (r.y, r.z, r.scale, *r.intra) if isinstance(e, sympy.Basic)]
    used = set().union(*(sympy.sympify(e).free_symbols for e in expressions))
    return [a for a in canonical.arguments if a.symbol in used]
