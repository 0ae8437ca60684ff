"""How long a schedule takes on a GPU, without one: a lower bound and an estimate of each kernel, from its tile IR.

A kernel takes as long as its bytes from memory, or as its blocks in waves on the processors, each as long as the chain
of its chunks. The bound takes the chip at its data sheet's word and the least latencies; the estimate takes what copies
and products reach in practice, usual latencies and a launch. See kdagen.autotune.cycles for what a block does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from kdagen.autotune import gpus
from kdagen.autotune.cycles import LEAST, RATES, USUAL, Latencies, cycles
from kdagen.autotune.gpus import Gpu
from kdagen.autotune.neighbours import neighbours
from kdagen.autotune.space import Space, space_of
from kdagen.autotune.space.legal import most_registers
from kdagen.autotune.sweep import CPU, Task, Workload
from kdagen.autotune.tiles import Tile, lowering

from kdagen.ir.tile import BYTES, Kernel
from kdagen.ir.tile_cost import chunk_flops
from kdagen.lower.scan import PLAIN
from kdagen.schedule import Choices, changes
from kdagen.target import target

LAUNCH = 2e-6  # seconds from the end of a kernel to the start of the next, and the ramp of its first blocks
BLOCKS = 32  # of a processor at a time, at most
RESERVED = 1024  # bytes of shared memory that a block takes beside its own
PRODUCER = 128  # threads that fetch, beside those that do products
SPARE = 40  # registers of a thread beside its fragments: addresses, indices
GAIN = 1.15  # what a schedule must be predicted to gain before it takes the default's place
ALL = 300  # candidates up to which the model looks at each; of more, at those that a descent comes to
TIE = 1.02  # predictions so near to each other say nothing


@dataclass(frozen=True)
class Part:
    """One kernel of a prediction."""

    kernel: str
    ms: float
    bound_ms: float
    limiter: str  # "bandwidth", "arithmetic", "latency" or "launch"
    bytes: float  # from and to memory
    blocks: int
    waves: int


@dataclass(frozen=True)
class Prediction:
    """Kernels that run one after another."""

    ms: float
    bound_ms: float
    limiter: str  # of most of the time
    parts: tuple[Part, ...]


def predict(source, gpu: Gpu, workload: Workload) -> Prediction:
    """The time of kernels in launch order: those of a Compilation, or Kernels or Tiles of one op."""
    tiles = _tiles(source)
    op = min(t.kernel.chunk_size for t in tiles), max(t.kernel.segment for t in tiles), workload
    warm = _workspaces(tiles, sizes_of(*op)) <= gpu.l2
    parts = tuple(_part(tile, gpu, *op, warm) for tile in tiles)
    spent = Counter()
    for part in parts:
        spent[part.limiter] += part.ms
    limiter = max(spent, key=lambda word: (spent[word], word))
    return Prediction(sum(p.ms for p in parts), sum(p.bound_ms for p in parts), limiter, parts)


def predicted(task: Task, schedule: Choices, workload: Workload) -> Prediction:
    """The time of a candidate on the GPU of its task."""
    passes = lowering(task).passes(schedule)
    return predict([tile for tiles in passes.values() for tile in tiles], gpus.find(task.device), workload)


def pick(task: Task, workload: Workload, **fixed) -> Choices:
    """The schedule for a call where nothing was measured: the default, unless another one promises much more.

    `fixed` gives fields that are not to be chosen, as what training keeps.
    """
    space = space_of(task)
    if task.target == CPU or gpus.find(task.device) is None:
        return space.complete(**fixed)
    return _pick(space, task, workload, tuple(sorted(fixed.items())))


@cache
def _pick(space: Space, task: Task, workload: Workload, fixed: tuple) -> Choices:
    legal, default = _legal(space, fixed), space.complete(**dict(fixed))
    times: dict[Choices, float] = {}

    def ms(schedule: Choices) -> float:
        if schedule not in times:
            times[schedule] = predicted(task, schedule, workload).ms
        return times[schedule]

    seen = legal if len(legal) <= ALL else (_descended(default, legal, ms),)
    best = min(map(ms, seen), default=ms(default))
    if ms(default) <= GAIN * best:
        return default
    return min((s for s, t in times.items() if t <= TIE * best), key=lambda s: (differences(s, default), s.json()))


def _descended(start: Choices, legal: tuple[Choices, ...], ms: Callable[[Choices], float]) -> Choices:
    """From the start to the best neighbour, and on, until none is better."""
    others = {schedule: vars(schedule) for schedule in legal}
    order = {schedule: (i,) for i, schedule in enumerate(legal)}
    centre = start
    while True:
        around = neighbours(vars(centre), others, order.__getitem__).values()
        best = min((centre, *around), key=lambda s: (ms(s), order.get(s, (-1,))))
        if best == centre or ms(best) >= ms(centre):
            return centre
        centre = best


@cache
def _legal(space: Space, fixed: tuple) -> tuple[Choices, ...]:
    return space.survey(dict(fixed)).legal


def differences(a: Choices, b: Choices) -> int:
    """In how many fields two schedules differ."""
    return len(changes(vars(a), vars(b)))


# -- one kernel


@cache
def _part(tile: Tile, gpu: Gpu, chunk: int, segment: int, workload: Workload, warm: bool) -> Part:
    sizes = sizes_of(chunk, segment, workload)
    moved = _moved(tile, sizes, warm)
    flops = chunk_flops(tile.kernel) / tile.kernel.chunk_size * sizes["T"] * sizes["HV"]
    least, _ = _seconds(tile, gpu, workload, sizes, LEAST)
    chain, waves = _seconds(tile, gpu, workload, sizes, USUAL)
    terms = {"bandwidth": moved / gpu.copy, "arithmetic": flops / gpu.products, "latency": chain, "launch": 0.0}
    limiter = max(terms, key=terms.get)
    limiter = limiter if terms[limiter] > LAUNCH else "launch"
    bound = max(moved / gpu.memory, flops / gpu.flops, least)
    ms = 1e3 * (LAUNCH + max(terms.values()))
    return Part(tile.kernel.name, ms, 1e3 * bound, limiter, moved, _blocks(tile.kernel, sizes), waves)


def _moved(tile: Tile, sizes: dict[str, int], warm: bool) -> float:
    """Bytes from and to memory; not those of workspaces where all of these stay in the cache."""
    return (tile.cold_bytes_a_token if warm else tile.bytes_a_token) * sizes["T"] * sizes["HV"]


def _seconds(tile: Tile, gpu: Gpu, workload: Workload, sizes, latencies: Latencies) -> tuple[float, int]:
    """How long the blocks take on the processors, in how many waves, memory being as fast as it may."""
    iteration = cycles(tile, gpu, latencies)
    period = max(iteration.latency, (_fetch(tile, latencies) + iteration.latency) / tile.kernel.stages)
    counts = _iterations(tile.kernel, workload)
    blocks = _blocks(tile.kernel, sizes)
    each = -(-blocks // gpu.processors)  # of the fullest processor
    together = min(each, _resident(tile, gpu))
    mean = sum(counts) / len(counts)
    edge = 2 * latencies.fetch if tile.kernel.before else _fetch(tile, latencies)
    waves = -(-each // together)
    spent = waves * max(edge + period * mean, 0) if waves > 1 else edge + period * max(counts)
    busy = each * mean * iteration.busy
    return max(spent, busy) / gpu.clock, waves


def _fetch(tile: Tile, latencies: Latencies) -> float:
    """Cycles until an iteration's tiles are there."""
    return latencies.fetch + tile.block_bytes / RATES["global"] if tile.kernel.loads else 0


def _resident(tile: Tile, gpu: Gpu) -> int:
    """Blocks that a processor holds at a time."""
    if tile.specialised:  # all registers that such a block may have are taken at once
        registers = tile.kernel.threads * most_registers(tile)
    else:
        registers = tile.kernel.threads * min(tile.registers + SPARE, 255)
    by = (
        gpu.shared // (tile.shared_bytes + RESERVED),
        gpu.threads // threads_of(tile, gpu),
        gpu.registers // registers,
        BLOCKS,
    )
    return max(1, min(by))


def threads_of(tile: Tile, gpu: Gpu) -> int:
    """Threads of a block, a warp group included that fetches ahead of those of a scan."""
    skeleton = tile.kernel.skeleton
    fetches = skeleton.startswith("scan") and skeleton != PLAIN and target(gpu.target).bulk_copies
    return tile.kernel.threads + PRODUCER * fetches


def _iterations(kernel: Kernel, workload: Workload) -> list[int]:
    """How often blocks go round, by sequence."""
    lengths = workload.lengths or (workload.tokens,) * workload.batch
    names = [name for name, _ in kernel.grid]
    if any(name.endswith("segment") for name in names):
        return [min(kernel.segment, max(1, -(-n // kernel.chunk_size))) for n in lengths]
    if "n" in names:
        return [1]
    return [max(1, -(-n // kernel.chunk_size)) for n in lengths]


def _blocks(kernel: Kernel, sizes: dict[str, int]) -> int:
    return math.prod(_extent(text, sizes) for _, text in kernel.grid)


def _extent(text: str, sizes: dict[str, int]) -> int:
    """A grid's extent: "2 * N"."""
    return int(eval(compile(text, "<extent>", "eval"), {"__builtins__": {}}, sizes))


# -- one op


def _tiles(source) -> list[Tile]:
    if hasattr(source, "source"):  # a Compilation, which holds a kernel of both passes once
        named = {k.name: k for k in source.kernels}
        passes = source.source.passes or {"": tuple(named)}
        source = [named[name] for names in passes.values() for name in names]
    return [item if isinstance(item, Tile) else Tile(item) for item in source]


@cache
def sizes_of(chunk: int, segment: int, workload: Workload) -> dict[str, int]:
    """The symbols of kdagen.codegen.source.TensorSpec for a call; of slots those that have something in them."""
    lengths = workload.lengths or (workload.tokens,) * workload.batch
    slots = {"NC": sum(-(-n // chunk) for n in lengths), "NG": sum(-(-n // (chunk * segment)) for n in lengths)}
    n, heads = len(lengths), {"H": workload.heads, "HV": workload.value_heads}
    return {"T": sum(lengths), "N": n, "N1": n + 1, **heads, **slots}


def _workspaces(tiles: Iterable[Tile], sizes: dict[str, int]) -> int:
    """Bytes of what kernels leave for each other."""
    found = {b.name: b for tile in tiles for b in tile.workspaces}
    return sum(math.prod(sizes.get(n, n) for n in b.shape) * BYTES[b.dtype] for b in found.values())
