"""The inverse of unit lower triangular matrices on torch, in batches."""

from __future__ import annotations

from kdagen.ir.decayed_products import below, product

SUBSTITUTED = 16  # torch solves one small system after another on one core, but multiplies a batch on all of them


def inverse(a, out, arena):
    """(I - a)^-1 of strictly lower triangular matrices, into `out`, which must be zero above the diagonal.

    Substitution in blocks of SUBSTITUTED rows; then blocks are joined in pairs, [[A, 0], [B a A, B]].
    """
    import torch

    n = a.shape[-1]
    size = SUBSTITUTED if n % SUBSTITUTED == 0 and n & (n - 1) == 0 else n
    eye = torch.eye(size, dtype=a.dtype, device=a.device)
    block = torch.neg(diagonal_blocks(a, size), out=arena.take("inverse block", (*a.shape[:-2], n // size, size, size)))
    diagonal_blocks(out, size).copy_(torch.linalg.solve_triangular(block, eye, upper=False, unitriangular=True))
    while size < n:
        first, second = diagonal_blocks(out, size).unflatten(-3, (-1, 2)).unbind(-3)
        below(out, size).copy_(product(second, product(below(a, size), first)))
        size *= 2
    return out


def diagonal_blocks(matrix, size: int):
    """Of [..., n, n] the blocks [..., n / size, size, size] on the diagonal."""
    tiles = matrix.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
