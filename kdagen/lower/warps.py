"""Whether the warps of a block can share a product: TileLang refuses one that it cannot cut into equal tiles."""

from __future__ import annotations

from kdagen.ir.canonical import Canonical
from kdagen.target import Target


def divides(rows: int, cols: int, threads: int, target: Target) -> bool:
    """Whether some grid of warps gives each 16 rows and 8 columns, or multiples of these.

    With wgmma, taken from 64 rows and 4 warps up, the 4 warps of a group stand above one another.
    """
    warps = threads // 32
    grouped = target.warp_specialised and rows >= 64 and warps % 4 == 0
    grid = (n for n in range(4 if grouped else 1, warps + 1, 4 if grouped else 1) if warps % n == 0)
    return any(rows % (16 * n) == 0 and cols % (8 * warps // n) == 0 for n in grid)


def prepare_threads(canonical: Canonical, chunk: int, target: Target) -> int:
    """128 threads where there is work for them and they divide each product; 64 always do."""
    solved = max(1, len(canonical.solving)) * chunk
    gram = len(canonical.readers) * chunk, len(canonical.streams) * chunk
    return 128 if solved > 16 and all(divides(*s, 128, target) for s in (gram, (solved, solved))) else 64
