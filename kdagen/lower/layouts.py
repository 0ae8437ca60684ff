"""Which thread of a block holds what of a tile, or of a vector, in TileLang's terms.

TileLang chooses layouts by itself; here are those that a kernel insists on, so that memory is read and written in
vectors of 16 bytes and sums go over few threads.
"""

from __future__ import annotations

from kdagen.errors import ScheduleError
from kdagen.ir.tile import BYTES

LANES = 32


class Tile:
    """How a tile of the state lies in threads: rows by columns, the columns being what is contiguous in memory.

    `lanes` threads stand beside one another on a row, with vectors of 16 bytes each; `rows` rows are held at a time.
    """

    def __init__(self, shape: tuple[int, int], dtype: str, threads: int):
        self.shape, self.vector = shape, 16 // BYTES[dtype]
        self.lanes = min(shape[1] // self.vector, LANES)
        self.rows = threads // max(self.lanes, 1)
        if not threads or self.rows * self.lanes != threads or shape[0] % self.rows:
            raise ScheduleError(
                f"{threads} threads cannot share a tile of the state of {shape[0]} x {shape[1]} as {dtype} in vectors "
                f"of 16 bytes: choose another v_tile or threads, such as 32 and 128"
            )

    @property
    def whole(self) -> str:
        """Which thread holds element (i, j) of the tile, and where."""
        lane, at = _column("j", self.vector, self.lanes)
        index = f"i // {self.rows} * {self.shape[1] // self.lanes} + {at}"
        return _fragment(self.shape, "i, j", f"i % {self.rows} * {self.lanes} + {lane}", index)

    @property
    def of_columns(self) -> str:
        """The same of a vector along a row: each thread holds the columns that it has of the tile."""
        return along(self.shape[1], self.vector, self.lanes, self.rows)

    @property
    def of_rows(self) -> str:
        """The same of a vector down the columns."""
        thread = f"i % {self.rows} * {self.lanes} + rep"
        return _fragment(self.shape[:1], "i", thread, f"i // {self.rows}", self.lanes)


def along(extent: int, vector: int, lanes: int, copies: int) -> str:
    """The layout of a vector: vectors of some elements on so many lanes beside one another, and copies of it all."""
    lane, at = _column("j", vector, lanes)
    return _fragment((extent,), "j", f"rep * {lanes} + {lane}" if copies > 1 else lane, at, copies)


def _column(j: str, vector: int, lanes: int) -> tuple[str, str]:
    """The lane that holds column j, and where."""
    return f"{j} // {vector} % {lanes}", f"{j} // {vector * lanes} * {vector} + {j} % {vector}"


def _fragment(shape: tuple[int, ...], names: str, thread: str, index: str, copies: int = 1) -> str:
    """A layout in TileLang's terms; of several copies, `thread` holds the one numbered `rep`."""
    copied = (", rep", f", replicate={copies}") if copies > 1 else ("", "")
    holder = f"lambda {names}{copied[0]}: {thread}{copied[1]}"
    return f"T.Fragment({shape}, None, {holder}, forward_index_fn=lambda {names}: {index})"
