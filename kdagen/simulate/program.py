"""Executes a TileLang PrimFunc, as traced and before lowering, on numpy arrays: the very program that goes to the GPU.

Blocks run one at a time (in an order that a seed shuffles), each in program order, T.Parallel loops over all lanes
at once; software pipelining and warp roles are ignored. What they may break is the business of schedule.py.
"""

from __future__ import annotations

import itertools
import random

import numpy as np

from kdagen.build import adapter
from kdagen.errors import SimulationError
from kdagen.simulate.binding import bind, frame
from kdagen.simulate.elements import Element, is_lanes
from kdagen.simulate.expressions import Expressions, held, short_name
from kdagen.simulate.memory import Frame, Handle, Ledger, Statistics, poisoned
from kdagen.simulate.tileops import OPERATIONS

PARALLEL = 1  # tvm.tirx.ForKind


class _Break(Exception):
    """T.loop_break."""


class Compiler(Expressions):
    """Compiles statements to generator functions of a Frame; each `yield` is a point where others may run."""

    def __init__(self, name: str, tf32: bool):
        super().__init__(name)
        self.tf32 = tf32
        self.grid = []  # (variable, extent), outermost first
        self.shared = {}  # data variable -> bytes

    def statement(self, s):
        method = getattr(self, f"_s_{type(s).__name__}", None)
        if method is None:
            raise self.unsupported(f"statement {type(s).__name__}", s)
        self.line = adapter.source_line(s) or self.line
        return method(s)

    @staticmethod
    def leaf(run):
        """A statement that runs at once."""

        def step(f):
            run(f)
            return
            yield

        return step

    def _s_SeqStmt(self, s):
        steps = [self.statement(part) for part in s.seq]

        def run(f):
            for step in steps:
                yield from step(f)

        return run

    def _s_SBlockRealize(self, s):
        return self._s_SBlock(s.block)

    def _s_SBlock(self, s):
        allocations = [self.allocation(b, s.annotations) for b in s.alloc_buffers]
        body = self.statement(s.body)

        def run(f):
            for allocate in allocations:
                allocate(f)
            yield from body(f)

        return run

    def allocation(self, buffer, annotations):
        handle = Handle(buffer)
        if handle.is_shared:
            self.shared[handle.data] = int(np.prod(handle.shape)) * handle.dtype.itemsize
        return handle.allocate

    def _s_AllocBuffer(self, s):
        return self.leaf(self.allocation(s.buffer, {}))

    def _s_DeclBuffer(self, s):
        """Another view of a buffer's memory: Handle finds the memory by itself."""
        return self.statement(s.body) if getattr(s, "body", None) is not None else self.leaf(lambda f: None)

    def _s_AttrStmt(self, s):
        return self.statement(s.body)

    def _s_Bind(self, s):
        if type(s.value).__name__ == "Call" and short_name(s.value) == "launch_thread_idx":
            return self.leaf(lambda f: None)  # and so unbound: reading it is an error
        value, var = self.expression(s.value), s.var

        def bind(f):
            f.env[var] = held(value(f))

        return self.leaf(bind)

    def _s_LetStmt(self, s):
        bind, body = self._s_Bind(s), self.statement(s.body)

        def run(f):
            yield from bind(f)
            yield from body(f)

        return run

    def _s_BufferStore(self, s):
        element, value = Element(self, s.buffer, s.indices), self.expression(s.value)
        return self.leaf(lambda f: element.store(f, value(f)))

    def _s_IfThenElse(self, s):
        condition, yes = self.expression(s.condition), self.statement(s.then_case)
        no = self.statement(s.else_case) if s.else_case is not None else self.leaf(lambda f: None)

        def run(f):
            taken = condition(f)
            if not is_lanes(taken):
                yield from (yes if taken else no)(f)
                return
            outer = f.mask
            for lanes, branch in ((taken, yes), (~taken, no)):
                f.mask = lanes if outer is None else outer & lanes
                yield from branch(f)
            f.mask = outer

        return run

    def _s_While(self, s):
        condition, body = self.expression(s.condition), self.statement(s.body)

        def run(f):
            try:
                while condition(f):
                    yield from body(f)
            except _Break:
                pass

        return run

    def _s_For(self, s):
        if s.thread_binding is not None:
            return self._grid_dimension(s)
        return self._parallel(s) if int(s.kind) == PARALLEL else self._serial(s)

    def _grid_dimension(self, s):
        if not str(s.thread_binding.thread_tag).startswith("blockIdx"):
            raise self.unsupported(f"loop over {s.thread_binding.thread_tag}", s)
        self.grid.append((s.loop_var, self.expression(s.extent)))
        return self.statement(s.body)

    def _serial(self, s):
        start, extent, body, var = self.expression(s.min), self.expression(s.extent), self.statement(s.body), s.loop_var

        def run(f):
            first, count, outer = start(f), extent(f), f.mask
            try:
                for i in range(int(np.max(count, initial=0))):
                    f.env[var] = first + i
                    if is_lanes(count):  # lanes run different numbers of times
                        f.mask = i < count if outer is None else outer & (i < count)
                    yield from body(f)
            except _Break:
                pass
            f.mask = outer

        return run

    def _parallel(self, s):
        """A nest of T.Parallel loops: each variable becomes an array over the lanes."""
        nest = [s]
        while type(nest[-1].body).__name__ == "For" and int(nest[-1].body.kind) == PARALLEL:
            nest.append(nest[-1].body)
        bounds = [(n.loop_var, self.expression(n.min), self.expression(n.extent)) for n in nest]
        if self.lane_axes:
            raise self.unsupported("T.Parallel inside T.Parallel with statements between them", s)
        self.lane_axes = {n.loop_var: axis for axis, n in enumerate(nest)}
        body = self.statement(nest[-1].body)
        self.lane_axes = {}

        def run(f):
            f.lanes = tuple(int(extent(f)) for _, _, extent in bounds)
            f.origin = tuple(int(start(f)) for _, start, _ in bounds)
            grid = np.ogrid[tuple(slice(a, a + n) for a, n in zip(f.origin, f.lanes, strict=True))]
            f.env.update(zip((var for var, _, _ in bounds), grid, strict=True))
            yield from body(f)
            _forget_lanes(f)
            f.lanes = f.origin = ()

        return run

    def _s_Evaluate(self, s):
        if type(s.value).__name__ != "Call":
            return self.leaf(lambda f: None)
        return self.operation(short_name(s.value), s.value)

    def operation(self, name: str, call):
        if name == "loop_break":
            return self.leaf(_break)
        if name not in OPERATIONS:
            raise self.unsupported(f"operation {call.op.name}", call)
        return self.leaf(OPERATIONS[name](self, call))


def _break(f):
    if f.lanes:
        raise SimulationError("T.loop_break inside T.Parallel: expected it in a serial loop over scalars")
    raise _Break


def _forget_lanes(f: Frame):
    """After T.Parallel no thread knows another's variables: those set lane by lane are undefined again."""
    for handle in f.own:
        f.buffers[handle.data] = poisoned(handle.shape, handle.dtype)
    f.own.clear()


class Simulator:
    """`Simulator(prim_func)(*arrays)` runs the kernel in place on the arrays; `statistics` tells what it did.

    `seed` shuffles the blocks; `check_races` refuses a block that touches what another one writes.
    """

    compiler = Compiler

    def __init__(self, prim_func, tf32: bool = True, seed: int | None = None, check_races: bool = False):
        self.prim_func, self.seed, self.check_races = prim_func, seed, check_races
        self.name = str(prim_func.attrs["global_symbol"])
        self.program = self.compiler(self.name, tf32)
        self.body = self.program.statement(prim_func.body)
        self.statistics = Statistics()

    def __call__(self, *arrays: np.ndarray):
        env, buffers = bind(self.prim_func, arrays, self.name)
        self.statistics = Statistics(shared_bytes=sum(self.program.shared.values()))
        ledger = Ledger() if self.check_races else None
        with np.errstate(all="ignore"):  # inf and NaN are values here
            for number, point in self._blocks(env):
                self.statistics.blocks += 1
                self._run_block(Frame({**env, **point}, dict(buffers), {}, number, self.statistics, ledger))

    def _blocks(self, env: dict) -> list[tuple[int, dict]]:
        at = frame(env)
        variables = [var for var, _ in self.program.grid]
        points = itertools.product(*(range(int(extent(at))) for _, extent in self.program.grid))
        blocks = [(n, dict(zip(variables, point, strict=True))) for n, point in enumerate(points)]
        if self.seed is not None:
            random.Random(self.seed).shuffle(blocks)
        return blocks

    def _run_block(self, f: Frame):
        for _ in self.body(f):
            pass
