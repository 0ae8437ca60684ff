"""Decoding by one native loop: the step form as C (kdagen.lower.native), compiled at first use and loaded by ctypes.

It does what kdagen.runtime.cpu_decode does by torch's operations, which runs where this cannot: beside float64, and
where no C compiler is at hand. One library serves all sizes, threads and dtypes of arguments.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
import threading
from array import array
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from kdagen.errors import KdagenError, ToolchainError
from kdagen.ir.step import StepForm
from kdagen.state import StateType

log = logging.getLogger("kdagen")
CHECK, GO_ON, UNCHECKED, CHECK_ALL = range(4)  # what kdagen_decode does about numbers that are not finite
POOL = 14  # the word of a struct Call that is the pool's address
_scratch = threading.local()
_lock = threading.Lock()


class Native:
    """The native loop of a step form on states of one type."""

    def __init__(self, form: StepForm, state: StateType):
        self.form, self.state, self.name = form, state, form.canonical.name
        self.problem: str | None = None  # why there is none
        self.path: Path | None = None

    @cached_property
    def source(self):
        """The C text and what it needs."""
        from kdagen.lower.native import native_source

        return native_source(self.form, self.state)

    @cached_property
    def function(self):
        """kdagen_decode of the library, compiled if need be; None, with the problem said once, where it cannot be."""
        from kdagen.build import native

        with _lock:
            try:
                self.path = native.library(re.sub(r"\W", "_", self.name, flags=re.ASCII), self.source.text)
                return _loaded(self.path)
            except KdagenError as error:
                self.problem = str(error)
                log.warning("%s decodes on torch, which takes several times as long: %s", self.name, self.problem)
                return None

    def fits(self, call) -> bool:
        """Whether it takes the call's dtypes and is there."""
        import torch

        return (
            call.pool.dtype in (torch.float32, torch.bfloat16)
            and call.like.dtype != torch.float64
            and bool(self.function)
        )

    def run(self, call, out, threads: int) -> Table | None:
        """As kdagen.runtime.cpu_decode.run, on so many threads. Returns what later calls that are alike can go by."""
        import torch

        if not (runs := runs_of(call)):
            return None
        result = out.float() if out.dtype == torch.float16 else out
        tensors = [_taken(call.tensors[name]) for name in self.source.arguments]
        table = Table(self.source, call, tensors, runs, result, threads)
        placed = table.placed(tensors, call.pool, result)
        known = call.pool_name == "initial_state"  # checked before, with all that was given
        if self.function(placed.address, UNCHECKED if known else CHECK):
            call.check_states()
            self.function(placed.address, GO_ON)  # finite states, whose sums overflow
        if result is not out:
            out.copy_(result)
        return table if result is out else None

    def prepared(self, call, out, threads: int) -> Placed:
        """What the loop takes for a call, at the addresses of its tensors, which stay; its pool's is the word POOL."""
        tensors = [call.tensors[name] for name in self.source.arguments]
        return Table(self.source, call, tensors, runs_of(call), out, threads).placed(tensors, call.pool, out)

    def again(self, table: Table, tensors: list, pool, out) -> bool:
        """The same on arguments of the same sizes, strides and dtypes; False, with nothing written, if some number of
        theirs or of the states that they read may not be finite."""
        placed = table.placed(tensors, pool, out)
        return not self.function(placed.address, CHECK_ALL)


class Table:
    """The struct Call of native.c.j2 for calls of one kind, but for where their tensors are."""

    def __init__(self, source, call, tensors: list, runs: array, out, threads: int):
        import torch

        from kdagen.lower.native import padded

        size = call.sizes
        hv, k, v, w = size["HV"], size["K"], size["V"], call.columns
        count = len(runs) // (3 + w)
        own = source.floats(k, v)
        room = own + padded(k * v) * (w > 1 or call.pool.dtype == torch.bfloat16)
        self.runs, self.out_shape = runs, out.shape
        self.reads = count * hv * source.reads * padded(v)
        self.scratch = self.reads + threads * room
        dims = [call.signature.dims[name] for name in source.arguments]
        self.given = array("q", [n for x, d in zip(tensors, dims) for n in _given(x, d, hv)])
        self.fields = array("q", [
            threads, count, size["T"], hv, k, v, padded(k), padded(v), w, out.dtype == torch.bfloat16, own, room,
        ])  # fmt: skip

    def placed(self, tensors: list, pool, out) -> Placed:
        """The struct for tensors of this kind."""
        scratch, given = _room(self.scratch), self.given[:]
        for at, x in zip(range(0, len(given), len(given) // len(tensors)), tensors):
            given[at] = x.data_ptr()
        start = scratch.data_ptr()
        fields = self.fields + array("q", [
            start, start + 4 * self.reads, pool.data_ptr(), out.data_ptr(), self.runs.buffer_info()[0],
            given.buffer_info()[0],
        ])  # fmt: skip
        return Placed(fields.buffer_info()[0], (scratch, tensors, given, self.runs, out, fields))


class Placed(NamedTuple):
    """A struct Call, and what it points to, kept alive."""

    address: int
    kept: tuple


def runs_of(call) -> array:
    """For each sequence that has a state and tokens: its slot, its first token's row, tokens, columns."""
    ends, columns, found = call.ends, call.columns, array("q")
    t = call.sizes["T"]
    for n, (start, slots) in enumerate(zip(call.starts, call.slots, strict=True)):
        first, last = (n * t, n * t + t) if ends is None else (ends[n], ends[n + 1])
        if start >= 0 and last > first:
            found.extend((start, first, last - first, *slots) if columns > 1 else (start, first, last - first, start))
    return found


def _taken(x):
    import torch

    return x.float() if x.dtype == torch.float16 else x


def _given(x, dims: tuple[str, ...], hv: int) -> tuple[int, ...]:
    """The struct Given of an argument, but for where it is."""
    import torch

    at = 2 if dims[0] == "B" else 0  # of the heads
    strides = (*((0,) * (2 - at)), *x.stride(), 1)
    return 0, *strides[:4], hv // x.shape[at], x.dtype == torch.bfloat16


def _room(floats: int):
    """Scratch of this thread's, which grows."""
    import torch

    if getattr(_scratch, "floats", None) is None or _scratch.floats.numel() < floats:
        with torch.inference_mode(False):
            _scratch.floats = torch.empty(floats, dtype=torch.float32)
    return _scratch.floats


@functools.cache
def _loaded(path: Path):
    try:
        function = ctypes.CDLL(str(path)).kdagen_decode
    except (OSError, AttributeError) as error:
        raise ToolchainError(
            f"{path} does not load ({error}): remove {path.parent}, and it is compiled again"
        ) from None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_int64
    return function
