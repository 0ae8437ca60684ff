"""What a worker measures on: a CUDA GPU, the CPU, or a recording. One protocol; which one it is, a spec says.

"cuda:0"                  a GPU, by its number among those that are visible (kdagen.autotune.devices.cuda)
"cpu"                     this machine's CPU backend (kdagen.autotune.devices.cpu)
"replay:LOG.jsonl?..."    a recorded log, with faults if asked for (kdagen.autotune.devices.replay)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from kdagen.autotune.sweep import Candidate, Policy, Workload

from kdagen.errors import ArgumentError


@dataclass(frozen=True)
class Compiled:
    """Machine code of a candidate: the folder that its manifest's libraries are in, and the manifest."""

    kernels: Path
    manifest: dict


Sampler = Callable[[], float]  # makes one timed call, returns milliseconds
Contender = tuple[Candidate, "Compiled | None"]  # None where nothing is compiled


class DeviceError(Exception):
    """The device is of no use to this process any more (a sticky CUDA error): it must end, and another one start."""


class Device(Protocol):
    """One device, owned by one process, which makes it once and asks it one thing at a time.

    A class `Device` in each module, made from what follows the colon of the spec. Making it fails with a KdagenError
    where there is no such device. Memory that ran out is torch.OutOfMemoryError; errors of CUDA that stick are
    DeviceError (torch.AcceleratorError and LaunchError are taken for it); any other exception is the candidate's own
    failure, and the process goes on.
    """

    def facts(self) -> dict:
        """ "device" (its own name), "processors", "versions" (by name, of all that changes figures), "target" (of
        kdagen.target.TARGETS, or "cpu"), "compiled" (whether it runs compiled kernels; True if left out) and, where it
        does not, "kernels" (a hash of the code that it runs instead): JSON. All but "compiled" and "target" is a part
        of what a figure was measured under.
        """
        ...

    def state(self) -> dict:
        """As it is now: "clocks" (MHz by name), "temperature", "throttling" (reasons for which it is slower than it
        could be, [] for none), "load" (of what else runs there); what cannot be told is left out. JSON.
        """
        ...

    def check(self, candidate: Candidate, compiled: Compiled | None) -> dict:
        """{"ok": bool, "reason": str, "errors": {name: [found, most]}}: whether it computes what the oracle does."""
        ...

    def samplers(self, contenders: list[Contender], workload: Workload, policy: Policy) -> dict[str, Sampler]:
        """By candidate's id, a function that makes one timed call; all of them are warm when this returns.

        Samplers of several contenders are called in turn, in any order: one that wants a warm cache makes an untimed
        call first, one that wants a cold one clears it. A worker asks for one contender a time, to know which of them
        broke: inputs of the last workload are best kept for the next contender. Memory is freed with the samplers.
        """
        ...


def open_device(spec: str) -> Device:
    """The device of a spec, in this process."""
    kind, _, rest = spec.partition(":")
    if not {"cuda": rest.isdigit(), "cpu": True, "replay": bool(rest)}.get(kind):
        raise ArgumentError(f"device '{spec}': expected cuda:N such as cuda:0, cpu, or replay:LOG.jsonl")
    return import_module(f"{__name__}.{kind}").Device(rest)
