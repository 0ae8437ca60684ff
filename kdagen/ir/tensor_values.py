"""The values of a span of tokens on torch, and what each op of a tensor program makes of them.

Tensors are [chunk, B, HV, *dims of the value]: a key is loaded once for each value head that it serves. Which ops run
when is for the interpreters to say: tensor_interpret runs a program, adjoint_interpret its backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import sympy

from kdagen.errors import ArgumentError
from kdagen.ir.canonical import Canonical
from kdagen.ir.decayed_adjoint import gram_adjoint, spread, tree_gram_adjoint
from kdagen.ir.decayed_products import Spans, decay_matrices, gram, product, tree_gram
from kdagen.ir.tensor import (
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
    RowSum,
    SolveTril,
    Span,
    Spread,
    Value,
    reads,
    writes,
)
from kdagen.ir.torch_expression import SAME_INDEX, compiled
from kdagen.ir.triangular_inverse import inverse


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


class Values:
    """Shapes, scratch, and the values of the span of tokens at hand, each made by its op's handler.

    Spans may be so many times `wider` than they commonly are: fewer and larger ops, and scratch as much larger.
    """

    keep_levels = False  # whether trees keep what their adjoint reads

    def __init__(self, canonical: Canonical, tensors: dict, chunk_size: int, dtype=None, wider: int = 1):
        if chunk_size < 1 or chunk_size & (chunk_size - 1):
            raise ArgumentError(f"chunk_size = {chunk_size}: expected a power of two, such as 16, 32 or 64")
        self.canonical, self.chunk, self.wider = canonical, chunk_size, wider
        self.turn_to(tensors)
        first = next(iter(tensors.values()))
        self.arena = Arena(first.new_empty(0, dtype=dtype or first.dtype))
        self.handlers = {
            Load: self.load, Map: self.map, RowSum: self.row_sum, ColSum: self.col_sum, Decay: self.decay,
            Spread: self.spread, Gram: self.gram, GramAdjoint: self.gram_adjoint, Interleave: self.interleave,
            Deinterleave: self.deinterleave, SolveTril: self.solve, MatMul: self.matmul,
        }  # fmt: skip

    def turn_to(self, tensors: dict) -> None:
        """These tensors come next; scratch stays."""
        self.tensors, self.size = tensors, sizes(self.canonical, tensors)

    def new(self, *dims: int | str):
        """A tensor in the dtype of what is computed."""
        return self.arena.like.new_empty([self.size.get(d, d) for d in dims])

    def expect(self, at_once: Iterable[Op], in_turn: Iterable[Op]) -> None:
        """What will run on all chunks of a span at once, and on one chunk after another."""
        self.carried = carried(at_once)  # so their decays need not be formed, unless others read them
        others = [op for op in at_once if writes(op)[0].name not in self.carried]
        self.read = {v for op in (*others, *in_turn) for v in reads(op)}
        self.one_chunk = {op.out.name for op in in_turn}

    def begin(self, start: int, end: int) -> None:
        """Forget all values: the tokens start..end-1 come next."""
        self.start, self.end, self.n = start, end, -(-(end - start) // self.chunk)
        self.env, self.targets, self.spans, self.factors, self.trees, self.tree_ends = {}, {}, {}, {}, {}, {}

    def tokens(self, i: int) -> slice:
        """The tokens of the span's i-th chunk."""
        return slice(self.start + i * self.chunk, min(self.end, self.start + (i + 1) * self.chunk))

    def by_chunk(self, ops: Iterable[Op]) -> list[dict]:
        """The values made so far that `ops` read, one chunk at a time."""
        parts = {v.name: self.env[v.name].split(1) for op in ops for v in reads(op) if v.name in self.env}
        return [{name: x[i] for name, x in parts.items()} for i in range(self.n)]

    def do(self, ops: tuple[Op, ...]) -> None:
        for op in ops:
            self.handlers[type(op)](op)

    def span_tokens(self, elements: int) -> int:
        """The tokens of a span: whole chunks, of which a K- or V-wide value has about so many elements."""
        chunk = self.size["B"] * self.size["HV"] * self.chunk * max(self.size["K"], self.size["V"])
        return self.chunk * max(1, elements // chunk)

    def target(self, value: Value, zero: bool = False):
        """Where a value is written; zeros at first if so asked."""
        if value.name in self.targets:
            return self.targets[value.name]
        dims = (self.size[d] if d in self.size else int(d[:-1] or 1) * self.chunk for d in value.dims)
        chunks = 1 if value.name in self.one_chunk else self.n
        return self.arena.take(value.name, (chunks, self.size["B"], self.size["HV"], *dims), zero)

    # -- ops

    def load(self, op: Load) -> None:
        a, x = op.argument, self.tensors[op.argument.name]
        heads = 2 if a.per_token else 0
        x = x[:, self.start : self.end] if a.per_token else x
        if x.shape[heads] != self.size["HV"]:  # grouped: each head serves several
            x = x.repeat_interleave(self.size["HV"] // x.shape[heads], heads)
        x = x.to(self.arena.like.dtype)
        self.env[op.out.name] = self.chunked(x) if a.per_token else x.expand(self.n, self.size["B"], *x.shape)

    def chunked(self, x):
        """[B, tokens, heads, *] as [chunk, B, heads, C, *], rows past the end zero; a view if none are."""
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

    def col_sum(self, op: ColSum) -> None:
        import torch

        self.env[op.out.name] = torch.sum(self.env[op.a.name], 3, out=self.target(op.out))

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

    def spread(self, op: Spread) -> None:
        a, out = self.env[op.a.name], self.target(op.out)
        if len(op.a.dims) > 1:
            spread(a, op.span, out)
        else:
            spread(a.unsqueeze(-1), op.span, out.unsqueeze(-1))
        if op.add:
            out += self.env[op.add.name]
        self.env[op.out.name] = out

    def gram(self, op: Gram) -> None:
        outs = [[self.target(v, zero=True) for v in row] for row in op.outs]
        self.env |= {v.name: out for row, xs in zip(op.outs, outs, strict=True) for v, out in zip(row, xs, strict=True)}
        operands, g = self.operands(op), op.g and self.env[op.g.name]
        if g is not None and len(op.g.dims) > 1:
            tree = self.trees[op] = tree_gram(op, *operands, g, outs, self.arena, self.keep_levels)
            ends = (*tree.rows.unbind(-2), *tree.cols.unbind(-2))
            self.tree_ends |= {(v.name, span): x for (v, span), x in zip(leaves(op), ends, strict=True)}
            self.tree_ends[op.g.name, Span.ALL] = tree.total.squeeze(-2)
            return
        if g is not None:
            spans = self.spans[op.g.name] = self.new_spans(op.g)
            self.factors[op] = decay_matrices(op, spans, outs[0][0].shape, self.arena)
        gram(op, *operands, self.factors.get(op), outs)

    def operands(self, op: Gram) -> tuple[list, list]:
        return [self.env[v.name] for v in op.readers], [self.env[v.name] for v in op.writers]

    def gram_adjoint(self, op: GramAdjoint) -> None:
        made = {v.name: self.target(v) for v in writes(op)}
        self.env |= made
        gram, d_outs = op.gram, [[v and self.env[v.name] for v in row] for row in op.d_outs]
        if gram.outs[0][0].name not in self.env:
            self.gram(gram)
        cotangents = [[made[v.name] for v in values if v] for values in (op.d_readers, op.d_writers, (op.d_g,))]
        if gram in self.trees:
            seeds = [[v and self.env[v.name] for v in side] for side in op.seeds]
            tree_gram_adjoint(gram, d_outs, self.operands(gram), self.trees[gram], cotangents, self.arena, seeds)
        else:
            outs = [[self.env[v.name] for v in row] for row in gram.outs]
            gram_adjoint(gram, d_outs, self.operands(gram), self.factors.get(gram), outs, cotangents, self.arena)
        for side, adds in zip((op.d_readers, op.d_writers, (op.d_g,)), op.adds, strict=True):
            for value, add in zip(side, adds):
                if add:
                    made[value.name] += self.env[add.name]

    def interleave(self, op: Interleave) -> None:
        out = self.env[op.out.name] = self.target(op.out)
        split = out.unflatten(3, (self.chunk, len(op.parts)))
        for r, row in enumerate(op.parts):
            for s, part in enumerate(row):
                rows = split.select(4, r)
                rows = rows.unflatten(4, (self.chunk, len(row))).select(5, s) if part.dims == ("C", "C") else rows
                rows.copy_(self.env[part.name])

    def deinterleave(self, op: Deinterleave) -> None:
        split = self.env[op.a.name].unflatten(3, (self.chunk, len(op.outs)))
        for r, row in enumerate(op.outs):
            for s, out in enumerate(row):
                rows = split.select(4, r)
                square = out.dims == ("C", "C")
                self.env[out.name] = rows.unflatten(4, (self.chunk, len(row))).select(5, s) if square else rows

    def solve(self, op: SolveTril) -> None:
        self.env[op.out.name] = inverse(self.env[op.a.name], self.target(op.out, zero=True), self.arena)

    def matmul(self, op: MatMul) -> None:
        out, add = self.target(op.out), self.env[op.add.name] if op.add else None
        for term in op.terms:
            a, b = self.env[term.a.name], self.env[term.b.name]
            add = product(a.mT if term.transpose_a else a, b.mT if term.transpose_b else b, add, out)
        self.env[op.out.name] = out


def carried(ops: Iterable[Op]) -> dict[str, tuple[str, Span]]:
    """Elementwise values that a Gram's tree leaves behind, as they decay one of its operands: (operand, span)."""
    grams = {op.g: op for op in ops if isinstance(op, Gram) and op.g is not None and len(op.g.dims) > 1}
    decays = {op.out: op for op in ops if isinstance(op, Decay) and op.g in grams}
    found = {}
    for op in ops:
        if isinstance(op, Map) and len(op.operands) == 2:
            (a, _), (b, _) = op.operands
            if b in decays and op.expr == a.symbol * b.symbol and (a, decays[b].span) in leaves(grams[decays[b].g]):
                found[op.out.name] = (a.name, decays[b].span)
    return found


def leaves(op: Gram) -> list[tuple[Value, Span]]:
    """The decayed operands of a tree at its end: the rows, then the columns."""
    rows = [(z, Span.THROUGH if after else Span.BEFORE) for z, after in zip(op.readers, op.after, strict=True)]
    return [*rows, *((x, Span.REST) for x in op.writers)]


def sizes(canonical: Canonical, tensors: dict) -> dict[str, int]:
    """B, T, heads of keys (H) and of values (HV), K and V."""
    found = {"K": 1, "V": 1}
    for a in canonical.arguments:
        shape = tensors[a.name].shape
        found[canonical.heads(a)] = shape[2 if a.per_token else 0]
        if a.per_token:
            found["B"], found["T"] = shape[:2]
        if a.axis:
            found[a.axis] = shape[-1]
    return {"H": found.get("HV"), "HV": found.get("H"), **found}
