"""The adjoint of decayed products on torch: cotangents of operands and of log decays, from those of Gram matrices.

The counterpart of decayed_products. A log decay's cotangent is a sum of terms over exactly the pairs whose decay runs
over its token: nothing cancels, and a gate of -inf, which makes all those terms zero, gets exactly zero.
"""

from __future__ import annotations

import math

from kdagen.ir.decayed_products import Tree, below, product
from kdagen.ir.tensor import Gram, Span

MULTIPLIED = 8  # tokens: smaller blocks of a tree are multiplied several at once, as small products cost most to begin


def spread(a, span: Span, out):
    """out[t] = sum of a[i] over the rows i whose span holds token t."""
    import torch

    n = a.shape[-2]
    held = torch.ones(n, n, dtype=a.dtype, device=a.device)
    held = held.tril(-1) if span == Span.REST else held.triu(0 if span == Span.THROUGH else 1)
    return product(held.expand(*a.shape[:-2], n, n), a, out=out)


def gram_adjoint(op: Gram, d_outs, operands, factors, outs, cotangents, arena) -> None:
    """Without decay or with one rate a head; `factors` as decay_matrices gives them, `outs` the Gram's own matrices.

    `operands` are readers and writers, `cotangents` theirs and, if there is a decay, its own.
    """
    import torch

    (readers, writers), (d_readers, d_writers, d_g) = operands, cotangents
    for x in (*d_readers, *d_writers, *d_g):
        x.zero_()
    factors = factors or [None] * len(readers)
    for r, s, d in _pairs(d_outs):
        weights = arena.take("gram weights", d.shape).copy_(d)
        if factors[r] is not None:
            weights *= factors[r]
        weights.tril_(0 if op.diagonal[r][s] else -1)
        product(weights, writers[s], d_readers[r], d_readers[r])
        product(weights.mT, readers[r], d_writers[s], d_writers[s])
    for x in d_g:
        for after in sorted(set(op.after)):
            terms = arena.take("gram terms", outs[0][0].shape).zero_()
            for r, s, d in _pairs(d_outs):
                if op.after[r] == after:
                    terms += torch.mul(d, outs[r][s], out=arena.take("gram weights", d.shape)).tril_(-1)
            x += torch.sum(_to_earlier(terms, arena).tril_(0 if after else -1), -2)


def _pairs(d_outs):
    """Reader, writer and cotangent of each matrix that anything reads."""
    return [(r, s, d) for r, row in enumerate(d_outs) for s, d in enumerate(row) if d is not None]


def _to_earlier(terms, arena):
    """out[i, t] = sum of terms[i, j] over j < t."""
    import torch

    earlier = torch.ones(terms.shape[-2:], dtype=terms.dtype, device=terms.device).triu(1)
    return product(terms, earlier.expand(terms.shape), out=arena.take("gram weights", terms.shape))


def tree_gram_adjoint(op: Gram, d_outs, operands, tree: Tree, cotangents, arena, seeds=((), ())) -> None:
    """With one rate a channel: the tree that made the matrices, from its largest blocks down to single tokens.

    `seeds` are cotangents of its rows and columns at the end, where they are decayed from or to the chunk's ends.
    """
    import torch

    (readers, writers), (d_readers, d_writers, (d_g,)) = operands, cotangents
    back = TreeAdjoint(tree, arena, seeds)
    back.descend(d_outs)
    d_rows, d_cols, decay = back.d_rows.unbind(-2), back.d_cols.unbind(-2), tree.decay
    d_g.copy_(back.d_total)
    for d_z, d_row, z, after in zip(d_readers, d_rows, readers, op.after, strict=True):
        torch.mul(d_row, decay, out=d_z) if after else d_z.copy_(d_row)
        if after:
            d_g.addcmul_(d_z, z)
    for d_x, d_col in zip(d_writers, d_cols, strict=True):
        d_x.copy_(d_col)
    for r, s, d in _pairs(d_outs):
        if op.diagonal[r][s]:
            own = d.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            d_readers[r].addcmul_(own, writers[s])
            d_writers[s].addcmul_(own, readers[r])


class TreeAdjoint:
    """A Tree's blocks split in two again, level after level, with the cotangents of its rows and columns.

    `d_total` is the cotangent of the log decay of each whole block.
    """

    def __init__(self, tree: Tree, arena, seeds=((), ())):
        self.tree, self.arena = tree, arena
        self.d_rows, self.d_cols = (
            self.seeded(arena.take(name, x.shape), side)
            for name, x, side in (("tree d_rows", tree.rows, seeds[0]), ("tree d_cols", tree.cols, seeds[1]))
        )
        self.d_total = arena.take("tree d_total", tree.total.shape).zero_()

    @staticmethod
    def seeded(out, seeds):
        if not any(x is not None for x in seeds):
            return out.zero_()
        for part, x in zip(out.unbind(-2), seeds, strict=True):
            part.zero_() if x is None else part.copy_(x)
        return out

    def descend(self, d_outs) -> None:
        for level in reversed(self.tree.levels):
            self.unjoin(level)
            self.multiply(level, d_outs)

    def unjoin(self, level) -> None:
        """Rows that gained a block's decay pass their cotangents through it, and the block its share of them."""
        import torch

        late, early = level.halves(self.d_rows, self.d_cols)
        late *= level.first[..., None, None, :]
        early *= level.second[..., None, None, :]
        d_total = self.arena.take(f"tree d_total {level.size}", (*level.first.shape[:-1], 2, level.first.shape[-1]))
        for d, kept, half in ((late, level.late, 0), (early, level.early, 1)):
            terms = torch.mul(d, kept, out=self.arena.take("tree terms", d.shape))
            torch.sum(terms, (-3, -2), out=d_total[..., half, :])
        d_total += self.d_total.unsqueeze(-2)
        self.d_total = d_total.flatten(-3, -2)

    def multiply(self, level, d_outs) -> None:
        """The products of this level: second blocks' rows with first blocks' columns."""
        late, early = level.halves(self.d_rows, self.d_cols)
        pairs = min(late.shape[-4], max(1, MULTIPLIED // level.size))
        d = self.products(level, d_outs, pairs)
        rows, cols = (x.unflatten(-4, (-1, pairs)).flatten(-4, -2) for x in (level.late, level.early))
        for to, left, right in ((late, d, cols), (early, d.mT, rows)):
            if pairs == 1:
                product(left, right, to.flatten(-3, -2), to.flatten(-3, -2))
            else:
                out = self.arena.take("tree terms", (*left.shape[:-1], right.shape[-1]))
                to += product(left, right, out=out).view(to.shape)

    def products(self, level, d_outs, pairs: int):
        """The matrices' cotangents at this level; of several pairs at once, with zeros where different pairs meet."""
        rows, cols = ((pairs, *x.shape[-3:-1]) for x in (level.late, level.early))
        blocks = (*level.late.shape[:-4], level.late.shape[-4] // pairs)
        d = self.arena.take(f"tree level {level.size}", (*blocks, math.prod(rows), math.prod(cols)), zero=True)
        parts = d.unflatten(-1, cols).unflatten(-4, rows).diagonal(dim1=-6, dim2=-3).movedim(-1, -5)
        for r, row in enumerate(d_outs):
            for s, given in enumerate(row):
                part = parts[..., r, :, s]
                part.zero_() if given is None else part.copy_(below(given, level.size).unflatten(-3, (-1, pairs)))
        return d
