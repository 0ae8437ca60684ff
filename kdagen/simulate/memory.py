"""Memory of a simulated GPU: buffers, boxes of them, traffic counts and races between blocks.

Reads out of bounds give zero and writes out of bounds are dropped, as TileLang's guards and TMA do; both are
counted. Shared memory and registers start as NaN, so that whatever reads them too early shows it. A store
rounds to the buffer's dtype. Single elements are in elements.py, programs in program.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from kdagen.errors import SimulationError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_EXTENSIONS = {"bfloat16": BFLOAT16, "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}
_EXTENSIONS["float8_e5m2"] = np.dtype(ml_dtypes.float8_e5m2)
_HALVES = (BFLOAT16, np.dtype(np.float16))


def dtype_of(name) -> np.dtype:
    """numpy's dtype for TVM's name of it."""
    return _EXTENSIONS.get(str(name)) or np.dtype(str(name))


def is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype in _EXTENSIONS.values()


def rounded(value, dtype: np.dtype):
    """`value` (array or scalar) in `dtype`; floats round to nearest even."""
    return value.astype(dtype) if isinstance(value, np.ndarray | np.generic) else dtype.type(value)


def widened(value):
    """Half floats as float32: the GPU's units compute in float32 and round once."""
    return value.astype(np.float32) if getattr(value, "dtype", None) in _HALVES else value


def tf32(value: np.ndarray) -> np.ndarray:
    """float32 operands as the tensor cores read them: the low 13 bits of the significand are ignored."""
    return (np.ascontiguousarray(value).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def poisoned(shape, dtype: np.dtype) -> np.ndarray:
    return np.full(shape, np.nan if is_float(dtype) else 0, dtype)


@dataclass
class Traffic:
    """Bytes that a kernel moves between one global buffer and the chip."""

    read: int = 0
    written: int = 0


@dataclass
class Statistics:
    """What a kernel did, summed over its blocks.

    Traffic counts each copy and each T.Parallel load as often as it runs (a value used by many lanes once);
    a cache would save some of it. `shared_bytes` is what the program declares, before pipelining multiplies it.
    """

    traffic: dict[str, Traffic] = field(default_factory=dict)
    blocks: int = 0
    gemms: int = 0
    gemm_flops: int = 0
    shared_bytes: int = 0
    reads_out_of_bounds: int = 0  # elements
    writes_out_of_bounds: int = 0
    schedule: object = None  # the ScheduleReport, where the kernel's schedule was checked

    @property
    def bytes_moved(self) -> int:
        return sum(t.read + t.written for t in self.traffic.values())


class Ledger:
    """Which block wrote each global element: finds what depends on the order of blocks."""

    def __init__(self):
        self.writers: dict[str, np.ndarray] = {}

    def wrote(self, name: str, array: np.ndarray, where, block: int):
        writers = self.writers.setdefault(name, np.full(array.shape, -1, np.int64))
        self._refuse(name, "writes", writers[where], block)
        writers[where] = block

    def read(self, name: str, where, block: int):
        if name in self.writers:
            self._refuse(name, "reads", self.writers[name][where], block)

    @staticmethod
    def _refuse(name: str, does: str, writers, block: int):
        others = np.unique(writers[(writers != -1) & (writers != block)])
        if others.size:
            raise SimulationError(
                f"race in '{name}': block {block} {does} an element that block {others[0]} writes; "
                "expected blocks to be independent: give each its own elements"
            )


class Frame:
    """Where a closure runs: one block (or one warp role of it)."""

    __slots__ = ("env", "buffers", "shared", "mask", "lanes", "origin", "own", "block", "statistics", "ledger")

    def __init__(self, env, buffers, shared, block, statistics, ledger=None):
        self.env, self.buffers, self.shared = env, buffers, shared
        self.block, self.statistics, self.ledger = block, statistics, ledger
        self.mask = None  # lanes of a T.Parallel loop that are active; None means all
        self.lanes = ()  # extents of the T.Parallel loops around
        self.origin = ()  # and where they start
        self.own: list[Handle] = []  # threads' variables that now differ from lane to lane

    def traffic(self, name: str) -> Traffic:
        return self.statistics.traffic.setdefault(name, Traffic())


class Handle:
    """A buffer as a program names it: several may view the same memory."""

    def __init__(self, buffer):
        self.data, self.name, self.dtype = buffer.data, str(buffer.name), dtype_of(buffer.dtype)
        self.scope, self.ndim = str(buffer.scope()), len(buffer.shape)
        self.is_global = self.scope == "global"
        self.is_shared = self.scope.startswith("shared")
        self.is_private = self.scope in ("local", "local.var")  # every lane of a T.Parallel loop has its own
        self.shape = None if self.is_global else tuple(int(n) for n in buffer.shape)

    def array(self, f: Frame) -> np.ndarray:
        array = f.buffers.get(self.data)
        if array is None:
            raise SimulationError(f"'{self.name}' ({self.scope}) is used where it is not allocated")
        if self.is_global or self.is_private or array.shape == self.shape:
            return array
        return array.view(self.dtype).reshape(self.shape)

    def allocate(self, f: Frame):
        if self.is_shared:
            f.buffers[self.data] = f.shared.setdefault(self.data, poisoned(self.shape, self.dtype))
        else:
            f.buffers[self.data] = poisoned(self.shape, self.dtype)


def read_box(f: Frame, h: Handle, start: list[int], extent: list[int]) -> np.ndarray:
    """The box at `start`: a view if it is in bounds, else a copy with zeros outside."""
    array = h.array(f)
    inner, outer = clip(start, extent, array.shape)
    values = array[outer]
    if h.is_global:
        note_read(f, h, outer, values.nbytes)
    if missing := math.prod(extent) - values.size:
        f.statistics.reads_out_of_bounds += missing
        padded = np.zeros(extent, array.dtype)
        padded[inner] = values
        return padded
    return values


def write_box(f: Frame, h: Handle, start: list[int], extent: list[int], values: np.ndarray):
    """Stores a box, rounding; what lies out of bounds is dropped."""
    array = h.array(f)
    inner, outer = clip(start, extent, array.shape)
    values = values[inner]
    f.statistics.writes_out_of_bounds += math.prod(extent) - values.size
    array[outer] = values
    if h.is_global:
        note_write(f, h, array, outer, values.size * array.itemsize)


def note_read(f: Frame, h: Handle, where, size: int):
    f.traffic(h.name).read += size
    if f.ledger:
        f.ledger.read(h.name, where, f.block)


def note_write(f: Frame, h: Handle, array: np.ndarray, where, size: int):
    f.traffic(h.name).written += size
    if f.ledger:
        f.ledger.wrote(h.name, array, where, f.block)


def clip(start, extent, shape) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a box that lies within `shape`: as slices of the box, and of the array."""
    if all(0 <= s <= n - e for s, e, n in zip(start, extent, shape, strict=True)):
        return (), tuple(slice(s, s + e) for s, e in zip(start, extent, strict=True))
    low = [min(max(0, -s), e) for s, e in zip(start, extent, strict=True)]
    high = [max(a, min(e, n - s)) for a, s, e, n in zip(low, start, extent, shape, strict=True)]
    inner = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return inner, tuple(slice(max(s + a, 0), max(s + b, 0)) for s, a, b in zip(start, low, high, strict=True))
