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
from typing import NamedTuple

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


@dataclass(frozen=True)
class ColSum:
    """out[j] = sum over the first dim of a[:, j]; out has no dims where a has one."""

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
class Spread:
    """out[t] = add[t] + sum of a[i] over the rows i whose `span` holds token t: adjoint to the sums of a Decay.

    THROUGH: rows i >= t. BEFORE: i > t. REST: i < t. Formed from such sums, never as a difference.
    """

    out: Value
    a: Value
    span: Span
    add: Value | None = None
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
class GramAdjoint:
    """The cotangents of a Gram's operands, from those of its matrices (None: not read by anything).

    With W[i, j] the decay from j to i, masked as the Gram is, and d = d_outs:
    d_readers[r][i, k] = adds[0][r] + sum_s sum_j d[r][s][i, j] writers[s][j, k] W_ijk
    d_writers[s][j, k] = adds[1][s] + sum_r sum_i d[r][s][i, j] readers[r][i, k] W_ijk
    d_g[t, k] = adds[2][0] + sum over the pairs i, j whose decay runs over t of d[r][s][i, j] z_ik x_jk W_ijk,
    summed over channels where g is one rate a head. Entries of d_outs that the Gram leaves zero may hold anything.
    """

    gram: Gram
    d_outs: tuple[tuple[Value | None, ...], ...]
    d_readers: tuple[Value, ...]
    d_writers: tuple[Value, ...]
    d_g: Value | None  # None where the Gram has no decay
    adds: tuple[tuple[Value | None, ...], ...] = ((), (), ())  # what readers, writers and g are owed besides
    # of readers decayed from the chunk's start and writers decayed to its end, from which a tree's descent may begin
    seeds: tuple[tuple[Value | None, ...], ...] = ((), ())
    eq: str = ""


@dataclass(frozen=True)
class Interleave:
    """out: rows of the parts interleaved token by token. A table of C x C parts gives an (rC, sC) matrix."""

    out: Value
    parts: tuple[tuple[Value, ...], ...]  # table; a K or V or vector operand has one column
    eq: str = ""


@dataclass(frozen=True)
class Deinterleave:
    """outs[r][s]: the part of stream r's rows (and s's columns, of a square matrix) of `a`: undoes Interleave."""

    outs: tuple[tuple[Value, ...], ...]
    a: Value
    eq: str = ""


@dataclass(frozen=True)
class SolveTril:
    """out = (I - a)^{-1}, a strictly lower triangular, dims ("rC", "rC")."""

    out: Value
    a: Value
    eq: str = ""


class Term(NamedTuple):
    """A product of a MatMul."""

    a: Value
    b: Value
    transpose_a: bool = False
    transpose_b: bool = False

    def __str__(self):
        return f"{self.a.name}{'^T' * self.transpose_a} {self.b.name}{'^T' * self.transpose_b}"


@dataclass(frozen=True)
class MatMul:
    """out = add + sum of products."""

    out: Value
    terms: tuple[Term, ...]
    add: Value | None = None
    eq: str = ""


Op = Load | Map | RowSum | ColSum | Decay | Spread | Gram | GramAdjoint | Interleave | Deinterleave | SolveTril | MatMul


def reads(op: Op) -> tuple[Value, ...]:
    """The values that an op reads."""
    match op:
        case Map():
            return tuple(v for v, _ in op.operands)
        case RowSum() | ColSum() | Deinterleave() | SolveTril():
            return (op.a,)
        case Spread():
            return (op.a, *((op.add,) if op.add else ()))
        case Decay():
            return (op.g,)
        case GramAdjoint():
            return (*reads(op.gram), *(v for row in (*op.d_outs, *op.adds, *op.seeds) for v in row if v))
        case Gram():
            return (*op.readers, *op.writers, *((op.g,) if op.g else ()))
        case Interleave():
            return tuple(v for row in op.parts for v in row)
        case MatMul():
            return (*(v for term in op.terms for v in term[:2]), *((op.add,) if op.add else ()))
    return ()


def writes(op: Op) -> tuple[Value, ...]:
    """The values that an op makes."""
    match op:
        case Gram() | Deinterleave():
            return tuple(v for row in op.outs for v in row)
        case GramAdjoint():
            return (*op.d_readers, *op.d_writers, *((op.d_g,) if op.d_g else ()))
    return (op.out,)


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


@dataclass(frozen=True)
class Adjoint:
    """The backward of a chunk form: the cotangents (d_ and a name) of what a chunk was given, from its results'.

    `reverse` maps `d_next_state`, chunk after chunk from the last, to `d_state`, the cotangent of the state before the
    chunk: it reads `d_out` and prepared values, neither the state nor the forward's own V-wide values. `gradients`
    holds all else, and any order of chunks will do: it reads, beside these, the chunk's incoming state, the values of
    `recompute` (the forward's prepare and those ops of its scan that are needed, the next state not among them) and
    those of `reverse`.
    """

    forward: Program
    recompute: tuple[Op, ...]
    reverse: tuple[Op, ...]
    gradients: tuple[Op, ...]
    d_out: Value
    d_next_state: Value
    d_state: Value
    results: tuple[tuple[Argument, Value], ...]  # of each argument; of a head's parameter what one chunk contributes
