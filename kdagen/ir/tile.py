"""Tile IR: what one thread block does, in tiles of named buffers.

Unlike tensor IR it knows memory (global, shared, fragment), dtypes and the block's thread count; unlike
TileLang text it has no syntax of its own for loops over chunks or for pipelining: those come from the skeleton.
Scalar expressions and regions are text in Python's expression syntax ("k_s[i, j] * T.exp2(pre[i, j])");
`verify` parses them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from kdagen.errors import KdagenError

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}


@dataclass(frozen=True)
class Buffer:
    """A tensor in one memory; `role` says what a global one is to the op (see codegen.source.TensorSpec).

    A global one of role "scalar" is an integer passed by value, which expressions name without a subscript.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    scope: str  # "global", "shared" or "fragment" (registers, spread over the block)
    role: str = ""
    layout: str = ""  # of a fragment: which thread holds what, in TileLang's terms; chosen by TileLang if not given

    @property
    def bytes(self) -> int:
        """Size in bytes; only for buffers of fixed shape."""
        size = BYTES[self.dtype]
        for n in self.shape:
            size *= int(n)
        return size


@dataclass(frozen=True)
class Copy:
    """dst = src, tile by tile; casts to dst's dtype."""

    dst: str
    src: str
    eq: str = ""


@dataclass(frozen=True)
class Map:
    """For every index in `loops`, in parallel: bind `lets`, then make the assignments.

    With `serial` = (name, first, end) the assignments run in that order for each parallel index.
    With `where`, only indices satisfying it are assigned; `every` says of how many chunks one satisfies it as a rule.
    """

    loops: tuple[tuple[str, int], ...]
    assign: tuple[tuple[str, str], ...]
    lets: tuple[tuple[str, str], ...] = ()
    serial: tuple[str, int, int] | None = None
    where: str = ""
    every: float = 1
    eq: str = ""


@dataclass(frozen=True)
class RowSum:
    """dst[i] = sum_j src[i, j]; both fragments."""

    dst: str
    src: str
    eq: str = ""


@dataclass(frozen=True)
class ColSum:
    """dst[j] = sum_i src[i, j]; both fragments. Of a vector the sum of all, dst having one element."""

    dst: str
    src: str
    eq: str = ""
    batch: int = 1  # of the elements that a thread gets, how many are exchanged between warps at a time


@dataclass(frozen=True)
class Gemm:
    """acc (+)= op(a) @ op(b), fp32 accumulation; (m, n, k) is the product's size."""

    acc: str
    a: str
    b: str
    size: tuple[int, int, int]
    trans_a: bool = False
    trans_b: bool = False
    clear: bool = False
    eq: str = ""


@dataclass(frozen=True)
class Wait:
    """Until at most `pending` asynchronous products of this warpgroup are unfinished."""

    pending: int
    eq: str = ""


Statement = Copy | Map | RowSum | ColSum | Gemm | Wait


@dataclass(frozen=True)
class Kernel:
    """One kernel: its blocks run over `grid`; the skeleton decides how `loads`, `body` and `stores` are sequenced.

    In a kernel without a chunk loop (prepare, output) they run once. In a scan, `before` and `after` stand
    around the loop over chunks, and every iteration runs loads, body, stores. `lets` name what a block knows of its
    place: integers, from the grid's indices and the tensors that say which tokens are whose.
    """

    name: str
    family: str
    skeleton: str
    grid: tuple[tuple[str, str], ...]  # (index name, extent), x first: the only one that may be over 65,535
    threads: int
    stages: int
    buffers: tuple[Buffer, ...]
    loads: tuple[Statement, ...]
    body: tuple[Statement, ...]
    stores: tuple[Statement, ...]
    before: tuple[Statement, ...] = ()
    after: tuple[Statement, ...] = ()
    lets: tuple[tuple[str, str], ...] = ()
    chunk_lets: tuple[tuple[str, str], ...] = ()  # the same for each chunk of a loop
    doc: tuple[str, ...] = field(default=())
    chunk_size: int = 0
    segment: int = 1  # chunks that a block takes whose grid counts segments
    merged: bool = False  # whether shared buffers of one chunk may take each other's places, as their uses allow
    wgmma: bool = True  # whether products may use it, where the target has it

    @property
    def statements(self) -> tuple[Statement, ...]:
        return self.before + self.loads + self.body + self.stores + self.after

    @property
    def params(self) -> tuple[Buffer, ...]:
        return tuple(b for b in self.buffers if b.scope == "global")

    @property
    def shared_bytes(self) -> int:
        """Shared memory a block needs: loaded buffers once a stage; where they are merged, what is in use at once."""
        if self.merged:
            return max(sum(b.bytes for b in tiles) for tiles in self.in_use())
        staged = {base(s.dst) for s in self.loads if isinstance(s, Copy)}
        return sum(b.bytes * (self.stages if b.name in staged else 1) for b in self.buffers if b.scope == "shared")

    @property
    def attributes(self) -> tuple[str, ...]:
        """What the compiler is told of a program beside its text."""
        return ("merge_shared_memory",) * self.merged + ("no_wgmma",) * (not self.wgmma)

    def in_use(self) -> Iterator[list[Buffer]]:
        """The shared buffers in use at each statement of a chunk: from the first that touches one to the last."""
        touched = [reads(s) | writes(s) for s in self.loads + self.body + self.stores]
        first = {name: i for i, names in reversed(list(enumerate(touched))) for name in names}
        last = {name: i for i, names in enumerate(touched) for name in names}
        shared = [b for b in self.buffers if b.scope == "shared" and b.name in first]
        for i in range(len(touched)):
            yield [b for b in shared if first[b.name] <= i <= last[b.name]]


def base(region: str) -> str:
    """The buffer that a region's text names."""
    return region.split("[")[0]


def texts(statement: Statement) -> Iterator[tuple[str, bool]]:
    """Every expression in a statement, with whether it is written."""
    match statement:
        case Copy(dst, src) | RowSum(dst, src) | ColSum(dst, src):
            yield from ((src, False), (dst, True))
        case Gemm(acc, a, b):
            yield from ((a, False), (b, False), (acc, True))
        case Map():
            yield from ((value, False) for _, value in statement.lets)
            yield from ((value, False) for _, value in statement.assign)
            yield from ((dst, True) for dst, _ in statement.assign)
            if statement.where:
                yield statement.where, False


def reads(statement: Statement) -> set[str]:
    """Names of the buffers that a statement reads."""
    used = {name for text, written in texts(statement) for name, _ in subscripts(text) if not written}
    if isinstance(statement, Copy | RowSum | ColSum | Gemm):
        used |= {base(text) for text, written in texts(statement) if not written}
    if isinstance(statement, Gemm) and not statement.clear:
        used.add(statement.acc)
    return used


def writes(statement: Statement) -> set[str]:
    """Names of the buffers that a statement writes."""
    return {base(text) for text, written in texts(statement) if written}


@cache
def subscripts(text: str) -> tuple[tuple[str, int], ...]:
    """(name, number of indices) of every subscripted name in an expression."""
    found = []
    for node in ast.walk(ast.parse(text, mode="eval")):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            found.append((node.value.id, len(node.slice.elts) if isinstance(node.slice, ast.Tuple) else 1))
    return tuple(found)


def verify(kernel: Kernel) -> Kernel:
    """The kernel itself; KdagenError unless names are defined once, indices fit ranks, products' sizes are legal."""
    buffers = {b.name: b for b in kernel.buffers}
    if len(buffers) != len(kernel.buffers):
        raise KdagenError(f"{kernel.name}: a buffer is declared twice: {sorted(b.name for b in kernel.buffers)}")
    for name, text in kernel.lets + kernel.chunk_lets:
        _verify_text(kernel, text, buffers, f"{name} = {text}")
    for statement in kernel.statements:
        _verify_names(kernel, statement, buffers)
        if isinstance(statement, Gemm):
            _verify_gemm(kernel, statement, buffers)
    return kernel


def _verify_names(kernel: Kernel, statement: Statement, buffers: dict[str, Buffer]) -> None:
    for name in reads(statement) | writes(statement):
        if name not in buffers:
            raise KdagenError(f"{kernel.name}: '{statement.eq or statement}' uses '{name}', which is no buffer of it")
    for text, _ in texts(statement):
        _verify_text(kernel, text, buffers, text)


def _verify_text(kernel: Kernel, text: str, buffers: dict[str, Buffer], said: str) -> None:
    for name, rank in subscripts(text):
        if name not in buffers:
            raise KdagenError(f"{kernel.name}: '{said}' uses '{name}', which is no buffer of it")
        if rank != len(buffers[name].shape):
            raise KdagenError(
                f"{kernel.name}: '{text}' gives {rank} indices to {name}, which has shape {buffers[name].shape}"
            )


def _verify_gemm(kernel: Kernel, gemm: Gemm, buffers: dict[str, Buffer]) -> None:
    m, n, k = gemm.size
    acc = buffers[gemm.acc]
    if acc.scope != "fragment" or acc.dtype != "float32" or tuple(acc.shape) != (m, n):
        raise KdagenError(f"{kernel.name}: '{gemm.eq}' needs an fp32 fragment of {(m, n)}, but {gemm.acc} is {acc}")
    if m % 16 or n % 8 or k % 8:
        raise KdagenError(f"{kernel.name}: '{gemm.eq}' is {m} x {n} x {k}: m must be a multiple of 16, n and k of 8")


def show(kernel: Kernel) -> str:
    """A kernel as text, one statement a line."""
    lines = [f"{kernel.family} {kernel.name} <{kernel.skeleton}, {kernel.threads} threads> over {kernel.grid}"]
    lines += [f"  {b.scope} {b.name}: {b.dtype}{list(b.shape)} {b.role}".rstrip() for b in kernel.buffers]
    lines += [f"  let {name} = {text}" for name, text in kernel.lets + kernel.chunk_lets]
    for part in ("before", "loads", "body", "stores", "after"):
        lines += [f"  {part}: {_line(s)}" for s in getattr(kernel, part)]
    return "\n".join(lines)


def _line(s: Statement) -> str:
    match s:
        case Copy():
            text = f"{s.dst} = {s.src}"
        case RowSum():
            text = f"{s.dst} = rowsum({s.src})"
        case ColSum():
            text = f"{s.dst} = colsum({s.src})"
        case Gemm():
            a, b = s.a + ".T" * s.trans_a, s.b + ".T" * s.trans_b
            text = f"{s.acc} {'=' if s.clear else '+='} {a} @ {b}"
        case Wait():
            text = f"wait({s.pending})"
        case Map():
            text = "; ".join(f"{d} = {v}" for d, v in s.lets + s.assign)
            text += f" for {', '.join(f'{i} < {n}' for i, n in s.loops)}" + (f" where {s.where}" if s.where else "")
    return text + (f"    # {s.eq}" if s.eq else "")
