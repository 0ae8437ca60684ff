"""What a legal tensor program is. Every pass that makes or changes one may call `verify`; the tests always do."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from kdagen.errors import KdagenError
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
    Value,
    reads,
    writes,
)


def verify(program: Program) -> Program:
    """The program itself, if legal; raises KdagenError naming the op otherwise."""
    known: dict[str, Value] = {}
    for op in program.prepare:
        _check(op, known, f"prepare must not read the state '{program.state.name}'", {program.state.name})
    known[program.state.name] = program.state
    for op in program.scan:
        _no_prepare_op(op)
        _check(op, known)
    for op in program.output:
        _no_prepare_op(op)
        _check(op, known, f"output must not read the next state '{program.next_state.name}'", {program.next_state.name})
    for result, section in ((program.next_state, program.scan), (program.out, program.output)):
        if result not in [op.out for op in section]:
            _fail(
                f"'{result.name}' is never made",
                f"expected an op that makes {_typed(result)} where the program says so",
            )
    if program.next_state.dims != program.state.dims:
        _fail(f"the next state is {_typed(program.next_state)}", f"expected the dims of {_typed(program.state)}")
    return program


def verify_adjoint(adjoint: Adjoint) -> Adjoint:
    """The adjoint itself, if legal: the scan's part reads no state and no other part of the backward."""
    program, known = adjoint.forward, {}
    given = (program.state, adjoint.d_out, adjoint.d_next_state)
    known |= {v.name: v for v in given}
    for op in adjoint.recompute:
        _check(op, known)
    state = f"the reverse scan must not read the state '{program.state.name}'"
    for op in adjoint.reverse:
        _no_prepare_op(op)
        _check(op, known, state, {program.state.name})
    for op in adjoint.gradients:
        _check(op, known)
    for argument, value in adjoint.results:
        if value is not None and known.get(value.name) != value:
            _fail(f"the gradient of {argument.name} is '{value.name}'", "expected a value that is made")
    return adjoint


def _fail(written: str, expected: str):
    raise KdagenError(f"tensor program: {written}: {expected}")


def _typed(value: Value) -> str:
    return f"{value.name}[{', '.join(value.dims)}]"


def _check(op: Op, known: dict[str, Value], why: str = "", forbidden: Iterable[str] = ()) -> None:
    """Operands defined as they are used, nothing assigned twice, dims that agree."""
    for value in reads(op):
        if value.name in forbidden:
            _fail(f"{_named(op)} reads '{value.name}'", why)
        if known.get(value.name) != value:
            found = f"it is {_typed(known[value.name])}" if value.name in known else "it is not yet made"
            _fail(f"{_named(op)} reads {_typed(value)}", f"expected a value made before, with these dims; {found}")
    RULES[type(op)](op)
    for value in writes(op):
        if value.name in known:
            _fail(f"{_named(op)} makes '{value.name}' again", "expected a name that is assigned once")
        known[value.name] = value


def _named(op: Op) -> str:
    return f"{type(op).__name__} of {', '.join(v.name for v in writes(op))}"


def _no_prepare_op(op: Op) -> None:
    if not isinstance(op, Map | MatMul):
        _fail(f"{_named(op)} outside prepare", "expected scan and output to hold Map and MatMul only")


def _dims(op: Op, value: Value, *expected: str) -> None:
    if value.dims != expected:
        _fail(f"{_named(op)} has {_typed(value)}", f"expected dims ({', '.join(expected)})")


def _load(op: Load) -> None:
    axis = (op.argument.axis,) if op.argument.axis else ()
    _dims(op, op.out, *(("C",) if op.argument.per_token else ()), *axis)


def _map(op: Map) -> None:
    if len(op.indices) != len(op.out.dims):
        _fail(f"{_named(op)} has indices {op.indices}", f"expected one for each dim of {_typed(op.out)}")
    size = dict(zip(op.indices, op.out.dims, strict=True))
    for value, indices in op.operands:
        if [size.get(i) for i in indices] != list(value.dims) or sorted(indices, key=op.indices.index) != list(indices):
            _fail(
                f"{_named(op)} reads {_typed(value)} at ({', '.join(indices)})",
                f"expected the indices of its dims among {size}, in order",
            )
    symbols = {v.symbol for v, _ in op.operands} | {sympy.Symbol(i) for i in op.indices}
    if unknown := op.expr.free_symbols - symbols:
        _fail(f"{_named(op)} has '{op.expr}'", f"expected operands for {', '.join(sorted(map(str, unknown)))}")


def _row_sum(op: RowSum) -> None:
    _dims(op, op.out, *op.a.dims[:-1])


def _col_sum(op: ColSum) -> None:
    _dims(op, op.out, *op.a.dims[1:])


def _spread(op: Spread) -> None:
    _gate(op, op.a)
    for value in filter(None, (op.out, op.add)):
        _dims(op, value, *op.a.dims)
    if op.span == Span.ALL:
        _fail(f"{_named(op)} spreads over the whole chunk", "expected a span that depends on the row")


def _decay(op: Decay) -> None:
    _gate(op, op.g)
    _dims(op, op.out, *(op.g.dims[1:] if op.span == Span.ALL else op.g.dims))


def _gate(op: Op, g: Value) -> None:
    if g.dims not in (("C", "K"), ("C",)):
        _fail(f"{_named(op)} decays by {_typed(g)}", "expected one rate a key channel (C, K) or one a head (C)")


def _gram(op: Gram) -> None:
    for value in op.readers + op.writers:
        _dims(op, value, "C", "K")
    for value in writes(op):
        _dims(op, value, "C", "C")
    if op.g is not None:
        _gate(op, op.g)
    for what, table in (("outs", op.outs), ("diagonal", op.diagonal)):
        if len(table) != len(op.readers) or any(len(row) != len(op.writers) for row in table):
            _fail(
                f"{_named(op)} has {what} {tuple(map(len, table))}",
                f"expected {len(op.readers)} rows of {len(op.writers)}",
            )
    if len(op.after) != len(op.readers):
        _fail(f"{_named(op)} has {len(op.after)} flags 'after'", f"expected one for each of {len(op.readers)} readers")


def _gram_adjoint(op: GramAdjoint) -> None:
    gram = op.gram
    for given, wanted in ((op.d_readers, gram.readers), (op.d_writers, gram.writers)):
        if len(given) != len(wanted):
            _fail(f"{_named(op)} has {len(given)} cotangents", f"expected one for each of {len(wanted)} operands")
        for d, value in zip(given, wanted, strict=True):
            _dims(op, d, *value.dims)
    gate = gram.g.dims if gram.g else ()
    for values, dims in ((op.d_outs, ("C", "C")), ((*op.adds[:2], *op.seeds), ("C", "K")), (op.adds[2:], gate)):
        for value in (v for row in values for v in row if v):
            _dims(op, value, *dims)
    if (op.d_g is None) != (gram.g is None):
        _fail(f"{_named(op)} has d_g {op.d_g}", "expected a cotangent of the log decay where there is one")
    if op.d_g:
        _dims(op, op.d_g, *gram.g.dims)


def _deinterleave(op: Deinterleave) -> None:
    _interleave(Interleave(op.a, op.outs))


def _interleave(op: Interleave) -> None:
    if len({len(row) for row in op.parts}) != 1:
        _fail(f"{_named(op)} has rows of unequal length", "expected a full table of parts")
    part, streams = op.parts[0][0], (len(op.parts), len(op.parts[0]))
    for row in op.parts:
        for value in row:
            _dims(op, value, *part.dims)
    tail = (_rows(streams[1]),) if part.dims[1:] == ("C",) else part.dims[1:]
    _dims(op, op.out, _rows(streams[0]), *tail)


def _rows(streams: int) -> str:
    return "C" if streams == 1 else f"{streams}C"


def _solve(op: SolveTril) -> None:
    if len(op.a.dims) != 2 or op.a.dims[0] != op.a.dims[1] or not op.a.dims[0].endswith("C"):
        _fail(f"{_named(op)} solves {_typed(op.a)}", "expected a square matrix of rows by rows")
    _dims(op, op.out, *op.a.dims)


def _matmul(op: MatMul) -> None:
    if not op.terms:
        _fail(f"{_named(op)} has no product", "expected at least one term")
    for a, b, transpose_a, transpose_b in op.terms:
        if len(a.dims) != 2 or len(b.dims) != 2:
            _fail(f"{_named(op)} multiplies {_typed(a)} by {_typed(b)}", "expected two matrices")
        rows, inner = reversed(a.dims) if transpose_a else a.dims
        same, cols = reversed(b.dims) if transpose_b else b.dims
        if inner != same or (rows, cols) != op.out.dims:
            left, right = f"{_typed(a)}{'^T' * transpose_a}", f"{_typed(b)}{'^T' * transpose_b}"
            _fail(f"{_named(op)} multiplies {left} by {right}", f"expected a product with dims of {_typed(op.out)}")
    if op.add is not None:
        _dims(op, op.add, *op.out.dims)


RULES = {
    Load: _load, Map: _map, RowSum: _row_sum, ColSum: _col_sum, Decay: _decay, Spread: _spread, Gram: _gram,
    GramAdjoint: _gram_adjoint, Interleave: _interleave, Deinterleave: _deinterleave, SolveTril: _solve,
    MatMul: _matmul,
}  # fmt: skip
