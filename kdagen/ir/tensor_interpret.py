"""Runs a tensor program on torch: what the program means, and the CPU backend of every op.

Tensors are [chunk, B, H, *dims of the value]: prepare does all chunks of a span of tokens at once, scan and output go
chunk by chunk. No loop runs over tokens. The sequence is taken in spans of a few chunks, so that values stay in cache
and memory does not grow with T. Each chunk is computed alike, whatever follows it and however long T is.
"""

from __future__ import annotations

import math

import sympy

from kdagen.errors import ArgumentError
from kdagen.ir.decayed_products import Spans, gram, product, tree_gram
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
from kdagen.ir.torch_expression import SAME_INDEX, compiled
from kdagen.ir.triangular_inverse import inverse

SPAN_ELEMENTS = 1 << 19  # of one K- or V-wide value of a span: a few values fill the cache that a core has


class Arena:
    """Scratch tensors by name, kept from span to span: fresh memory would cost more than the arithmetic.

    What is no value of the program has a space in its name.
    """

    def __init__(self, like):
        self.like, self.kept = like, {}

    def take(self, name: str, shape, zero: bool = False):
        """A tensor of `shape` holding what was left in it, at first anything, or zeros if so asked."""
        size = math.prod(shape)
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept[name] = self.like.new_zeros(size) if zero else self.like.new_empty(size)
        return self.kept[name][:size].view(shape)


def interpret(program: Program, tensors: dict, initial_state=None, chunk_size: int = 32, dtype=None):
    """Output [B, T, H, V] and final state [B, H, K, V], in `dtype` (that of the first tensor unless given)."""
    return Interpreter(program, tensors, chunk_size, dtype).run(initial_state)


class Interpreter:
    """One run of a program: shapes, scratch, and the values of the span of tokens at hand."""

    def __init__(self, program: Program, tensors: dict, chunk_size: int, dtype=None):
        if chunk_size < 1 or chunk_size & (chunk_size - 1):
            raise ArgumentError(f"chunk_size = {chunk_size}: expected a power of two, such as 16, 32 or 64")
        self.program, self.tensors, self.chunk = program, tensors, chunk_size
        self.size = sizes(program.canonical.arguments, tensors)
        first = next(iter(tensors.values()))
        self.arena = Arena(first.new_empty(0, dtype=dtype or first.dtype))
        self.steps, self.in_place = chunk_steps(program)
        self.carried = carried(program)  # so their decays need not be formed, unless others read them
        others = [op for op in program.prepare if writes(op)[0].name not in self.carried]
        self.read = {v for op in (*others, *self.steps) for v in reads(op)}
        self.one_chunk = {op.out.name for op in self.steps}
        self.handlers = {
            Load: self.load, Map: self.map, RowSum: self.row_sum, Decay: self.decay, Gram: self.gram,
            Interleave: self.interleave, SolveTril: self.solve, MatMul: self.matmul,
        }  # fmt: skip

    def run(self, initial_state=None, out_dtype=None):
        """All tokens, a span of chunks after another: output, in `out_dtype` if given, and final state."""
        b, t, h, k, v = (self.size[d] for d in "BTHKV")
        out = self.arena.like.new_empty(b, t, h, v, dtype=out_dtype)
        state = self.arena.like.new_zeros(b, h, k, v)
        if initial_state is not None:
            state.copy_(initial_state)
        step = self.chunk * max(1, SPAN_ELEMENTS // (b * h * self.chunk * max(k, v)))
        for start in range(0, t, step):
            self.span(start, min(t, start + step), state.unsqueeze(0), out)
        return out, state

    def span(self, start: int, end: int, state, out) -> None:
        """The tokens start..end-1: writes their output, and replaces the state by the one after them."""
        self.start, self.end, self.n = start, end, -(-(end - start) // self.chunk)
        self.env, self.targets, self.spans, self.tree_ends = {}, {}, {}, {}
        self.do(self.program.prepare)
        prepared = {v.name: self.env[v.name].split(1) for op in self.steps for v in reads(op) if v.name in self.env}
        self.targets = dict.fromkeys(self.in_place, state)
        for i in range(self.n):
            self.env = {name: x[i] for name, x in prepared.items()} | {self.program.state.name: state}
            self.do(self.steps)
            here = slice(start + i * self.chunk, min(end, start + (i + 1) * self.chunk))
            o = self.env[self.program.out.name][0].transpose(1, 2)
            out[:, here] = o[:, : here.stop - here.start]

    def do(self, ops: tuple[Op, ...]) -> None:
        for op in ops:
            self.handlers[type(op)](op)

    def target(self, value: Value, zero: bool = False):
        """Where a value is written; zeros at first if so asked."""
        if value.name in self.targets:
            return self.targets[value.name]
        dims = (self.size[d] if d in self.size else int(d[:-1] or 1) * self.chunk for d in value.dims)
        chunks = 1 if value.name in self.one_chunk else self.n
        return self.arena.take(value.name, (chunks, self.size["B"], self.size["H"], *dims), zero)

    # -- ops

    def load(self, op: Load) -> None:
        a, x = op.argument, self.tensors[op.argument.name]
        heads = 2 if a.per_token else 0
        x = x[:, self.start : self.end] if a.per_token else x
        if x.shape[heads] != self.size["H"]:  # grouped: each head serves several
            x = x.repeat_interleave(self.size["H"] // x.shape[heads], heads)
        x = x.to(self.arena.like.dtype)
        self.env[op.out.name] = self.chunked(x) if a.per_token else x.expand(self.n, self.size["B"], *x.shape)

    def chunked(self, x):
        """[B, tokens, H, *] as [chunk, B, H, C, *], rows past the end zero; a view unless the last chunk is partial."""
        if missing := self.n * self.chunk - x.shape[1]:
            padded = x.new_zeros(x.shape[0], x.shape[1] + missing, *x.shape[2:])
            padded[:, : x.shape[1]] = x
            x = padded
        return x.unflatten(1, (self.n, self.chunk)).permute(1, 0, 3, 2, *range(4, x.dim() + 1))

    def map(self, op: Map) -> None:
        if op.out.name in self.carried:
            self.env[op.out.name] = self.tree_ends[self.carried[op.out.name]]
            return
        env = {v.symbol: self.aligned(self.env[v.name], indices, op.indices) for v, indices in op.operands}
        if op.expr.has(sympy.KroneckerDelta):
            env[SAME_INDEX] = self.eye(self.chunk)
        out = compiled(op.expr)(env, self.target(op.out))
        valid = self.end - self.start - (self.n - 1) * self.chunk
        if op.zero_past_end and valid < self.chunk:
            out[-1, :, :, valid:] = 0
        self.env[op.out.name] = out

    def aligned(self, x, indices: tuple[str, ...], onto: tuple[str, ...]):
        """`x` with a dim of one for each index that it lacks."""
        for position, index in enumerate(onto):
            if index not in indices:
                x = x.unsqueeze(3 + position)
        return x

    def eye(self, n: int):
        import torch

        return torch.eye(n, dtype=self.arena.like.dtype, device=self.arena.like.device)

    def row_sum(self, op: RowSum) -> None:
        import torch

        self.env[op.out.name] = torch.sum(self.env[op.a.name], -1, out=self.target(op.out))

    def new_spans(self, g: Value) -> Spans:
        x = self.env[g.name]
        return Spans(x if len(g.dims) > 1 else x.unsqueeze(-1), self.arena)

    def decay(self, op: Decay) -> None:
        if op.out not in self.read:
            return
        if op.span == Span.ALL and (op.g.name, Span.ALL) in self.tree_ends:
            self.env[op.out.name] = self.tree_ends[op.g.name, Span.ALL]
            return
        if op.g.name not in self.spans:
            self.spans[op.g.name] = self.new_spans(op.g)
        x = self.spans[op.g.name].over(op.span)
        self.env[op.out.name] = x if len(op.g.dims) > 1 else x.squeeze(-1)

    def gram(self, op: Gram) -> None:
        outs = [[self.target(v, zero=True) for v in row] for row in op.outs]
        self.env |= {
            v.name: out for row, values in zip(op.outs, outs, strict=True) for v, out in zip(row, values, strict=True)
        }
        readers, writers = ([self.env[v.name] for v in values] for values in (op.readers, op.writers))
        if op.g is not None and len(op.g.dims) > 1:
            tree = tree_gram(op, readers, writers, self.env[op.g.name], outs, self.arena)
            ends = (*tree.rows.unbind(-2), *tree.cols.unbind(-2))
            self.tree_ends |= {(v.name, span): x for (v, span), x in zip(leaves(op), ends, strict=True)}
            self.tree_ends[op.g.name, Span.ALL] = tree.total.squeeze(-2)
            return
        if op.g is not None:
            self.spans[op.g.name] = self.new_spans(op.g)
        gram(op, readers, writers, self.spans[op.g.name] if op.g else None, outs, self.arena)

    def interleave(self, op: Interleave) -> None:
        out = self.env[op.out.name] = self.target(op.out)
        split = out.unflatten(3, (self.chunk, len(op.parts)))
        for r, row in enumerate(op.parts):
            for s, part in enumerate(row):
                rows = split.select(4, r)
                rows = rows.unflatten(4, (self.chunk, len(row))).select(5, s) if part.dims == ("C", "C") else rows
                rows.copy_(self.env[part.name])

    def solve(self, op: SolveTril) -> None:
        self.env[op.out.name] = inverse(self.env[op.a.name], self.target(op.out, zero=True), self.arena)

    def matmul(self, op: MatMul) -> None:
        out, add = self.target(op.out), self.env[op.add.name] if op.add else None
        for term in op.terms:
            a, b = self.env[term.a.name], self.env[term.b.name]
            add = product(a.mT if term.transpose_a else a, b.mT if term.transpose_b else b, add, out)
        self.env[op.out.name] = out


def chunk_steps(program: Program) -> tuple[tuple[Op, ...], tuple[str, ...]]:
    """Scan and output of one chunk, the state's update last; and the values that may then take the state's place."""
    update = next(op for op in program.scan if op.out == program.next_state)
    rest = [op for op in program.scan if op != update] + list(program.output)
    kept = [op for op in program.scan if update.add == op.out and not any(op.out in reads(other) for other in rest)]
    ahead = tuple(op for op in rest if op not in kept)
    return (*ahead, *kept, update), (program.next_state.name, *(op.out.name for op in kept))


def carried(program: Program) -> dict[str, tuple[str, Span]]:
    """Elementwise values that a Gram's tree leaves behind, as they decay one of its operands: (operand, span)."""
    grams = {op.g: op for op in program.prepare if isinstance(op, Gram) and op.g is not None and len(op.g.dims) > 1}
    decays = {op.out: op for op in program.prepare if isinstance(op, Decay) and op.g in grams}
    found = {}
    for op in program.prepare:
        if isinstance(op, Map) and len(op.operands) == 2:
            (a, _), (b, _) = op.operands
            if b in decays and op.expr == a.symbol * b.symbol and (a, decays[b].span) in leaves(grams[decays[b].g]):
                found[op.out.name] = (a.name, decays[b].span)
    return found


def leaves(op: Gram) -> list[tuple[Value, Span]]:
    """The decayed operands of a tree at its end: the rows, then the columns."""
    rows = [(z, Span.THROUGH if after else Span.BEFORE) for z, after in zip(op.readers, op.after, strict=True)]
    return [*rows, *((x, Span.REST) for x in op.writers)]


def sizes(arguments, tensors: dict) -> dict[str, int]:
    """B, T, heads (the most that any argument has), K and V."""
    found = {"H": 0, "K": 1, "V": 1}
    for a in arguments:
        shape = tensors[a.name].shape
        found["H"] = max(found["H"], shape[2 if a.per_token else 0])
        if a.per_token:
            found["B"], found["T"] = shape[:2]
        if a.axis:
            found[a.axis] = shape[-1]
    return found
