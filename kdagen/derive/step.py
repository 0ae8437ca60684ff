"""From the canonical form to the step form: the recurrence of one token, for decoding.

    r = S^T z, z decayed where its reader sees the decayed state
    p_r = scale (y + r + sum_s c_rs p_s)          o likewise          S' = decay S + sum_r x_r p_r^T

c_rs is the coefficient with which a reader sees a stream of its own token: x . z, or an explicit one. By it the output
is known from the state before the token. Where kdagen.derive.chunk speaks of C tokens at once, this speaks of one.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from kdagen.derive.chunk import used_arguments
from kdagen.derive.prepared import Prepare, indices
from kdagen.ir.canonical import Canonical, Intra, Reader
from kdagen.ir.step import Read, StepForm, Write
from kdagen.ir.tensor import Map, RowSum, Value


def step_form(canonical: Canonical) -> StepForm:
    """The step form of a recurrence."""
    return _Step(canonical).form()


class _Step:
    """Derives what each reader sees: the streams in their order, then the output."""

    def __init__(self, canonical: Canonical):
        self.canonical = canonical
        self.prepare = Prepare(used_arguments(canonical), rows=())
        self.operands: dict[Value, Value] = {}  # decayed z by z
        self.reads: dict[Value, Read] = {}  # by what meets the state
        self.sums: dict[tuple[Value, Value], Value] = {}
        self.values: list[Map] = []

    def form(self) -> StepForm:
        c, p = self.canonical, self.prepare
        self.decay = None if c.decay == 0 else p.token("decay", sympy.exp(c.decay), c.decay_axis)
        self.xs = [p.token(f"x{self.suffix(i)}", s.x, "K") for i, s in enumerate(c.streams)]
        self.ps: list[Value] = []
        for i, stream in enumerate(c.streams):
            self.ps.append(self.seen("p", self.suffix(i), stream.reader))
        out = self.seen("o", "_o", c.output)
        writes = tuple(map(Write, self.xs, self.ps))
        return StepForm(c, tuple(p.ops), tuple(self.reads.values()), tuple(self.values), self.decay, writes, out)

    def suffix(self, stream: int) -> str:
        return str(stream + 1) if len(self.canonical.streams) > 1 else ""

    def seen(self, name: str, suffix: str, reader: Reader) -> Value:
        """What a reader returns, given the pseudo-values so far."""
        terms = [*self.own_token(suffix, reader)]
        if not terms and not reader.reads:
            return self.prepare.token(name, reader.scale * reader.y, "V")
        if reader.reads:
            terms.append((sympy.S.One, [], self.read(suffix, reader)))
        if reader.y != 0:
            terms.append((sympy.S.One, [], self.prepare.token(f"y{suffix}", reader.y, "V")))
        scale, scales = self.scalar(f"scale{suffix}", reader.scale)
        expr = scale * sum(factor * value.symbol for factor, _, value in terms)
        if len(terms) == 1 and expr == terms[0][2].symbol:
            return terms[0][2]
        operands = dict.fromkeys([*scales, *(v for _, factors, value in terms for v in (*factors, value))])
        out = self.prepare.fresh(name + ("" if name == "o" else suffix), "V")
        self.values.append(Map(out, ("v",), expr, _indexed(operands), eq=f"{out.name} = {expr}"))
        return out

    def own_token(self, suffix: str, reader: Reader) -> Iterable[tuple[sympy.Expr, list[Value], Value]]:
        """The pseudo-values of the token itself that a reader sees: (coefficient, values in it, pseudo-value)."""
        for i, (p, intra) in enumerate(zip(self.ps, reader.intra)):
            if intra == Intra.GRAM:
                total = self.dot(self.xs[i], self.z(suffix, reader))
                yield total.symbol, [total], p
            elif intra != Intra.NONE:
                yield *self.scalar(f"c{suffix}{self.suffix(i)}", intra), p

    def scalar(self, name: str, expr: sympy.Expr) -> tuple[sympy.Expr, list[Value]]:
        """A scalar of the token as a factor, and the value behind it unless it is a number."""
        if expr.is_Number:
            return expr, []
        value = self.prepare.token(name, expr, "")
        return value.symbol, [value]

    def z(self, suffix: str, reader: Reader) -> Value:
        return self.prepare.token(f"z{suffix}", reader.z, "K")

    def read(self, suffix: str, reader: Reader) -> Value:
        """S^T z, once for each z."""
        z = self.decayed(self.z(suffix, reader)) if reader.after and self.decay else self.z(suffix, reader)
        if z not in self.reads:
            out = self.prepare.fresh(f"r{suffix}", "V")
            self.reads[z] = Read(out, z, f"{out.name} = S^T {z.name}")
        return self.reads[z].out

    def decayed(self, z: Value) -> Value:
        if z not in self.operands:
            out, expr = self.prepare.fresh(f"{z.name}_decayed", "K"), self.decay.symbol * z.symbol
            self.operands[z] = self.prepare.map(out, expr, (self.decay, z), f"{out.name} = {expr}")
        return self.operands[z]

    def dot(self, x: Value, z: Value) -> Value:
        """x . z, from values and not from their expressions: norms and the like are formed once."""
        if (x, z) not in self.sums:
            p, name = self.prepare, f"{x.name}_{z.name}"
            terms = p.map(p.fresh(f"{name}_terms", "K"), x.symbol * z.symbol, dict.fromkeys((x, z)), "")
            self.sums[x, z] = p.add(RowSum(p.fresh(name), terms, eq=f"{name} = {x.name} . {z.name}"))
        return self.sums[x, z]


def _indexed(operands: Iterable[Value]) -> tuple[tuple[Value, tuple[str, ...]], ...]:
    return tuple((v, indices(v)) for v in operands)
