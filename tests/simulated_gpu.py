"""A GPU that is none: built ops whose kernels run as programs on the CPU, for tests of what is meant for a GPU.

`install(patch)` changes torch and kdagen for as long as `patch`, pytest's monkeypatch, lasts. A graph captures the
operations of torch and the launches that are made while it is open, and does them again, on the same tensors.
"""

from __future__ import annotations

import random
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdagen.runtime import loader
from kdagen.simulate.run import _simulator
from kdagen.simulate.torch_arrays import to_numpy
from kdagen.simulate.verify import built_source

_capturing: list[Graph] = []
_streams: list[Stream] = []  # the current one last
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", multi_processor_count=132, major=9, minor=0, uuid="0a", L2_cache_size=1 << 20
)
SMI = {  # of a driver that knows the older names alone
    "driver_version": "580.65",
    "clocks.sm": "1980 MHz",
    "clocks.mem": "2619 MHz",
    "temperature.gpu": "34",
    "power.draw": "[N/A]",
    "clocks_throttle_reasons.active": "0x0000000000000025",
}


class Graph(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph: while it captures, kernels do not run."""

    def __init__(self):
        super().__init__()
        self.steps: list = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.steps.append(lambda: _again(function, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for step in self.steps:
            step()


def _again(function, args, kwargs, made) -> None:
    found = function(*args, **kwargs)
    for old, new in zip(tree_leaves(made), tree_leaves(found)):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr() and "empty" not in str(function):
            old.copy_(new)


@contextmanager
def capture(graph: Graph):
    """Stands for torch.cuda.graph."""
    _capturing.append(graph)
    try:
        with graph:
            yield
    finally:
        _capturing.remove(graph)


def functions(kernels: loader.LoadedOp) -> dict:
    """A launcher of each kernel by name."""

    def launcher(kernel):
        run = _simulator(kernel, False)

        def launch(*given):
            step = lambda: run(*(to_numpy(x) if isinstance(x, torch.Tensor) else x for x in given))  # noqa: E731
            if _capturing:
                return _capturing[-1].steps.append(step)
            return _streams[-1].launch(step) if _streams else step()

        return launch

    return {kernel.name: launcher(kernel) for kernel in built_source(kernels.folder).kernels}


def tampered(patch, which: str, change) -> None:
    """After the last kernel of a pass, `change` gets its tensors by name."""

    def changed(kernels):
        found = functions(kernels)
        if which not in kernels.passes:
            return found
        last = kernels.passes[which][-1]
        run = found[last["name"]]

        def launch(*tensors):
            run(*tensors)
            change(dict(zip(last["params"], tensors)))

        return {**found, last["name"]: launch}

    patch.setattr(loader.LoadedOp, "functions", changed)


def install(patch) -> None:
    """Kernels of built folders run as programs; torch says that there is a GPU of compute capability 9.0."""
    patch.setattr(loader.LoadedOp, "functions", functions)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    patch.setattr(torch.cuda, "synchronize", lambda *_: None)
    patch.setattr(torch.cuda, "CUDAGraph", Graph)
    patch.setattr(torch.cuda, "graph", capture)


class Event:
    """Stands for torch.cuda.Event: each is one ms after the last."""

    now = 0

    def __init__(self, enable_timing=False):
        self.timing, self.ticket = enable_timing, None

    def record(self, stream=None):
        Event.now += 1
        self.at = Event.now
        self.ticket = stream and stream.mark()

    def elapsed_time(self, end):
        assert self.timing and end.timing
        return end.at - self.at


class Stream:
    """Stands for torch.cuda.Stream. What is launched on one waits in a queue; of what may run, any does.

    The first stream is the caller's, whose work is done before its next step: it waits for the others where it is told
    to, and then these run in an order drawn at random, as far as nothing keeps them.
    """

    every: list[Stream] = []
    random = random.Random(0)

    def __init__(self, priority=0):
        self.queue: list = []
        Stream.every.append(self)

    def launch(self, step) -> None:
        self.queue.append(step)
        if self is Stream.every[0]:
            while self.queue:
                Stream.random.choice([s for s in Stream.every if s.ready()]).advance()

    def ready(self) -> bool:
        return bool(self.queue) and (callable(self.queue[0]) or self.queue[0].passed)

    def advance(self) -> None:
        step = self.queue.pop(0)
        if callable(step):
            step()

    def mark(self) -> SimpleNamespace:
        ticket = SimpleNamespace(passed=False)
        self.queue.append(lambda: setattr(ticket, "passed", True))
        return ticket

    def wait_event(self, event: Event) -> None:
        if event.ticket:
            self.queue.append(event.ticket)

    def wait_stream(self, stream: Stream) -> None:
        self.queue.append(stream.mark())
        self.launch(lambda: None)


@contextmanager
def on_stream(stream: Stream):
    """Stands for torch.cuda.stream."""
    _streams.append(stream)
    try:
        yield
    finally:
        _streams.pop()


@contextmanager
def streams(patch, seed: int = 0):
    """Streams, in an order of this seed; all work is done at the end."""
    Stream.every, Stream.random = [], random.Random(seed)
    with on_stream(Stream()):
        stand_ins = {"Stream": Stream, "stream": on_stream, "Event": Event, "current_stream": lambda: _streams[-1]}
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        yield
        assert not any(stream.queue for stream in Stream.every), "work that the caller did not wait for"


def install_device(patch) -> None:
    """The same, and all that kdagen.autotune.devices.cuda asks of torch and nvidia-smi, of one GPU."""

    def smi(command, **_):
        names = command[1].removeprefix("--query-gpu=").split(",")
        if command[0] != "nvidia-smi" or command[-1] != f"--id=GPU-{PROPERTIES.uuid}" or {*names} - SMI.keys():
            raise subprocess.CalledProcessError(2, command)
        return SimpleNamespace(stdout=", ".join(SMI[name] for name in names) + "\n")

    install(patch)
    stand_ins = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda _: None,
        "get_device_properties": lambda *_: PROPERTIES, "Event": Event, "_sleep": lambda cycles: None,
        "empty_cache": lambda: None, "mem_get_info": lambda: (1 << 36, 1 << 37), "memory_reserved": lambda: 0,
        "memory_allocated": lambda: 0,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        patch.setattr(torch.cuda, name, stand_in)
    patch.setattr(subprocess, "run", smi)
