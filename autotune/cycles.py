"""Cycles that a block needs for an iteration of a kernel, by its tile IR: how long it takes, how long it keeps busy.

Statements go in order; products that are asynchronous go on beside what follows, until a Wait. The tables are
assumptions, from published microbenchmarks of Ampere to Blackwell (a step of wgmma 16 to 32 cycles, memory 500 to 800,
a barrier 20 to 40); none is fitted to a measured kernel.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

from kdagen.autotune.gpus import Gpu
from kdagen.autotune.tiles import Tile

from kdagen.ir.tile import BYTES, Buffer, ColSum, Gemm, Map, RowSum, Wait, base, reads, texts, writes

# What a processor does a cycle, by the unit that does it.
RATES = {"arithmetic": 128, "functions": 16, "shared": 128, "global": 64}  # operations, of them exp2 and log, bytes
OF_THREADS = ("arithmetic", "functions")
LANES = 128  # threads, a warp for each of a processor's four schedulers and tensor cores
FUNCTIONS = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sigmoid", "tanh", "log1p")
REUSE = 2  # rows that a thread has of a tile, for which it reads once what does not depend on the row


@dataclass(frozen=True)
class Latencies:
    """Cycles, beyond the work itself, that nothing else of the block can fill."""

    product: int  # from the last step of a product to the use of its sums
    step: int  # of a product, 16 deep
    map: int  # of an elementwise loop
    sum: int  # of a sum across threads
    barrier: int  # before what other threads wrote to shared memory is read
    fetch: int  # from memory
    overlap: bool  # whether blocks that share a processor keep all its units busy at a time, or one after another


LEAST = Latencies(product=20, step=16, map=20, sum=60, barrier=16, fetch=450, overlap=True)
USUAL = Latencies(product=60, step=24, map=30, sum=100, barrier=40, fetch=800, overlap=False)


@dataclass(frozen=True)
class Cycles:
    """What an iteration of a block takes by itself, and how long it keeps its processor busy."""

    latency: float
    busy: float


@cache
def cycles(tile: Tile, gpu: Gpu, latencies: Latencies) -> Cycles:
    """An iteration: of a scan a chunk, of other kernels all that a block does; tiles that are loaded ahead left out."""
    return _Timeline(tile, gpu, latencies).run()


class _Timeline:
    """The clock of a block, and when its products end."""

    def __init__(self, tile: Tile, gpu: Gpu, latencies: Latencies):
        self.kernel, self.latencies, self.asynchronous = tile.kernel, latencies, tile.specialised
        self.few = max(1.0, LANES / self.kernel.threads)  # how much longer too few threads take than a processor can
        self.flops = gpu.flops / gpu.processors / gpu.clock  # of a processor's tensor cores a cycle
        self.buffers = {b.name: b for b in self.kernel.buffers}
        self.now = self.tensor_free = self.tensor_work = 0.0
        self.work: Counter[str] = Counter()
        self.pending: list[float] = []
        self.unread: set[str] = set()  # shared buffers that were written since the last barrier
        self.fetching = False

    def run(self) -> Cycles:
        for statement in self.kernel.body + self.kernel.stores:
            self.step(statement)
        self.wait(0)
        busy = self.together(self.work)
        return Cycles(self.now, max(busy, self.tensor_work) if self.latencies.overlap else busy + self.tensor_work)

    def step(self, statement) -> None:
        if isinstance(statement, Wait):
            self.wait(statement.pending)
            return
        if reads(statement) & self.unread:
            self.now += self.latencies.barrier
            self.unread.clear()
        if isinstance(statement, Gemm):
            self.gemm(statement)
        else:
            self.elementwise(statement)
        self.unread |= {n for n in writes(statement) if self.buffers[n].scope == "shared"}

    def wait(self, pending: int) -> None:
        while len(self.pending) > pending:
            self.now = max(self.now, self.pending.pop(0) + self.latencies.product)

    def gemm(self, gemm: Gemm) -> None:
        m, n, k = gemm.size
        halves = 2 if self.buffers[base(gemm.b)].dtype == "float32" else 1  # tf32 goes at half the rate
        work = 2 * m * n * k * halves / self.flops
        self.tensor_work += work
        self.tensor_free = max(self.now, self.tensor_free) + max(work * self.few, self.latencies.step * k * halves / 16)
        self.pending.append(self.tensor_free)
        if not self.asynchronous:
            self.wait(0)

    def elementwise(self, statement) -> None:
        work = operations(statement, self.buffers)
        self.work.update(work)
        fetches = any(self.buffers[n].scope == "global" for n in reads(statement)) and bool(work)
        if fetches and not self.fetching:  # what follows at once is fetched beside it
            self.now += self.latencies.fetch
        self.fetching = fetches
        latency = self.latencies.sum if isinstance(statement, (RowSum, ColSum)) else self.latencies.map
        if work:
            self.now += latency * _rounds(statement) + self.together(work, self.few)

    def together(self, work: Counter, few: float = 1) -> float:
        """Cycles that all units take; what a thread does itself takes longer where there are few threads."""
        used = [amount / RATES[unit] * (few if unit in OF_THREADS else 1) for unit, amount in work.items()]
        return max(used, default=0) if self.latencies.overlap else sum(used)


def _rounds(statement) -> int:
    """How often a statement's loop waits for itself."""
    return statement.serial[2] - statement.serial[1] if isinstance(statement, Map) and statement.serial else 1


def operations(statement, buffers: dict[str, Buffer]) -> Counter:
    """Work of an elementwise statement by unit; of a chunk, where it is not done in each."""
    work: Counter[str] = Counter()
    if isinstance(statement, Map):
        if math.isinf(statement.every):
            return work
        times = _rounds(statement) * math.prod(n for _, n in statement.loops) / statement.every
        loops = frozenset(name for name, _ in statement.loops)
        for text, _ in texts(statement):
            for unit, name, amount in _expression(text, loops):
                work.update(_access(buffers[name], amount * times) if unit == "access" else {unit: amount * times})
        return work
    ends = [buffers[base(text)] for text, _ in texts(statement)]
    tile = next(b for b in ends if b.scope != "global")
    elements = max(b.bytes // BYTES[b.dtype] for b in ends if b.scope != "global") if tile else 0
    work["arithmetic"] += elements
    for buffer in ends:
        work.update(_access(buffer, elements))
    return work


def _access(buffer: Buffer, elements: float) -> dict[str, float]:
    return {} if buffer.scope == "fragment" else {buffer.scope: BYTES[buffer.dtype] * elements}


@cache
def _expression(text: str, loops: frozenset[str]) -> tuple[tuple[str, str, float], ...]:
    """(unit, buffer of an access, amount) for an element of a loop, of all that an expression does."""
    return tuple(_parts(ast.parse(text, mode="eval").body, loops))


def _parts(node: ast.AST, loops: frozenset[str]):
    if isinstance(node, ast.Subscript):  # whose indices are counted by the compiler, not by threads
        indices = {n.id for n in ast.walk(node.slice) if isinstance(n, ast.Name)}
        yield "access", node.value.id, 1 if loops <= indices else 1 / REUSE
        return
    if isinstance(node, (ast.BinOp, ast.Compare, ast.UnaryOp)):
        yield "arithmetic", "", 1
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        yield "functions" if called in FUNCTIONS else "arithmetic", "", 1
    for child in ast.iter_child_nodes(node):
        yield from _parts(child, loops)
