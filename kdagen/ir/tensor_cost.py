"""What a tensor program costs: FLOPs and bytes as sympy formulas in C, K and V, a token a head.

Counted as the algorithm needs them, whatever the hardware: a product of m x k by k x n is 2 m k n FLOPs, masked
triangles included; substitution in n unknowns n^3 / 3; each function or operation on an element is one FLOP.
Multiply by B, H and T for a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy

from kdagen.ir.tensor import (
    Adjoint,
    ColSum,
    Decay,
    Gram,
    GramAdjoint,
    Load,
    Map,
    MatMul,
    Op,
    Program,
    RowSum,
    SolveTril,
    Spread,
    Value,
    reads,
    writes,
)

C, K, V = sympy.symbols("C K V", positive=True)
OPERAND_BYTES = 2  # bfloat16 or float16
STATE_BYTES = 4  # fp32: states and gamma


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes, a token a head."""

    products: sympy.Expr
    solve: sympy.Expr
    elementwise: sympy.Expr
    inputs: sympy.Expr  # bytes that any implementation reads: each argument once
    outputs: sympy.Expr
    prepare: sympy.Expr  # bytes moved by kernels that store their operands: prepare, ..
    scan: sympy.Expr  # .. scan, when it stores states for the output ..
    output: sympy.Expr  # .. the output from them ..
    fused: sympy.Expr  # .. or scan and output in one

    @property
    def flops(self) -> sympy.Expr:
        return sympy.expand(self.products + self.solve + self.elementwise)

    @property
    def least_bytes(self) -> sympy.Expr:
        return self.inputs + self.outputs

    @property
    def stored_bytes(self) -> sympy.Expr:
        """Traffic of prepare and a fused scan."""
        return sympy.expand(self.prepare + self.fused)


def cost(program: Program) -> Cost:
    """The cost of a program."""
    ops = program.prepare + program.scan + program.output
    total = {kind: sum((f(op) for op in ops), sympy.S.Zero) / C for kind, f in COUNTS.items()}
    loads = {op.out: op.argument for op in program.prepare if isinstance(op, Load)}
    tokens = {v for v, a in loads.items() if a.per_token}  # parameters of the head are read once: nothing a token
    made = {v for op in program.prepare for v in writes(op)} - loads.keys()
    scan, output = _read(program.scan) & (tokens | made), _read(program.output) & (tokens | made)
    states = {v for op in program.scan for v in writes(op)} & _read(program.output) | {program.state}
    traffic = {
        "inputs": tokens,
        "outputs": {program.out},
        "prepare": _read(program.prepare) & tokens | (scan | output) & made,
        "scan": scan | states,
        "output": output | states | {program.out},
        "fused": scan | output | {program.out},
    }
    return Cost(**{n: sympy.expand(e) for n, e in (total | {n: bytes_of(v) for n, v in traffic.items()}).items()})


@dataclass(frozen=True)
class BackwardCost:
    """FLOPs and bytes of an adjoint, a token a head; FLOPs of each section and of each kind add up to the same."""

    recompute: sympy.Expr
    reverse: sympy.Expr
    gradients: sympy.Expr
    products: sympy.Expr
    solve: sympy.Expr
    elementwise: sympy.Expr
    least_bytes: sympy.Expr  # each argument and the output's cotangent read once, each gradient written once

    @property
    def flops(self) -> sympy.Expr:
        return sympy.expand(self.recompute + self.reverse + self.gradients)


def backward_cost(adjoint: Adjoint) -> BackwardCost:
    """The cost of an adjoint."""
    sections = {name: getattr(adjoint, name) for name in ("recompute", "reverse", "gradients")}
    ops = [op for section in sections.values() for op in section]
    kinds = {kind: sum((f(op) for op in ops), sympy.S.Zero) / C for kind, f in COUNTS.items()}
    flops = {
        name: sum((f(op) for op in section for f in COUNTS.values()), sympy.S.Zero) / C
        for name, section in sections.items()
    }
    tokens = [op.out for op in adjoint.recompute if isinstance(op, Load) and op.argument.per_token]
    written = [value for argument, value in adjoint.results if value and argument.per_token]
    moved = bytes_of([*tokens, adjoint.d_out, *written])
    return BackwardCost(**{n: sympy.expand(e) for n, e in (flops | kinds | {"least_bytes": moved}).items()})


def size(value: Value) -> sympy.Expr:
    """Elements of a value, for one chunk of one head."""
    extents = {"C": C, "K": K, "V": V}
    return sympy.prod(extents.get(d) or int(d[:-1]) * C for d in value.dims)


def bytes_of(values: Iterable[Value]) -> sympy.Expr:
    """Bytes a token: operands a token in half precision, what there is one of a chunk in fp32."""
    widths = ((size(v), OPERAND_BYTES if any(d.endswith("C") for d in v.dims) else STATE_BYTES) for v in values)
    return sum((n * width for n, width in widths), sympy.S.Zero) / C


def _read(ops: Iterable[Op]) -> set[Value]:
    return {v for op in ops for v in reads(op)}


def products(op: Op) -> sympy.Expr:
    """FLOPs in matrix products."""
    if isinstance(op, Gram):
        return 2 * C**2 * K * len(op.readers) * len(op.writers)
    if isinstance(op, GramAdjoint):  # each matrix with its columns' operand, and transposed with its rows'
        return 4 * C**2 * K * sum(v is not None for row in op.d_outs for v in row)
    if not isinstance(op, MatMul):
        return sympy.S.Zero
    inner = (Value("", (t.a.dims[0 if t.transpose_a else 1],)) for t in op.terms)
    return sum((2 * size(op.out) * size(k) for k in inner), sympy.S.Zero)


def solve(op: Op) -> sympy.Expr:
    """FLOPs in triangular solves."""
    return size(Value("", op.a.dims[:1])) ** 3 / 3 if isinstance(op, SolveTril) else sympy.S.Zero


def elementwise(op: Op) -> sympy.Expr:
    """FLOPs element by element."""
    match op:
        case Map():
            return op.expr.count_ops() * size(op.out)
        case RowSum() | ColSum():
            return size(op.a)
        case Spread():
            return size(op.a) + (size(op.out) if op.add else 0)
        case GramAdjoint():  # operands times their cotangents, summed over spans of tokens; what is added to
            spans = sum((2 * size(v) for v in (*op.d_readers, *op.d_writers)), size(op.d_g)) if op.d_g else 0
            return spans + sum((size(v) for side in op.adds for v in side if v), sympy.S.Zero)
        case Decay():
            return 2 * size(op.out)  # a sum and an exponential
        case MatMul() if op.add:
            return size(op.out)
    return sympy.S.Zero


COUNTS = {"products": products, "solve": solve, "elementwise": elementwise}
