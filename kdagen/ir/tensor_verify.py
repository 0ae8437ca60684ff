"""What a legal tensor program is. Every pass that makes or changes one may call `verify`; the tests always do."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from kdagen.errors import KdagenError
from kdagen.ir.tensor import (
    Decay,
    Gram,
    Interleave,
    Load,
    Map,
    MatMul,
    Op,
    Program,
    RowSum,
    SolveTril,
    Span,
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
    for a, b, transposed in op.terms:
        if len(a.dims) != 2 or len(b.dims) != 2:
            _fail(f"{_named(op)} multiplies {_typed(a)} by {_typed(b)}", "expected two matrices")
        rows, inner = reversed(a.dims) if transposed else a.dims
        if inner != b.dims[0] or (rows, b.dims[1]) != op.out.dims:
            left = f"{_typed(a)}{'^T' if transposed else ''}"
            _fail(f"{_named(op)} multiplies {left} by {_typed(b)}", f"expected a product with dims of {_typed(op.out)}")
    if op.add is not None:
        _dims(op, op.add, *op.out.dims)


RULES = {
    Load: _load, Map: _map, RowSum: _row_sum, Decay: _decay, Gram: _gram,
    Interleave: _interleave, SolveTril: _solve, MatMul: _matmul,
}  # fmt: skip
