"""What passes from prepare to scan and output through global memory, and how it is packed.

Few large copies beat many small ones, so operands of equal width share a tensor, one above the other:
`keys_w` holds the K-wide operands of a chunk, `mixN_w` the matrices N columns wide, `gamma_w` the chunk's whole decay.
Rows of interleaved values are stored stream by stream (row s * C + i), which the scan's products may
choose freely as long as all operands agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdagen.ir.tensor import Interleave, Load, Map, MatMul, Program, Value
from kdagen.ir.tile import Buffer
from kdagen.state import DEFAULT, StateType


def streams(dim: str) -> int:
    """How many streams a row dimension interleaves: 1 for "C", r for "rC"."""
    return int(dim[:-1] or 1)


@dataclass(frozen=True)
class Packed:
    """Where a prepared value lies: rows [row, row + rows) of a workspace tensor."""

    buffer: str
    row: int
    rows: int
    cols: int


@dataclass(frozen=True)
class Part:
    """A C x V operand of the scan: an argument as it is, or a workspace that prepare fills."""

    name: str
    value: Value
    is_argument: bool


class Workspace:
    """Packing of a program's prepared values for one chunk size, head dims and operand dtype; the type of states."""

    def __init__(self, program: Program, chunk_size: int, dims: dict[str, int], dtype: str, state: StateType = DEFAULT):
        self.program, self.chunk_size, self.dims, self.dtype, self.state = program, chunk_size, dims, dtype, state
        self.producer = {o.out.name: o for o in program.prepare if not hasattr(o, "outs")}
        self.packed: dict[str, Packed] = {}
        self.parts: dict[str, tuple[Part, ...]] = {}
        self.gamma: Value | None = None
        self.heights: dict[str, int] = {}
        for value in self._crossing():
            self._place(value)

    def _crossing(self) -> list[Value]:
        """Prepared values that scan or output read, each once, in order of use."""
        prepared = {v.name for op in self.program.prepare for v in _outs(op)}
        used = [v for op in self.program.scan + self.program.output for v in operands(op)]
        return list({v.name: v for v in used if v.name in prepared}.values())

    def _place(self, value: Value) -> None:
        if value.dims in (("K",), ()):
            self.gamma = value
        elif value.dims[1] == "V":
            self.parts[value.name] = self._parts(value)
        else:
            self._pack(value)

    def _pack(self, value: Value) -> None:
        rows, cols = (self.size(d) for d in value.dims)
        buffer = "keys_w" if value.dims[1] == "K" else f"mix{cols}_w"
        start = self.heights.get(buffer, 0)
        self.packed[value.name] = Packed(buffer, start, rows, cols)
        self.heights[buffer] = start + rows

    def _parts(self, value: Value) -> tuple[Part, ...]:
        op = self.producer[value.name]
        if isinstance(op, Interleave):
            return tuple(p for row in op.parts for p in self._parts(row[0]))
        if isinstance(op, Load):
            return (Part(op.argument.name, value, True),)
        return (Part(f"{value.name}_w", value, False),)

    def size(self, dim: str) -> int:
        """Rows or channels that a named dimension stands for."""
        return self.dims[dim] if dim in self.dims else streams(dim) * self.chunk_size

    def buffers(self) -> tuple[Buffer, ...]:
        """The workspace tensors, laid out so that each head's chunks follow each other."""
        lead = ("HV", "NC")
        found = [
            Buffer(name, (*lead, rows, self._width(name)), self.dtype, "global", "workspace")
            for name, rows in self.heights.items()
        ]
        if self.gamma is not None:
            found.append(Buffer("gamma_w", (*lead, self.dims["K"]), "float32", "global", "workspace"))
        made = {p.name: p for parts in self.parts.values() for p in parts if not p.is_argument}
        tail = (self.chunk_size, self.dims["V"])
        return (*found, *(Buffer(n, (*lead, *tail), self.dtype, "global", "workspace") for n in made))

    def _width(self, name: str) -> int:
        return next(p.cols for p in self.packed.values() if p.buffer == name)


def operands(op) -> list[Value]:
    """The values that an op of scan or output reads."""
    if isinstance(op, Map):
        return [v for v, _ in op.operands]
    assert isinstance(op, MatMul), op
    return [v for term in op.terms for v in term[:2]] + ([op.add] if op.add else [])


def _outs(op) -> list[Value]:
    return [v for row in op.outs for v in row] if hasattr(op, "outs") else [op.out]
