"""What does not read the state, under construction: each expression becomes a value once, under a unique name.

kdagen.derive.chunk says which expressions a chunk needs, kdagen.derive.step which a token; here they are broken into
ops.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from kdagen.ir.canonical import Argument
from kdagen.ir.functions import ChannelSum, axis_of
from kdagen.ir.tensor import Load, Map, Op, RowSum, Value

INDEX = {"C": "i", "K": "k", "V": "v"}
RESERVED = ("S", "S_kept", "S_next", "R", "P", "O")  # values of scan and output


class Prepare:
    """Ops so far, arguments loaded first. What differs from token to token has the dims `rows` before its own."""

    def __init__(self, arguments: Iterable[Argument], rows: tuple[str, ...] = ("C",)):
        self.ops: list[Op] = []
        self.rows = rows
        self.names = set(RESERVED)
        self.made: dict[sympy.Expr, Value] = {}
        self.loads: dict[sympy.Symbol, Value] = {}
        self.axes = {a.symbol: a.axis for a in arguments}
        for a in arguments:
            dims = (*(rows if a.per_token else ()), *filter(None, (a.axis,)))
            self.loads[a.symbol] = self.add(Load(self.fresh(a.name, *dims), a, eq=a.name))

    def add(self, op: Op) -> Value:
        """Append an op; returns its value (a Gram has several)."""
        self.ops.append(op)
        return getattr(op, "out", None)

    def fresh(self, name: str, *dims: str) -> Value:
        """A value that is not yet computed; a taken name gets a trailing underscore."""
        while name in self.names:
            name += "_"
        self.names.add(name)
        return Value(name, dims)

    def token(self, name: str, expr: sympy.Expr, axis: str) -> Value:
        """A value a token (and channel of `axis`), zero past the sequence's end."""
        expr, dims = sympy.sympify(expr), (*self.rows, *filter(None, (axis,)))
        if expr in self.loads and self.loads[expr].dims == dims:
            return self.loads[expr]
        if (expr, dims) not in self.made:
            opposite = self.made.get((-expr, dims))
            lowered, operands = (-opposite.symbol, [opposite]) if opposite else self.without_sums(expr)
            if operands and operands[0].dims == dims and lowered == operands[0].symbol:
                return operands[0]
            out = self.fresh(name, *dims)
            self.made[expr, dims] = self.map(out, lowered, operands, f"{out.name} = {expr}", bool(self.rows))
        return self.made[expr, dims]

    def map(
        self, out: Value, expr: sympy.Expr, operands: Iterable[Value], eq: str, zero_past_end: bool = False
    ) -> Value:
        """An elementwise op whose operands are indexed by their own dims."""
        indexed = tuple((v, indices(v)) for v in operands)
        return self.add(Map(out, indices(out), expr, indexed, zero_past_end, eq))

    def without_sums(self, expr: sympy.Expr) -> tuple[sympy.Expr, list[Value]]:
        """The expression over values alone, each outermost channel sum made a value first; and those values."""
        sums = {s: self.channel_sum(s).symbol for s in _outermost_sums(expr)}
        values = {v.symbol: v for v in (*self.loads.values(), *self.made.values())}
        lowered = expr.xreplace(sums).xreplace({s: v.symbol for s, v in self.loads.items()})
        return lowered, [values[s] for s in sorted(lowered.free_symbols, key=str)]

    def channel_sum(self, total: ChannelSum) -> Value:
        """The row sums of a channel sum's terms."""
        if total not in self.made:
            terms = total.args[0]
            axis = axis_of(terms, self.axes)
            number = 1 + sum(isinstance(e, ChannelSum) for e in self.made)
            a, out = self.token(f"terms{number}", terms, axis), self.fresh(f"sum{number}", *self.rows)
            self.made[total] = self.add(RowSum(out, a, eq=f"sum over {axis} of {terms}"))
        return self.made[total]


def indices(value: Value) -> tuple[str, ...]:
    """Index names for a value's dims; square matrices get i and j."""
    row, *rest = [INDEX.get(d, "i") for d in value.dims] or [""]
    return tuple(filter(None, (row, *("j" if r == row else r for r in rest))))


def _outermost_sums(expr: sympy.Expr) -> set[ChannelSum]:
    if isinstance(expr, ChannelSum):
        return {expr}
    return set().union(*(_outermost_sums(a) for a in expr.args))
