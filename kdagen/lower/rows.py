"""Which tokens a block works on: what kernels are told of sequences, and the names that they bind from it.

All tokens lie in a row, one sequence behind the other (`cu_seqlens`, as in FLA and flash attention). A chunk holds
tokens of one sequence; how many chunks there are is known on the GPU alone, but no more than NC = T // C + N. So each
sequence s owns the slots from cu_seqlens[s] // C + s on, which never meet those of the next, and an index kernel writes
down what lies in each slot. Rows and lengths are clamped to the tensors: nothing that cu_seqlens says leads outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kdagen.ir.tile import Buffer, Kernel, Map

CU_SEQLENS = Buffer("cu_seqlens", ("N1",), "int32", "global", "cu_seqlens")
CHUNK_ROWS = Buffer("chunk_rows", ("NC", 2), "int32", "global", "workspace")  # first row, how many: 0 to chunk_size
SEGMENTS = Buffer("segments", ("NG", 2), "int32", "global", "workspace")  # first chunk slot, how many: 0 to segment
SEQUENCE_OF = Buffer("sequence_of", ("NG",), "int32", "global", "workspace")  # whose the segment in each slot is
KEY_HEAD = ("hk", "T.alloc_var('int32', init=T.truncdiv(h * H, HV))")  # in a register: a division is long
THREADS = 128

Lets = tuple[tuple[str, str], ...]


class Place(NamedTuple):
    """Where a chunk lies: its slot in workspaces, its first token, how many it has (at least so many, up to C)."""

    slot: str
    row: str
    rows: str


CHUNK = Place("n", "row", "rows")  # of a kernel whose blocks take a chunk each


def in_sequence(n: str, chunk: int) -> Place:
    """Chunk `n` of a block's sequence."""
    return Place(f"first + {n}", f"start + {n} * {chunk}", f"length - {n} * {chunk}")


def of_chunk(slot: str = "n") -> Lets:
    """`row`, the first token of the chunk in a slot, and `rows`, how many it has."""
    return (
        ("row", f"T.max(T.min(chunk_rows[{slot}, 0], tokens), 0)"),
        ("rows", f"T.min(chunk_rows[{slot}, 1], tokens - row)"),
    )


def of_sequence(chunk: int) -> Lets:
    """`start` and `length` of sequence b, `first`, the slot of its first chunk, and `chunks`, how many it has."""
    return (
        ("start", "T.max(T.min(cu_seqlens[b], tokens), 0)"),
        ("length", "T.min(T.max(cu_seqlens[b + 1], start), tokens) - start"),
        ("first", f"start // {chunk} + b"),
        ("chunks", f"(length + {chunk - 1}) // {chunk}"),
    )


def most_tokens(chunk: int, sequences: str = "N") -> Lets:
    """`tokens` where no tensor has a row for each: not fewer than there are, and none beyond the slots."""
    return (("tokens", f"(NC - {sequences} + 1) * {chunk} - 1"),)


def of_segment(segment: int) -> Lets:
    """`from_slot`, the slot of the first chunk of the block's segment, and `chunks`, how many it has."""
    return (
        ("from_slot", "T.max(segments[segment, 0], 0)"),
        ("chunks", f"T.min(T.min(segments[segment, 1], {segment}), NC - from_slot)"),
    )


class Over(NamedTuple):
    """What the blocks of a scan take each: the grid's index and its extent, what they bind, the tables that they read.

    `chunks` of these lets says how many chunks a block takes, `place` where the n-th of them lies.
    """

    index: str
    extent: str
    lets: Lets
    tables: tuple[Buffer, ...]
    place: Place
    segment: int = 1  # how many chunks at most, where that is known


def sequences(chunk: int) -> Over:
    """Blocks that take a sequence each."""
    return Over("b", "N", of_sequence(chunk), (CU_SEQLENS,), in_sequence("n", chunk))


def segments(chunk: int, split: int, followed: bool = False) -> Over:
    """Blocks that take a segment of `split` chunks each; none of it where it must be `followed` by more, but is not.

    `left` is how many chunks the sequence has from the segment on, none in a slot that holds nothing.
    """
    *place, (_, chunks) = of_sequence(chunk)
    lets = (
        ("b", "T.max(T.min(sequence_of[segment], N1 - 2), 0)"),
        *place,
        ("total", chunks),
        ("before", f"T.max(segment - start // {chunk * split} - b, 0)"),
        ("skipped", f"T.min(before, (total + {split - 1}) // {split}) * {split}"),
        ("left", "T.max(total - skipped, 0)"),
        ("chunks", f"T.if_then_else(left > {split}, {split}, {0 if followed else 'left'})"),
    )
    return Over("segment", "NG", lets, (CU_SEQLENS, SEQUENCE_OF), in_sequence("(skipped + n)", chunk), split)


def carried(chunk: int, split: int, pieces: int = 1) -> Over:
    """Blocks that take a sequence each, from segment to segment up to the `last`, which is not gone through.

    Of each segment, slot by slot from `first` on, they take that many pieces one after another.
    """
    tokens = chunk * split
    lets = (
        ("start", "T.max(cu_seqlens[b], 0)"),
        ("length", "T.max(cu_seqlens[b + 1], start) - start"),
        ("first", f"T.min(start // {tokens} + b, NG - 1)"),
        ("last", f"T.min(first + T.max(length - 1, 0) // {tokens}, NG - 1)"),
        ("chunks", f"(last - first) * {pieces}"),
    )
    slot = f"first + n // {pieces}" if pieces > 1 else "first + n"
    return Over("b", "N", lets, (CU_SEQLENS,), Place(slot, "", ""))


def tile_of(tiles: int, what: str) -> tuple[tuple[str, str], Lets]:
    """A grid dimension that holds V tiles and, outside them, `what` = (index, extent); and the two indices."""
    index, extent = what
    return (f"tile_{index}", f"{tiles} * {extent}"), (
        ("tile", f"tile_{index} % {tiles}"),
        (index, f"tile_{index} // {tiles}"),
    )


def lower_index(name: str, chunk: int, segment: int = 0, split: int = 0) -> Kernel:
    """The kernel that fills `chunk_rows` and, where there are segments of so many chunks, `segments` or `sequence_of`.

    One block a sequence, which writes all slots up to those of the next; the last one's block those that are left too.
    """
    tables = [_table(CHUNK_ROWS, "NC", chunk, "start", "length", chunk)]
    if segment:
        tables.append(_table(SEGMENTS, "NG", chunk * segment, f"start // {chunk} + b", "chunks", segment, segment))
    if split:
        tables.append(_slots("NG", chunk * split, lambda slot, own: ((f"{SEQUENCE_OF.name}[{slot}]", "b"),), split))
    return Kernel(
        name=f"{name}_index",
        family="index",
        skeleton="index",
        grid=(("b", "N1 - 1"),),
        threads=THREADS,
        stages=1,
        buffers=(CU_SEQLENS, CHUNK_ROWS, *[SEGMENTS] * bool(segment), *[SEQUENCE_OF] * bool(split)),
        lets=(
            *most_tokens(chunk, "(N1 - 1)"),
            *of_sequence(chunk),
            ("end", f"T.if_then_else(b == N1 - 2, NC, (start + length) // {chunk} + b + 1)"),
            ("steps", f"(end - first + {THREADS - 1}) // {THREADS}"),
        ),
        loads=(),
        body=tuple(tables),
        stores=(),
        chunk_size=chunk * THREADS,  # tokens that an iteration speaks of
    )


def _table(table: Buffer, slots: str, tokens: int, begin: str, count: str, unit: int, every=1) -> Map:
    """Entry i of a sequence, a slot for each `tokens` of its own: begin + i unit, and what is left of count."""

    def entry(slot: str, own: str):
        left = f"T.max(T.min({count} - ({own}) * {unit}, {unit}), 0)"
        return (f"{table.name}[{slot}, 0]", f"{begin} + ({own}) * {unit}"), (f"{table.name}[{slot}, 1]", left)

    return _slots(slots, tokens, entry, every)


def _slots(slots: str, tokens: int, entry: Callable, every: int) -> Map:
    """All slots of a sequence, one for each `tokens` of its own: entry(slot, its number in the sequence)."""
    own = f"step * {THREADS} + i"
    slot = f"start // {tokens} + b + {own}"
    end = f"T.if_then_else(b == N1 - 2, {slots}, (start + length) // {tokens} + b + 1)"
    return Map(
        (("i", THREADS),), entry(slot, own), where=f"{slot} < {end}", every=every, eq=f"slots of {tokens} tokens"
    )
