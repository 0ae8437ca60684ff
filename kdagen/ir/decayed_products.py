"""Decayed products of one chunk on torch: exp of segment sums, and Gram matrices by the midpoint tree.

exp of a sum over tokens is the product of their exps. Each token is exponentiated once and spans are multiplied up, by
doubling, from factors <= 1: exact for any gate, resets (-inf) included, with no difference of sums anywhere.
Tensors are [..., C, channels]; what precedes is a batch. A scalar gate has one channel.
"""

from __future__ import annotations

from kdagen.ir.tensor import Gram, Span


class Spans:
    """exp of the log decay over parts of blocks of `size` tokens: `double` joins blocks in pairs.

    `through` spans a block's start through token i, `rest` what follows token i up to the block's end.
    """

    def __init__(self, g, arena):
        import torch

        self.size = 1
        self.through = torch.exp(g, out=arena.take("through", g.shape))
        self.rest = arena.take("rest", g.shape).fill_(1)

    def double(self) -> None:
        """The second block's prefixes gain the first's whole decay, the first's suffixes the second's."""
        through, rest = (pairs(x, self.size) for x in (self.through, self.rest))
        rest[..., 0, :, :] *= through[..., 1, -1:, :]
        through[..., 1, :, :] *= through[..., 0, -1:, :]
        self.size *= 2

    def over(self, span: Span):
        """The factors of one Span once a block is the whole chunk; ALL loses the row dim."""
        while self.size < self.through.shape[-2]:
            self.double()
        if span == Span.THROUGH:
            return self.through
        if span == Span.REST:
            return self.rest
        return self.through[..., -1, :].clone() if span == Span.ALL else shifted(self.through)


def pairs(x, size: int):
    """[..., C, n] as pairs of blocks, [..., C / 2 size, 2, size, n]."""
    return x.unflatten(-2, (-1, 2, size))


def shifted(through):
    """The spans that stop before each row's own token: rows moved down by one, the first empty."""
    before = through.roll(1, -2)
    before[..., 0, :] = 1
    return before


def gram(op: Gram, readers: list, writers: list, spans: Spans | None, outs: list[list], arena) -> None:
    """Fills outs[r][s], zero above the diagonal; leaves `spans` at chunk size."""
    if spans is not None and spans.through.shape[-1] > 1:
        _tree(op, readers, writers, spans, outs, arena)
        return
    factors = _decay_matrices(op, spans, outs[0][0].shape, arena) if spans else [None] * len(readers)
    for row, z, factor, diagonal in zip(outs, readers, factors, op.diagonal, strict=True):
        for out, x, kept in zip(row, writers, diagonal, strict=True):
            product(z, x.mT, out=out)
            if factor is not None:
                out *= factor
            out.tril_(0 if kept else -1)


def _decay_matrices(op: Gram, spans: Spans, shape, arena) -> list:
    """One rate a head: the C x C matrix of decays from j to i for each reader, 1 on the diagonal."""
    import torch

    matrix = arena.take("decay matrix", shape, zero=True)
    matrix.diagonal(dim1=-2, dim2=-1).fill_(1)
    while spans.size < shape[-1]:
        through, rest = _halves(spans)
        torch.mul(through, rest.mT, out=below(matrix, spans.size))
        spans.double()
    return [matrix if after else shifted(matrix) for after in op.after]


def _halves(spans: Spans) -> tuple:
    """Of each pair, the second block's prefixes and the first block's suffixes."""
    return pairs(spans.through, spans.size)[..., 1, :, :], pairs(spans.rest, spans.size)[..., 0, :, :]


def _tree(op: Gram, readers, writers, spans: Spans, outs, arena) -> None:
    """Pairs of blocks of 1, 2, 4 .. tokens: second (rows) against first (columns), about the first's last token."""
    import torch

    while spans.size < readers[0].shape[-2]:
        rows, cols = _rows(op, readers, spans, arena), _cols(writers, spans, arena)
        b, shape = spans.size, (*rows.shape[:-1], cols.shape[-2])
        level = product(rows, cols.mT, out=arena.take("level", shape))
        for r, row in enumerate(outs):
            for s, out in enumerate(row):
                below(out, b).copy_(level[..., r * b : (r + 1) * b, s * b : (s + 1) * b])
        spans.double()
    for row, z, diagonal in zip(outs, readers, op.diagonal, strict=True):
        for out, x, kept in zip(row, writers, diagonal, strict=True):
            if kept:
                terms = torch.mul(z, x, out=arena.take("rows", torch.broadcast_shapes(z.shape, x.shape)))
                torch.sum(terms, -1, out=out.diagonal(dim1=-2, dim2=-1))


def _rows(op: Gram, readers, spans: Spans, arena):
    """Readers of every pair's second block, one above the other, decayed from the first's last token."""
    import torch

    b, (through, _) = spans.size, _halves(spans)
    rows = arena.take("rows", (*through.shape[:-2], len(readers) * b, through.shape[-1]))
    for r, (z, after) in enumerate(zip(readers, op.after, strict=True)):
        z, row = pairs(z, b)[..., 1, :, :], rows[..., r * b : (r + 1) * b, :]
        if after:
            torch.mul(z, through, out=row)
        else:
            row[..., 0, :] = z[..., 0, :]
            torch.mul(z[..., 1:, :], through[..., :-1, :], out=row[..., 1:, :])
    return rows


def _cols(writers, spans: Spans, arena):
    """Writers of every pair's first block, one above the other, decayed to its last token."""
    import torch

    b, (_, rest) = spans.size, _halves(spans)
    cols = arena.take("cols", (*rest.shape[:-2], len(writers) * b, rest.shape[-1]))
    for s, x in enumerate(writers):
        torch.mul(pairs(x, b)[..., 0, :, :], rest, out=cols[..., s * b : (s + 1) * b, :])
    return cols


def below(matrix, size: int):
    """Of [..., C, C] the blocks [..., C / 2 size, size, size] where a pair's second block meets its first."""
    tiles = matrix.unflatten(-1, (-1, 2, size)).unflatten(-4, (-1, 2, size))
    return tiles[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def product(a, b, add=None, out=None):
    """add + a b over a batch of matrices, `add` broadcast; into `out` if given."""
    import torch

    batch = a.shape[:-2]
    shape = (*batch, a.shape[-2], b.shape[-1])
    out = a.new_empty(shape) if out is None else out
    a, b, flat = a.flatten(0, -3), b.flatten(0, -3), out.view(-1, *shape[-2:])
    if add is None:
        torch.bmm(a, b, out=flat)
    elif add is out:
        flat.baddbmm_(a, b)
    else:
        torch.baddbmm(add.flatten(0, -3), a, b, out=flat)
    return out
