"""Tensor IR: the chunkwise form of a recurrence, one chunk of one head at a time.

A value has named dims: "C" rows (tokens of the chunk), "2C", "3C" .. for r streams interleaved token by token
(row = token * r + stream; written "rC" below, "C" for one stream), "K" and "V" channels. Batch, head and chunk
index are implicit.
An op computes one value (Gram: a table of them) and carries the equation that it implements.

Unlike tile IR, nothing here knows of memory, threads or dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import sympy

from kdagen.ir.canonical import Argument, Canonical


@dataclass(frozen=True)
class Value:
    """A named tensor; `dims` lists its named dimensions, outermost first."""

    name: str
    dims: tuple[str, ...]

    @property
    def symbol(self) -> sympy.Symbol:
        return sympy.Symbol(self.name, real=True)


@dataclass(frozen=True)
class Load:
    """An argument's chunk: ("C", axis) a token, (axis,) for a parameter of the head. Rows past T are zero."""

    out: Value
    argument: Argument
    eq: str = ""


@dataclass(frozen=True)
class Map:
    """out[indices] = expr, elementwise, in index notation.

    Each operand is (value, its indices); `expr` is in the operands' symbols. Missing indices broadcast.
    It may also hold sympy.KroneckerDelta(i, j) of two index names: 1 on the diagonal, else 0.
    `zero_past_end` makes rows past T zero whatever the expression gives there.
    """

    out: Value
    indices: tuple[str, ...]
    expr: sympy.Expr
    operands: tuple[tuple[Value, tuple[str, ...]], ...]
    zero_past_end: bool = False
    eq: str = ""


@dataclass(frozen=True)
class RowSum:
    """out[i] = sum over the last dim of a[i, :]."""

    out: Value
    a: Value
    eq: str = ""


class Span(str, Enum):
    """Which tokens' log decays a Decay accumulates, for row i of a chunk (or for all of it)."""

    THROUGH = "through"  # tokens 0..i: from the chunk's start through token i's own decay
    BEFORE = "before"  # tokens 0..i-1: up to token i, without its own decay
    REST = "rest"  # tokens i+1..C-1: from token i to the chunk's end
    ALL = "all"  # the whole chunk; dims lose "C"


@dataclass(frozen=True)
class Decay:
    """out = exp(sum of g over `span`). Always formed from sums over the span, never as a difference."""

    out: Value
    g: Value
    span: Span
    eq: str = ""


@dataclass(frozen=True)
class Gram:
    """Secondary matrices: outs[r][s][i, j] = sum_k readers[r][i, k] writers[s][j, k] exp(decay from j to i).

    The decay runs over tokens j+1..i when after[r], j+1..i-1 otherwise. Entries j > i are zero; j = i is
    kept (undecayed) where diagonal[r][s]. g None means no decay.
    """

    outs: tuple[tuple[Value, ...], ...]
    readers: tuple[Value, ...]
    writers: tuple[Value, ...]
    g: Value | None
    after: tuple[bool, ...]
    diagonal: tuple[tuple[bool, ...], ...]
    eq: str = ""


@dataclass(frozen=True)
class Interleave:
    """out: rows of the parts interleaved token by token. A table of C x C parts gives an (rC, sC) matrix."""

    out: Value
    parts: tuple[tuple[Value, ...], ...]  # table; a K or V or vector operand has one column
    eq: str = ""


@dataclass(frozen=True)
class SolveTril:
    """out = (I - a)^{-1}, a strictly lower triangular, dims ("rC", "rC")."""

    out: Value
    a: Value
    eq: str = ""


@dataclass(frozen=True)
class MatMul:
    """out = add + sum of products; each term is (a, b, transpose_a)."""

    out: Value
    terms: tuple[tuple[Value, Value, bool], ...]
    add: Value | None = None
    eq: str = ""


Op = Load | Map | RowSum | Decay | Gram | Interleave | SolveTril | MatMul


def reads(op: Op) -> tuple[Value, ...]:
    """The values that an op reads."""
    match op:
        case Map():
            return tuple(v for v, _ in op.operands)
        case RowSum() | SolveTril():
            return (op.a,)
        case Decay():
            return (op.g,)
        case Gram():
            return (*op.readers, *op.writers, *((op.g,) if op.g else ()))
        case Interleave():
            return tuple(v for row in op.parts for v in row)
        case MatMul():
            return (*(v for a, b, _ in op.terms for v in (a, b)), *((op.add,) if op.add else ()))
    return ()


def writes(op: Op) -> tuple[Value, ...]:
    """The values that an op makes."""
    return tuple(v for row in op.outs for v in row) if isinstance(op, Gram) else (op.out,)


@dataclass(frozen=True)
class Program:
    """The chunk form: what does not read the state, the step from state to state, and the output.

    `prepare` runs for all chunks at once; `scan` maps `state` (dims K, V) and prepared values to `next_state`,
    chunk after chunk; `output` reads prepared values, the chunk's incoming `state` and the scan's pseudo-values.
    """

    canonical: Canonical
    prepare: tuple[Op, ...]
    scan: tuple[Op, ...]
    output: tuple[Op, ...]
    state: Value
    next_state: Value
    out: Value
