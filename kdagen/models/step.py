"""Decoding natively: a token of each sequence goes through a decoder by a program of operations in C (step.c).

What layers do is said by their own forward; a program does the same with nothing around it. kdagen.models.step_layers
writes it, once for a number of sequences; here it is run. A layer that is not as this package makes it (hooks, modules
or parameters of another kind) runs by its own forward among the others, and `Steps.why` says why.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from array import array
from operator import attrgetter, is_
from pathlib import Path

import torch

from kdagen.build.native import library as compiled
from kdagen.errors import KdagenError
from kdagen.lower.native import FUNCTIONS
from kdagen.models.cache import Cache
from kdagen.models.layout import Layout
from kdagen.runtime.cpu_decode import NATIVE, as_usual

log = logging.getLogger("kdagen")
MOST = 8  # programs of a decoder: of numbers of sequences, of threads, for each thread of the caller's
KEPT = torch.float32, torch.bfloat16  # dtypes of parameters, and of what caches keep beside states
DTYPE = attrgetter("dtype")


class Steps:
    """A decoder's programs."""

    def __init__(self):
        self.programs: dict = {}
        self.why: dict[str, str] = {}  # what runs by its own forward, and why

    def __reduce__(self):
        return Steps, ()  # programs hold addresses: a copy of a model has none yet

    def run(self, decoder, h, layout: Layout, cache: Cache):
        """The decoder's result for embedded tokens, the cache brought up to date; None if its layers are to run."""
        if not fits(h, layout):
            return None
        if isinstance(found := library(), str):
            self.said({"all layers": found})
            return None
        key = layout.batch, len(decoder.layers), torch.get_num_threads(), threading.get_ident()
        program = self.programs.get(key)
        if program is None or not program.seen.unchanged():
            program = self.programs[key] = self.written(found, decoder, *h[:, 0].shape)
        return program.run(h, layout, cache)

    def written(self, library, decoder, rows: int, size: int) -> Program:
        from kdagen.models.step_layers import write

        if len(self.programs) >= MOST:
            self.programs.clear()
        program = write(library, decoder, rows, size)
        self.said(program.why)
        return program

    def said(self, why: dict[str, str]) -> None:
        if why != self.why:
            self.why = dict(why)
            for what, reason in why.items():
                log.info("decoding of %s is by torch, which takes several times as long: %s", what, reason)


def fits(h, layout: Layout) -> bool:
    """Whether a call is one that programs are written for."""
    if torch.compiler.is_compiling() or not layout.steps or torch.is_grad_enabled():
        return False
    plain = type(h) is torch.Tensor and h.dtype in KEPT and h.device.type == "cpu" and bool(h.numel())
    return plain and as_usual() and not torch.is_autocast_enabled("cpu")


def text() -> str:
    """The operations, in C."""
    return FUNCTIONS.read_text() + Path(__file__).with_suffix(".c").read_text()


@functools.cache
def library():
    """The operations, compiled at first use; or why they are not."""
    try:
        found = ctypes.CDLL(str(compiled("step", text())))
    except (KdagenError, OSError) as error:
        return str(error)
    found.kdagen_step.argtypes = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    found.kdagen_step.restype = ctypes.c_int64
    return found


class Seen:
    """What a program was written by: entries of modules' dicts, tensors' places, hooks."""

    def __init__(self):
        self.state: tuple = ()
        everywhere = torch.nn.modules.module
        self.hooks = [everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks]
        self.dicts, self.keys, self.values, self.tensors, self.modules = [], [], [], [], []

    def entry(self, found: dict, key: str):
        """What a dict has under a key, if anything."""
        self.dicts.append(found)
        self.keys.append(key)
        self.values.append(value := found.get(key))
        return value

    def now(self) -> tuple:
        """What may change without another entry."""
        tensors, hooks = self.tensors, list(map(bool, self.hooks))
        return (
            list(map(torch.Tensor.data_ptr, tensors)),
            list(map(DTYPE, tensors)),
            list(map(type, self.modules)),
            hooks,
        )

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        return all(map(is_, map(dict.get, self.dicts, self.keys), self.values)) and self.now() == self.state


class Program:
    """Steps in memory, the layers that run between them, and where the caches are that they work on."""

    def __init__(self, code, rows: int, layers: int):
        self.code, self.seen, self.why = code, Seen(), {}
        self.words, self.parts, self.kept = array("q"), [], []
        self.recurrences: dict = {}  # by the number of the step: what op.decode is given in its place
        self.expected: list = [None] * layers  # the kind of a layer's state, and the shapes of its tensors
        self.cells, self.past = (ctypes.c_int64 * (2 * layers))(), (ctypes.c_int64 * rows)()
        self.call = array("q", [rows, torch.get_num_threads()])

    def close(self, h, out) -> None:
        """All is written; `h` is what it begins with, `out` what it ends with."""
        self.h, self.out, self.seen.state = h, out, self.seen.now()
        self.ops = {op for op, *_ in self.recurrences.values()}

    def run(self, h, layout: Layout, cache: Cache):
        """The decoder's result; None, with nothing done, for a cache that is not as the model makes them."""
        places = [place(*given, layout) for given in zip(cache.layers, self.expected)]
        if None in places:
            return None
        self.cells[:], self.past[:] = [x for pair in places for x in pair], layout.past
        self.h.copy_(h[:, 0])
        for part in self.parts:
            part(layout, cache, h.dtype)
        for op in self.ops:
            op.note(self.out, NATIVE)
        return self.out.to(h.dtype, copy=True).unsqueeze(1)

    def native(self, first: int, last: int, layout: Layout, cache: Cache, dtype) -> None:
        """Runs steps. A recurrence that meets what is not finite is left to its op, which tells why it refuses."""
        words, call = self.words.buffer_info()[0], self.call.buffer_info()[0]
        while (first := self.code.kdagen_step(words, first, last, call)) < last:
            op, given, out, layer = self.recurrences[first]
            out.copy_(op.decode(**given, state_pool=cache.layers[layer].state))
            first += 1


def place(state, expected, layout: Layout) -> tuple[int, int] | None:
    """The two cells of a layer's state; None if it is not as expected."""
    if expected is None:
        return 0, 0
    kind, *shapes = expected
    if type(state) is not kind:
        return None
    if hasattr(state, "reserve"):
        state.reserve(max(layout.past) + 1)
    tensors = list(state.tensors().values())
    for x, shape in zip(tensors, shapes):
        same = all(n in (m, None) for n, m in zip(shape, x.shape))
        if not same or x.dtype not in KEPT or not x.is_contiguous():
            return None
    if len(tensors) == 1:
        return address(tensors[0]), tensors[0].stride(0)
    return None if tensors[0].dtype != torch.float32 else (address(tensors[0]), address(tensors[1]))


def address(x) -> int:
    """Of a tensor in step.c: one too high for bfloat16."""
    return x.data_ptr() + (x.dtype == torch.bfloat16)
