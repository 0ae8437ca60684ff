"""A thread block under construction: buffers and statements, in the order in which they are added.

Buffers end in _in (arguments), _w (workspaces), _s (shared) or _f (fragments), so that no name a user gives to an
argument can clash with them or with the indices b h n i j.
"""

from __future__ import annotations

from collections.abc import Callable

from kdagen.ir.tile import Buffer, Statement

Access = Callable[..., str]  # index texts -> text that reads the element


class Block:
    """Collects what a kernel declares and does; names are unique."""

    def __init__(self):
        self.buffers: dict[str, Buffer] = {}
        self.statements: list[Statement] = []

    def declare(self, buffer: Buffer) -> str:
        """Add a buffer (an equal one may be declared again); returns its name."""
        known = self.buffers.setdefault(buffer.name, buffer)
        assert known == buffer, f"{buffer} clashes with {known}"
        return buffer.name

    def shared(self, name: str, *shape: int, dtype: str = "float32") -> str:
        """A buffer in shared memory, called `name`_s."""
        return self.declare(Buffer(f"{name}_s", shape, dtype, "shared"))

    def fragment(self, name: str, *shape: int, dtype: str = "float32") -> str:
        """A buffer in registers, spread over the block's threads, called `name`_f."""
        return self.declare(Buffer(f"{name}_f", shape, dtype, "fragment"))

    def add(self, *statements: Statement) -> None:
        """Append statements in program order."""
        self.statements += statements


def element(name: str) -> Access:
    """Access to a buffer's elements by all its indices."""
    return lambda *index: f"{name}[{', '.join(index)}]"


def shifted(offset: int, index: str) -> str:
    """The text of offset + index."""
    return f"{offset} + {index}" if offset else index
