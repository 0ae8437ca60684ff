"""Writes programs of step.c: buffers, operations on them, and what modules must be for that.

What layers consist of is in step_layers. What a program reads in a module is seen by it (step.Seen), so that it is
written anew when that changes; what is not as this package makes it raises Unlike.
"""

from __future__ import annotations

import ctypes
import struct
from array import array

import torch
from torch import nn

from kdagen.models.layers import Linear, RMSNorm
from kdagen.models.step import KEPT, Program, address

WORDS = 18  # of a step


class Unlike(Exception):
    """Why a layer must run by its own forward."""


class Writer:
    """Appends steps on buffers of [sequences, channels] to a program."""

    def __init__(self, program: Program):
        self.program, self.seen, self.rows = program, program.seen, len(program.past)
        self.rooms: dict = {}
        program.kept.append(self.rooms)
        self.begun = 0  # the step from which on none is in a part yet

    # -- memory

    def room(self, name: str, size: int):
        """A buffer; the same for the same name and size."""
        return self.rooms.setdefault((name, size), torch.zeros(self.rows, size))

    def integers(self, numbers) -> int:
        """The address of some, which are kept."""
        self.program.kept.append(kept := array("q", numbers))
        return kept.buffer_info()[0]

    def cell(self, layer: int, which: int) -> int:
        """Of one of the two cells of a layer's state."""
        return ctypes.addressof(self.program.cells) + 8 * (2 * layer + which)

    # -- modules

    def plain(self, module, kind: type, name: str):
        """A module, if it is of just this kind, and runs just that kind's forward."""
        if type(module) is not kind:
            raise Unlike(f"{name} is {type(module).__name__}, not {kind.__name__}")
        self.seen.modules.append(module)
        self.seen.hooks.extend((module._forward_hooks, module._forward_pre_hooks))
        if self.seen.entry(vars(module), "forward") or any(self.seen.hooks[-2:]) or any(self.seen.hooks[:2]):
            raise Unlike(f"{name} has hooks")
        return module

    def child(self, parent, name: str, kind: type, called: str = ""):
        """A child of a module, if it is plain."""
        return self.plain(self.seen.entry(parent._modules, name), kind, called or name)

    def tensor(self, module, name: str, *shape: int, dtypes: tuple = KEPT):
        """A parameter or buffer of this shape, if it may be read where it is."""
        x = self.seen.entry(module._buffers if name in module._buffers else module._parameters, name)
        if type(x) not in (nn.Parameter, torch.Tensor) or x.device.type != "cpu" or x.dtype not in dtypes:
            raise Unlike(f"{name} is {type(x).__name__} {getattr(x, 'dtype', '')}, not {dtypes[0]} on the CPU")
        if not x.is_contiguous() or x.shape != shape:
            raise Unlike(f"{name} is {list(x.shape)}, strides {x.stride()}, not contiguous {list(shape)}")
        self.seen.tensors.append(x)
        return x

    def weight(self, parent, name: str, *shape: int):
        """The weight of a linear map without bias."""
        module = self.child(parent, name, Linear)
        if self.seen.entry(module._parameters, "bias") is not None:
            raise Unlike(f"{name} has a bias")
        return self.tensor(module, "weight", *shape)

    # -- operations

    def function(self, name: str) -> int:
        """The address of an operation."""
        return ctypes.cast(getattr(self.program.code, f"step_{name}"), ctypes.c_void_p).value

    def step(self, name: str, *words) -> None:
        """Appends an operation: its words are integers, numbers, tensors of which the address is meant."""
        found = [self.function(name), *map(_word, words)]
        self.program.words.extend(found + [0] * (WORDS - len(found)))

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.program.words) // WORDS

    def product(self, x, weight, y, add: bool = False) -> None:
        """y = W x, or y += W x; one with the step before, if weights and outputs go on where that ends."""
        out, inner = weight.shape
        new = [self.function("product"), *at(x), address(weight), out, inner, *at(y), add]
        if self.steps > self.begun:
            last = self.program.words[-WORDS:].tolist()
            size = weight.element_size() * inner
            ahead = {3: size * last[4], 4: out - last[4], 6: 4 * last[4]}  # addresses, and how many outputs
            if [n - ahead.get(i, 0) for i, n in enumerate(new)] == last[: len(new)]:
                self.program.words[4 - WORDS] += out
                return
        self.step("product", *new[1:])

    def linear(self, parent, name: str, x, y, add: bool = False) -> None:
        """A linear map."""
        self.product(x, self.weight(parent, name, y.shape[1], x.shape[1]), y, add)

    def several(self, parent, names: dict[str, int], x) -> list:
        """Linear maps of one input: their names, and how many outputs."""
        parts = self.room("several", sum(names.values())).split([*names.values()], 1)
        for name, y in zip(names, parts):
            self.linear(parent, name, x, y)
        return list(parts)

    def norm(self, parent, name: str, x, y, parts: int = 1, kind: type = RMSNorm) -> None:
        """Of each of the parts of a row."""
        size = x.shape[1] // parts
        self.step("norm", *at(x), *self.scale(parent, name, size, kind), parts, size, *at(y))

    def scale(self, parent, name: str, size: int, kind: type = RMSNorm) -> tuple:
        """Weight and epsilon of a norm."""
        module = self.child(parent, name, kind)
        return self.tensor(module, "weight", size), float(self.seen.entry(vars(module), "eps"))

    def gate(self, x, y) -> None:
        """y times the sigmoid of x."""
        self.step("gate", *at(x), *at(y), y.shape[1])


def at(x) -> tuple[int, int]:
    """A buffer's address, and floats from a row to the next."""
    return x.data_ptr(), x.stride(0)


def _word(x) -> int:
    if isinstance(x, float):
        return struct.unpack("q", struct.pack("d", x))[0]
    return address(x) if isinstance(x, torch.Tensor) else int(x)
