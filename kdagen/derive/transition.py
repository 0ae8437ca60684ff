"""What a chunk makes of a state when no values are written: the homogeneous part of the scan, linear in the state."""

from __future__ import annotations

import dataclasses

from kdagen.ir.tensor import MatMul, Op, Program, Value, writes


def transition(program: Program) -> tuple[Op, ...]:
    """The scan's ops where all V-wide values that prepare made are zero; none at all where these only scale the state.

    A product with nothing left is zero too, and goes.
    """
    zero = {v for op in program.prepare for v in writes(op) if v.dims[1:] == ("V",)}
    ops: list[Op] = []
    for op in program.scan:
        if isinstance(op, MatMul):
            op = _without(op, zero)
            if not op.terms and not op.add:
                zero.add(op.out)
                continue
        ops.append(op)
    (last,) = (op for op in ops if op.out == program.next_state)
    return tuple(ops) if isinstance(last, MatMul) and last.terms else ()


def _without(op: MatMul, zero: set[Value]) -> MatMul:
    """A product's terms that are not zero."""
    terms, add = tuple(t for t in op.terms if t.b not in zero), None if op.add in zero else op.add
    if (terms, add) == (op.terms, op.add):
        return op
    left = ([add.name] if add else []) + [str(term) for term in terms]
    return dataclasses.replace(op, terms=terms, add=add, eq=f"{op.out.name} = {' + '.join(left)}")
