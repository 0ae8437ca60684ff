"""(I - L)^{-1} of a strictly lower triangular L in shared memory, by matrix products only.

16 x 16 diagonal blocks by the exact nilpotent product (I + L)(I + L^2)(I + L^4)(I + L^8), then pairs of
inverted blocks are merged, 16 -> 32 -> 64: [[A, 0], [B M A, B]] with M the block of L between them.
Products are fp32 operands truncated to tf32, so that the range of L is that of fp32.
"""

from __future__ import annotations

from kdagen.ir.tile import Copy, Gemm, Map
from kdagen.lower.block import Block

BLOCK = 16


def solve_tril(block: Block, matrix: str, n: int) -> str:
    """Append the inversion of I - matrix; returns the shared buffer that holds the inverse."""
    power, inverse = block.shared("power", n, n), block.shared("inverse", n, n)
    entries = (("i", n), ("j", n))
    x, p = block.fragment("x", n, n), block.fragment("p", n, n)
    diagonal = f"{matrix}[i, j]" if n == BLOCK else f"T.if_then_else(i // {BLOCK} == j // {BLOCK}, {matrix}[i, j], 0.0)"
    block.add(
        Map(entries, ((f"{power}[i, j]", diagonal),), eq=f"L, {BLOCK} x {BLOCK} diagonal blocks"),
        Map(entries, ((f"{x}[i, j]", f"T.if_then_else(i == j, 1.0, {power}[i, j])"),), eq="X = I + L"),
    )
    for step in (2, 4, 8):
        block.add(
            Gemm(p, power, power, (n, n, n), clear=True, eq=f"L^{step}"),
            Copy(inverse, x),
            Copy(power, p),
            Gemm(x, inverse, power, (n, n, n), eq=f"X = X (I + L^{step})"),
        )
    half = BLOCK
    while half < n:
        _merge(block, matrix, n, half)
        half *= 2
    block.add(Copy(inverse, x))
    return inverse


def _merge(block: Block, matrix: str, n: int, half: int) -> None:
    pair = 2 * half
    between = f"T.And(i // {pair} == j // {pair}, T.And(i % {pair} >= {half}, j % {pair} < {half}))"
    block.add(
        Copy("inverse_s", "x_f"),
        Map(
            (("i", n), ("j", n)),
            (("power_s[i, j]", f"T.if_then_else({between}, {matrix}[i, j], 0.0)"),),
            eq=f"M: L between pairs of {half}-row blocks",
        ),
        Gemm("p_f", "inverse_s", "power_s", (n, n, n), clear=True, eq="B M"),
        Copy("power_s", "p_f"),
        Gemm("x_f", "power_s", "inverse_s", (n, n, n), eq="X += B M A"),
    )
