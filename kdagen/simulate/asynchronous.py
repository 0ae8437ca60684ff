"""What runs on its own in a warp-specialised kernel: mbarriers, TMA copies in flight, wgmma in flight.

schedule.py decides when they proceed; the closures here run in a Role, the frame of one range of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdagen.errors import SimulationError
from kdagen.simulate.memory import Frame, poisoned, read_box, write_box
from kdagen.simulate.tileops import OPERATIONS, Gemm, Region, nothing

ORDER_ONLY = ("fence_proxy_async", "set_max_nreg", "no_set_max_nreg", "annotate_producer_reg_dealloc", "assume")
COMPUTES = ("copy", "transpose", "fill", "gemm", "reduce", "cumsum", "atomic_add_elem_op")


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and every copy that it counts has landed."""

    name: str
    expected: int
    arrived: int = 0
    in_flight: int = 0
    phase: int = 0

    def arrive(self, threads: int):
        self.arrived += threads
        if self.arrived > self.expected:
            raise SimulationError(
                f"{self.name} phase {self.phase}: {self.arrived} arrivals, expected {self.expected}: a role arrives "
                "twice in one phase, or its count of threads is wrong"
            )
        self.settle()

    def settle(self):
        if self.arrived == self.expected and not self.in_flight:
            self.arrived, self.phase = 0, self.phase + 1


@dataclass(frozen=True)
class Wait:
    """A role stands here until the phase of that parity is over."""

    barrier: Barrier
    parity: int

    @property
    def over(self) -> bool:
        return self.barrier.phase & 1 != self.parity

    def __str__(self):
        b = self.barrier
        state = f"now in phase {b.phase}, {b.arrived} of {b.expected} arrived, {b.in_flight} copies in flight"
        return f"wait for parity {self.parity} of {b.name} ({state})"


class Late:
    """A role stands here as long as it likes: what comes next may happen at once, or after all else."""

    over = True


LATE = Late()


@dataclass
class Flight:
    """A wgmma that was issued and not yet waited for."""

    gemm: Gemm
    boxes: tuple  # of a, b and the accumulator, where they were when issued
    operands: tuple[bytes, bytes]
    product: np.ndarray
    base: np.ndarray | None  # what it adds to; None: nothing, or (chained) the result of the flight before it
    chained: bool


class Role(Frame):
    """A range of threads that takes the same branches: a frame with its own registers."""

    __slots__ = ("first", "threads", "transfers", "flights", "waiting", "steps")

    def __init__(self, f: Frame, first: int, last: int, transfers: list):
        super().__init__(dict(f.env), dict(f.buffers), f.shared, f.block, f.statistics)
        self.first, self.threads, self.transfers = first, last - first, transfers
        self.flights: list[Flight] = []
        self.waiting: Wait | Late | None = None

    @property
    def ready(self) -> bool:
        return self.waiting is None or self.waiting.over

    def __str__(self):
        return f"threads {self.first} to {self.first + self.threads - 1}"


def arrive(compiler, call):
    barrier = compiler.barrier(call.args[0])
    return lambda f: barrier(f).arrive(f.threads)


def tma_copy(compiler, call):
    """Poisons the target at once; the copy lands whenever the scheduler says."""
    if "barrier" not in call.annotations:
        return OPERATIONS["copy"](compiler, call)
    source, target = (Region(compiler, c) for c in call.args[:2])
    barrier = compiler.barrier(call.annotations["barrier"])
    arrives = int(call.annotations.get("emit_arrive", 0))

    def issue(f):
        mine, from_box, to_box = barrier(f), source.box(f), target.box(f)
        mine.in_flight += 1
        write_box(f, target.handle, *to_box, poisoned(to_box[1], target.handle.dtype))

        def land():
            values = read_box(f, source.handle, *from_box)
            write_box(f, target.handle, *to_box, values.reshape(to_box[1]))
            mine.in_flight -= 1
            mine.settle()

        f.transfers.append(land)
        if arrives:
            mine.arrive(1)

    return issue


def wgmma(compiler, call):
    gemm = Gemm(compiler, call)

    def issue(f):
        boxes = tuple(region.box(f) for region in (gemm.a, gemm.b, gemm.out))
        a, b = gemm.a.read(f), gemm.b.read(f)
        product, clear = gemm.product(f, a, b), gemm.clear(f)
        chained = not clear and any(_same_accumulator(flight, gemm, boxes) for flight in f.flights)
        base = None if clear or chained else gemm.out.read(f).reshape(product.shape).copy()
        f.flights.append(Flight(gemm, boxes, (a.tobytes(), b.tobytes()), product, base, chained))
        write_box(f, gemm.out.handle, *boxes[2], poisoned(boxes[2][1], gemm.out.handle.dtype))

    return issue


def _same_accumulator(flight: Flight, gemm: Gemm, boxes) -> bool:
    return flight.gemm.out.handle.data.same_as(gemm.out.handle.data) and flight.boxes[2] == boxes[2]


def retire(f: Role):
    """The oldest wgmma is done: its result shows, unless a later one still adds to it."""
    flight = f.flights.pop(0)
    gemm, accumulator = flight.gemm, flight.gemm.out.handle
    for region, box, before in zip((gemm.a, gemm.b), flight.boxes[:2], flight.operands, strict=True):
        if read_box(f, region.handle, *box).tobytes() != before:
            raise SimulationError(
                f"{f}: '{region.handle.name}' changed while the wgmma into '{accumulator.name}' was reading it: "
                "expected its slot to be released, or overwritten, only after wait_wgmma"
            )
    result = flight.product if flight.base is None else flight.base + flight.product
    later = [other for other in f.flights if _same_accumulator(other, gemm, flight.boxes)]
    if not later:
        write_box(f, accumulator, *flight.boxes[2], result.reshape(flight.boxes[2][1]))
    elif later[0].chained:
        later[0].base = result


ASYNCHRONOUS_OPERATIONS = {
    **{name: OPERATIONS[name] for name in COMPUTES},
    **dict.fromkeys(ORDER_ONLY, nothing),
    "ptx_arrive_barrier": arrive,
    "tma_copy": tma_copy,
    "wgmma_gemm": wgmma,
}
