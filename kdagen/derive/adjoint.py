"""The adjoint of a chunk form: reverse-mode differentiation of tensor IR, one rule a kind of op.

A rule takes an op and the cotangents of what it makes, and hands each operand its contribution. What is derived here
holds for every recurrence, for it sees ops and never a recurrence (Griewank and Walther, Evaluating Derivatives, 2008).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import sympy

from kdagen.derive.prepared import indices
from kdagen.ir.functions import inverse_or_zero
from kdagen.ir.tensor import (
    Adjoint,
    ColSum,
    Decay,
    Deinterleave,
    Gram,
    GramAdjoint,
    Interleave,
    Load,
    Map,
    MatMul,
    Op,
    Program,
    RowSum,
    SolveTril,
    Span,
    Spread,
    Term,
    Value,
    reads,
    writes,
)


def adjoint(program: Program, carried: Mapping[str, tuple[str, Span]] = MappingProxyType({})) -> Adjoint:
    """The backward of a program: what a chunk's results owe to what it was given.

    `carried` names the decayed operands, each with the operand and the span of its decay, whose cotangents a Gram's
    adjoint is to begin with: a backend that forms them together with the Gram need not take them apart first.
    """
    forward = program.prepare + program.scan + program.output
    tape = Tape(writes_of(forward) | {program.state}, carried)
    d_out, d_next = tape.fresh(program.out), tape.fresh(program.next_state)
    tape.give(program.out, d_out)
    tape.give(program.next_state, d_next)
    results = []
    for op in reversed(forward):
        if isinstance(op, Load):
            results.append((op.argument, tape.cotangent(op.out)))
        elif any(tape.owed(v) for v in writes(op)):
            RULES[type(op)](tape, op)
    d_state = tape.state(program.state)
    reverse = needed(tape.ops, {d_state})
    rest = needed([op for op in tape.ops if op not in reverse], {v for _, v in results})
    recompute = needed(
        [op for op in program.prepare + program.scan if program.next_state not in writes(op)],
        {v for op in (*reverse, *rest) for v in reads(op)},
    )
    return Adjoint(program, recompute, reverse, rest, d_out, d_next, d_state, tuple(reversed(results)))


Operands = dict[Value, tuple[str, ...]]  # values with their indices, as a Map has them


class Kept(NamedTuple):
    """Which sums over indices may be formed as one: of what shape, over what, with which factor afterwards."""

    dims: tuple[str, ...]
    indices: tuple[str, ...]
    left: tuple[str, ...]  # the indices that are not summed over
    outer: sympy.Expr
    zero_past_end: bool


@dataclass
class Owed:
    """What is known so far of a value's cotangent: products, values, elementwise expressions, and sums of such."""

    terms: list[Term] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    maps: list[tuple[sympy.Expr, Operands]] = field(default_factory=list)
    sums: dict[Kept, list[tuple[sympy.Expr, Operands]]] = field(default_factory=dict)
    spreads: list[tuple[Value, Span]] = field(default_factory=list)


class Tape:
    """Ops of the adjoint so far, and contributions to cotangents that are still being added up."""

    def __init__(self, known: Iterable[Value], carried: Mapping[str, tuple[str, Span]] = MappingProxyType({})):
        self.names = {v.name for v in known}
        self.carried = carried
        self.seeds: dict[tuple[str, Span], Value] = {}  # cotangents of carried operands
        self.ops: list[Op] = []
        self.open: dict[Value, Owed] = {}
        self.closed: dict[Value, Value] = {}

    def fresh(self, of: Value, suffix: str = "", dims: tuple[str, ...] | None = None) -> Value:
        """A new value named after the one whose cotangent it is or helps to form."""
        name = f"d_{of.name}{suffix}"
        while name in self.names:
            name += "_"
        self.names.add(name)
        return Value(name, of.dims if dims is None else dims)

    def add(self, op: Op) -> Value:
        """Append an op; returns its value."""
        self.ops.append(op)
        return getattr(op, "out", None)

    # -- contributions

    def owed(self, value: Value) -> Owed | None:
        return self.open.get(value) or self.closed.get(value)

    def give(self, to: Value, value: Value) -> None:
        """Contribute a value."""
        self.open.setdefault(to, Owed()).values.append(value)

    def product(self, to: Value, *term) -> None:
        """Contribute a product."""
        self.open.setdefault(to, Owed()).terms.append(Term(*term))

    def map(self, to: Value, expr: sympy.Expr, operands: Operands) -> None:
        """Contribute an expression, elementwise in the indices of `to`."""
        if expr != 0:
            self.open.setdefault(to, Owed()).maps.append((expr, operands))

    def spread(self, to: Value, value: Value, span: Span) -> None:
        """Contribute to each token's log decay the sum of the rows whose span holds it."""
        self.open.setdefault(to, Owed()).spreads.append((value, span))

    def sum(self, to: Value, op: Map, left: tuple[str, ...], expr: sympy.Expr, operands: Operands) -> None:
        """Contribute the sum of an expression in the indices of `op` over those that `to` lacks.

        Only what varies along them is summed; the other factors come after.
        """
        if expr == 0:
            return
        along = {v.symbol for v, at in operands.items() if set(at) - set(left)}
        along |= {sympy.Symbol(i) for i in op.indices}  # of a KroneckerDelta
        factors = sympy.Mul.make_args(expr)
        inner = sympy.Mul(*(f for f in factors if f.free_symbols & along))
        outer = sympy.Mul(*(f for f in factors if not f.free_symbols & along))
        past_end = op.zero_past_end and op.indices[0] not in left
        kept = Kept(op.out.dims, op.indices, left, outer, past_end)
        self.open.setdefault(to, Owed()).sums.setdefault(kept, []).append((inner, operands))

    def cotangent(self, value: Value) -> Value | None:
        """All contributions added up; None if there are none."""
        if value not in self.closed and (owed := self.open.pop(value, None)):
            self.closed[value] = self.total(value, owed)
        return self.closed.get(value)

    def so_far(self, value: Value) -> Value | None:
        """What has been contributed up to now, added up and no longer owed."""
        owed = self.open.pop(value, None)
        return self.total(value, owed, "_state") if owed else None

    def total(self, value: Value, owed: Owed, suffix: str = "") -> Value:
        for kept, parts in owed.sums.items():
            self.reduce(value, owed, kept, parts)
        self.add_spreads(value, owed)
        if owed.terms:
            alone = not (owed.values or owed.maps)
            out = self.fresh(value, suffix if alone else "_products")
            owed.values.append(self.add(MatMul(out, tuple(owed.terms), eq=f"cotangent of {value.name}")))
        return self.elementwise(value, owed, suffix)

    def elementwise(self, value: Value, owed: Owed, suffix: str = "") -> Value:
        if len(owed.values) == 1 and not owed.maps:
            return owed.values[0]
        operands = {v: indices(v) for v in owed.values}
        for _, more in owed.maps:
            operands |= more
        expr = sympy.Add(*(v.symbol for v in owed.values), *(e for e, _ in owed.maps))
        return self.elements(self.fresh(value, suffix), expr, operands, f"cotangent of {value.name}")

    def add_spreads(self, value: Value, owed: Owed) -> None:
        """One after another, on top of what came through the secondary matrices."""
        for terms, span in owed.spreads:
            add = owed.values.pop() if owed.values else None
            eq = "summed over the rows whose decay holds the token's"
            owed.values.append(self.add(Spread(self.fresh(value, f"_{span.value}"), terms, span, add, eq)))

    def reduce(self, value: Value, owed: Owed, kept: Kept, parts: list) -> None:
        """Form a sum over indices, and add it to what is owed."""
        expr, operands = sympy.Add(*(e for e, _ in parts)), {v: at for _, more in parts for v, at in more.items()}
        terms = self.fresh(value, "_terms", kept.dims)
        total = self.elements(terms, expr, operands, f"terms of d_{value.name}", kept.zero_past_end)
        left = list(kept.indices)
        for index in [i for i in reversed(kept.indices) if i not in kept.left]:
            last = index == left[-1]
            dims = total.dims[:-1] if last else total.dims[1:]
            total = self.add((RowSum if last else ColSum)(self.fresh(value, "_sum", dims), total, f"sum over {index}"))
            left.remove(index)
        if kept.outer == 1:
            owed.values.append(total)
        else:
            owed.maps.append((kept.outer * total.symbol, operands | {total: indices(total)}))

    def elements(self, out: Value, expr: sympy.Expr, operands: Operands, eq: str, zero_past_end: bool = False) -> Value:
        """Append a Map over the indices of `out`, of those operands that the expression holds."""
        used = tuple((v, ix) for v, ix in operands.items() if v.symbol in expr.free_symbols)
        return self.add(Map(out, indices(out), expr, used, zero_past_end, eq))

    def state(self, state: Value) -> Value:
        """The cotangent of the state before the chunk, made by an op of its own whatever the recurrence."""
        owed = self.open.pop(state, Owed())
        if not owed.terms and not owed.maps:  # nothing reads it, and it does not decay
            value = owed.values[0] if owed.values else None
            operands = {value: indices(value)} if value else {}
            return self.elements(self.fresh(state), value.symbol if value else sympy.S.Zero, operands, "state's")
        if not owed.terms:
            return self.elementwise(state, owed)
        add = self.elementwise(state, owed, "_kept") if owed.values or owed.maps else None
        return self.add(MatMul(self.fresh(state), tuple(owed.terms), add, f"cotangent of {state.name}"))


# -- rules


def differentiate_map(tape: Tape, op: Map) -> None:
    """d v = d_out * d expr / d v, summed over the indices that v lacks."""
    d_out = tape.cotangent(op.out)
    if op.out.name in tape.carried:
        tape.seeds[tape.carried[op.out.name]] = d_out
        return
    operands = {d_out: op.indices, **dict(op.operands)}
    for value, ix in op.operands:
        expr = d_out.symbol * derivative(op.expr, value.symbol)
        if ix == op.indices:
            tape.map(value, expr, operands)
        else:
            tape.sum(value, op, ix, expr, operands)


def differentiate_row_sum(tape: Tape, op: RowSum) -> None:
    """d a[i, k] = d out[i]."""
    d_out = tape.cotangent(op.out)
    tape.map(op.a, d_out.symbol, {d_out: indices(op.a)[:-1]})


def differentiate_decay(tape: Tape, op: Decay) -> None:
    """out = exp(sum of g over the span): d g[t] = sum of d_out * out over the rows whose span holds t."""
    d_out = tape.cotangent(op.out)
    expr, operands = d_out.symbol * op.out.symbol, {d_out: indices(op.out), op.out: indices(op.out)}
    if op.span == Span.ALL:
        ix = indices(op.g)[1:]
        tape.map(op.g, expr, {d_out: ix, op.out: ix})
        return
    terms = tape.elements(tape.fresh(op.out, "_g"), expr, operands, f"d_{op.out.name} {op.out.name}")
    tape.spread(op.g, terms, op.span)


def differentiate_gram(tape: Tape, op: Gram) -> None:
    """Products of the matrices' cotangents with the other side's operands, under the same decay."""
    d_outs = tuple(tuple(tape.cotangent(v) for v in row) for row in op.outs)
    adds = tuple(tuple(tape.so_far(v) for v in side) for side in (op.readers, op.writers, (op.g,) if op.g else ()))
    spans = [Span.THROUGH if after else Span.BEFORE for after in op.after], [Span.REST] * len(op.writers)
    seeds = tuple(
        tuple(tape.seeds.pop((v.name, span), None) for v, span in zip(values, side, strict=True))
        for values, side in zip((op.readers, op.writers), spans, strict=True)
    )
    made = GramAdjoint(
        op,
        d_outs,
        tuple(tape.fresh(z, "_gram") for z in op.readers),
        tuple(tape.fresh(x, "_gram") for x in op.writers),
        tape.fresh(op.g, "_gram") if op.g else None,
        adds,
        seeds if any(v for side in seeds for v in side) else ((), ()),
        eq="what the state gave, and through the secondary matrices",
    )
    tape.add(made)
    for value, part in zip((*op.readers, *op.writers), (*made.d_readers, *made.d_writers), strict=True):
        tape.give(value, part)
    if op.g:
        tape.give(op.g, made.d_g)


def differentiate_interleave(tape: Tape, op: Interleave) -> None:
    """Each part gets its own rows and columns back."""
    d_out = tape.cotangent(op.out)
    outs = tuple(tuple(tape.fresh(v, "_part") for v in row) for row in op.parts)
    tape.add(Deinterleave(outs, d_out, eq=f"d_{op.out.name}, stream by stream"))
    for row, parts in zip(op.parts, outs, strict=True):
        for value, part in zip(row, parts, strict=True):
            tape.give(value, part)


def differentiate_solve(tape: Tape, op: SolveTril) -> None:
    """out = (I - a)^-1: d a = out^T d_out out^T, of which only what lies below the diagonal means anything."""
    d_out, out = tape.cotangent(op.out), op.out
    half = tape.add(MatMul(tape.fresh(op.out, "_half"), (Term(out, d_out, True),), eq=f"{out.name}^T d_{out.name}"))
    tape.product(op.a, half, out, False, True)


def differentiate_matmul(tape: Tape, op: MatMul) -> None:
    """For a b: d a = d_out b^T, d b = a^T d_out; transposes accordingly."""
    d = tape.cotangent(op.out)
    for a, b, ta, tb in op.terms:
        tape.product(a, *((b, d, tb, True) if ta else (d, b, False, not tb)))
        tape.product(b, *((d, a, True, ta) if tb else (a, d, not ta, False)))
    if op.add:
        tape.give(op.add, d)


RULES = {
    Map: differentiate_map,
    RowSum: differentiate_row_sum,
    Decay: differentiate_decay,
    Gram: differentiate_gram,
    Interleave: differentiate_interleave,
    SolveTril: differentiate_solve,
    MatMul: differentiate_matmul,
}


# -- expressions


class _log(sympy.Function):
    """log with a derivative that is 0 at 0, where a decay of 0 has no finite one."""

    nargs = 1

    def fdiff(self, argindex=1):
        return inverse_or_zero(self.args[0])


def derivative(expr: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr:
    """d expr / d symbol, finite wherever a decay is: log'(0) is taken as 0."""
    return expr.replace(sympy.log, _log).diff(symbol).replace(_log, sympy.log)


# -- what is needed for what


def writes_of(ops: Iterable[Op]) -> set[Value]:
    return {v for op in ops for v in writes(op)}


def needed(ops: Iterable[Op], wanted: set[Value]) -> tuple[Op, ...]:
    """Those ops, in order, without which some wanted value could not be made."""
    found = []
    for op in reversed(list(ops)):
        if wanted & set(writes(op)):
            found.append(op)
            wanted = wanted | set(reads(op))
    return tuple(reversed(found))
