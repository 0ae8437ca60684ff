"""Decayed products of one chunk on torch: exp of segment sums, and Gram matrices by the midpoint tree.

exp of a sum over tokens is the product of their exps. Each token is exponentiated once and spans are multiplied up, by
doubling, from factors <= 1: exact for any gate, resets (-inf) included, with no difference of sums anywhere.
Tensors are [..., C, channels]; what precedes is a batch. A scalar gate has one channel.
"""

from __future__ import annotations

from typing import NamedTuple

from kdagen.ir.tensor import Gram, Span


class Level(NamedTuple):
    """What the adjoint of a Tree reads of one level: operands as they met, and the decays of a pair's two blocks."""

    size: int
    late: object
    early: object
    first: object
    second: object

    def halves(self, rows, cols) -> tuple:
        return halves(rows, cols, self.size)


class Tree:
    """Midpoint tree: readers and writers, decayed in place while blocks of 1, 2, 4 .. tokens are joined in pairs.

    `rows` [..., C, readers, K] are decayed from their block's start, `cols` [..., C, writers, K] to its end, so that a
    pair's second rows meet its first columns about the last token of its first block, with factors <= 1 throughout.
    At the end, with one block to the chunk, they are the operands that meet the state.
    """

    def __init__(self, op: Gram, readers: list, writers: list, g, arena, keep_levels: bool = False):
        import torch

        self.size, self.arena, self.keep_levels, self.levels = 1, arena, keep_levels, []
        self.total = self.decay = exp(g, arena.take("tree decay 1", g.shape))  # of each whole block; of each token
        self.rows, self.cols = (
            arena.take(name, (*g.shape[:-1], len(x), g.shape[-1]))
            for name, x in (("tree rows", readers), ("tree cols", writers))
        )
        for row, z, after in zip(self.rows.unbind(-2), readers, op.after, strict=True):
            torch.mul(z, self.total, out=row) if after else row.copy_(z)
        for col, x in zip(self.cols.unbind(-2), writers, strict=True):
            col.copy_(x)

    def fill(self, outs: list[list]) -> Tree:
        """Writes all that lies below the diagonal of outs[r][s]."""
        while self.size < outs[0][0].shape[-1]:
            late, early = halves(self.rows, self.cols, self.size)
            level = product(late.flatten(-3, -2), early.flatten(-3, -2).mT, out=self.level(late, early))
            level = level.unflatten(-1, early.shape[-3:-1]).unflatten(-3, late.shape[-3:-1])
            for r, row in enumerate(outs):
                for s, out in enumerate(row):
                    below(out, self.size).copy_(level[..., r, :, s])
            self.join(late, early)
        return self

    def level(self, late, early):
        """Where a level's products go."""
        shape = (*late.shape[:-3], late.shape[-3] * late.shape[-2], early.shape[-3] * early.shape[-2])
        return self.arena.take("tree level", shape)

    def join(self, late, early) -> None:
        """Rows of the second blocks gain the first's whole decay, columns of the first the second's."""
        import torch

        first, second = self.total.unflatten(-2, (-1, 2)).unbind(-2)
        if self.keep_levels:
            kept = (self.arena.take(f"tree {n} {self.size}", x.shape).copy_(x) for n, x in (("l", late), ("e", early)))
            self.levels.append(Level(self.size, *kept, first, second))
        late *= first[..., None, None, :]
        early *= second[..., None, None, :]
        self.size *= 2
        self.total = torch.mul(first, second, out=self.arena.take(f"tree decay {self.size}", first.shape))


def halves(rows, cols, size: int) -> tuple:
    """Rows of each pair's second block and columns of its first, [..., pairs, size, readers or writers, K]."""
    late, early = (x.unflatten(-3, (-1, 2, size)) for x in (rows, cols))
    return late[..., 1, :, :, :], early[..., 0, :, :, :]


class Spans:
    """exp of the log decay over parts of blocks of `size` tokens: `double` joins blocks in pairs.

    `through` spans a block's start through token i, `rest` what follows token i up to the block's end.
    """

    def __init__(self, g, arena):
        self.size = 1
        self.through = exp(g, arena.take("spans through", g.shape))
        self.rest = arena.take("spans rest", g.shape).fill_(1)

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


def gram(op: Gram, readers: list, writers: list, factors: list | None, outs: list[list]) -> None:
    """Without decay or with one rate a head: products first, then C x C decay matrices; zero above the diagonal."""
    factors = factors or [None] * len(readers)
    for row, z, factor, diagonal in zip(outs, readers, factors, op.diagonal, strict=True):
        for out, x, kept in zip(row, writers, diagonal, strict=True):
            product(z, x.mT, out=out)
            if factor is not None:
                out *= factor
            out.tril_(0 if kept else -1)


def tree_gram(op: Gram, readers: list, writers: list, g, outs: list[list], arena, keep_levels: bool = False) -> Tree:
    """With one rate a channel: the tree; `outs` must be zero above the diagonal, and there they stay."""
    import torch

    for row, z, diagonal in zip(outs, readers, op.diagonal, strict=True):
        for out, x, kept in zip(row, writers, diagonal, strict=True):
            if kept:
                terms = torch.mul(z, x, out=arena.take("tree rows", torch.broadcast_shapes(z.shape, x.shape)))
                torch.sum(terms, -1, out=out.diagonal(dim1=-2, dim2=-1))
    return Tree(op, readers, writers, g, arena, keep_levels).fill(outs)


def decay_matrices(op: Gram, spans: Spans, shape, arena) -> list:
    """The C x C matrix of decays from j to i for each reader, 1 on the diagonal."""
    import torch

    matrix = arena.take("decay matrix", shape, zero=True)
    matrix.diagonal(dim1=-2, dim2=-1).fill_(1)
    while spans.size < shape[-1]:
        through, rest = pairs(spans.through, spans.size)[..., 1, :, :], pairs(spans.rest, spans.size)[..., 0, :, :]
        torch.mul(through, rest.mT, out=below(matrix, spans.size))
        spans.double()
    before = matrix if all(op.after) else shifted(matrix)
    before.diagonal(dim1=-2, dim2=-1).fill_(1)
    return [matrix if after else before for after in op.after]


def exp(x, out):
    """exp(x) into `out`; copied first: torch exponentiates strided tensors row by row, up to 5x slower."""
    return out.copy_(x).exp_()


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
    a, b, flat = packed(a), packed(b), out.view(-1, *shape[-2:])
    if add is None:
        torch.bmm(a, b, out=flat)
    elif add is out:
        flat.baddbmm_(a, b)
    else:
        torch.baddbmm(add.flatten(0, -3), a, b, out=flat)
    return out


def packed(x):
    """Matrices [batch, rows, columns] each in one piece, or each transpose: as BLAS sums otherwise what lies otherwise.

    Else rows would lie apart or not as there is one sequence or several.
    """
    if x.stride(-2) == 1 and x.stride(-1) == x.shape[-2] > 1:
        return x.mT.flatten(0, -3).mT
    one_piece = x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
    return (x if one_piece else x.contiguous()).flatten(0, -3)
