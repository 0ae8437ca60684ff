"""What a kernel moves and computes, read off its tile IR: no hardware, no run.

Every block's loads and stores count, so an operand that two V tiles both fetch counts twice; a cache may save some.
"""

from __future__ import annotations

import ast
from functools import cache

from kdagen.ir.tile import BYTES, Buffer, Copy, Gemm, Kernel, Map, Statement, base, subscripts, texts


def chunk_flops(kernel: Kernel) -> int:
    """FLOPs of the matrix products of a chunk of one head."""
    products = sum(2 * m * n * k for s in kernel.statements if isinstance(s, Gemm) for m, n, k in [s.size])
    return products * _tiles(kernel)


def flops_a_token(kernel: Kernel) -> float:
    """The same a token of a head; of kernels without chunks none are counted."""
    return chunk_flops(kernel) / kernel.chunk_size if kernel.chunk_size else 0.0


def bytes_a_token(kernel: Kernel) -> float:
    """Bytes between memory and chip a token and head, for whole chunks; a sequence's first and last state left out.

    In decoding a state is read and written for the one token that a sequence has, and counts.
    """
    chunk = sum(_moved(kernel, s) for s in kernel.loads + kernel.body + kernel.stores)
    if any(name.endswith("segment") for name, _ in kernel.grid):  # what a block reads first, and leaves, is a segment's
        chunk += sum(_moved(kernel, s) for s in kernel.before + kernel.after) / kernel.segment
    return chunk * _tiles(kernel) / kernel.chunk_size


def _tiles(kernel: Kernel) -> int:
    """Blocks that share a chunk of a head: the V tiles."""
    factor = next((e for name, e in kernel.grid if name.startswith("tile")), "1")
    return int(factor.split()[0])


def _moved(kernel: Kernel, statement: Statement) -> float:
    known = {b.name: b for b in kernel.params}
    if isinstance(statement, Copy):
        return sum(_region_bytes(text, known[base(text)]) for text, _ in texts(statement) if base(text) in known)
    return sum(_element_bytes(statement, known)) / statement.every if isinstance(statement, Map) else 0


def _element_bytes(statement: Map, known: dict[str, Buffer]):
    """Bytes of each global buffer that a Map touches: an element for every index that its subscripts mention."""
    extents = dict(statement.loops)
    touched = {text for text, _ in texts(statement)}
    for access in {a for text in touched for a in _accesses(text)}:
        name = base(access)
        if name in known:
            size = BYTES[known[name].dtype]
            for index, extent in extents.items():
                size *= extent if index in _names(access) else 1
            yield size


@cache
def _accesses(text: str) -> tuple[str, ...]:
    """The subscripted names in an expression, as text."""
    nodes = ast.walk(ast.parse(text, mode="eval"))
    return tuple(ast.unparse(n) for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name))


def _names(text: str) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(text, mode="eval")) if isinstance(n, ast.Name)}


def _region_bytes(text: str, buffer: Buffer) -> int:
    """Size of a region; slices of symbolic start have constant extent."""
    size = BYTES[buffer.dtype]
    if not subscripts(text):
        return buffer.bytes
    index = ast.parse(text, mode="eval").body.slice
    for part in index.elts if isinstance(index, ast.Tuple) else (index,):
        if isinstance(part, ast.Slice):
            size *= _at_origin(part.upper) - _at_origin(part.lower)
    return size


def _at_origin(node: ast.expr) -> int:
    """An index expression's value where every name is zero."""
    names = {n.id: 0 for n in ast.walk(node) if isinstance(n, ast.Name)}
    return eval(compile(ast.Expression(node), "<index>", "eval"), {}, names)
