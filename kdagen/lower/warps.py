"""Whether the warps of a block can share a product: TileLang refuses one that it cannot cut into equal tiles."""

from __future__ import annotations

from kdagen.ir.canonical import Canonical
from kdagen.target import Target


def divides(rows: int, cols: int, threads: int, target: Target, wgmma: bool = True) -> bool:
    """Whether some grid of warps gives each 16 rows and 8 columns, or multiples of these.

    With wgmma, taken from 64 rows and 4 warps up, the 4 warps of a group stand above one another.
    """
    warps = threads // 32
    grouped = wgmma and target.warp_specialised and rows >= 64 and warps % 4 == 0
    grid = (n for n in range(4 if grouped else 1, warps + 1, 4 if grouped else 1) if warps % n == 0)
    return any(rows % (16 * n) == 0 and cols % (8 * warps // n) == 0 for n in grid)


def prepare_threads(canonical: Canonical, chunk: int, target: Target, tree: bool = False) -> int:
    """As many threads as there is work for and divide each product; 64 always do.

    The tree's accumulators, without wgmma, want the registers of twice as many.
    """
    solved = max(1, len(canonical.solving)) * chunk
    gram = len(canonical.readers) * chunk, len(canonical.streams) * chunk
    for threads in (256, 128) if tree and chunk > 16 else (128,):
        if solved > 16 and all(divides(*s, threads, target, not tree) for s in (gram, (solved, solved))):
            return threads
    return 64
