"""Which schedule a call runs by, among those that were tuned: what it is looked up for, and one log line that says so.

The choice itself is kdagen.autotune.select's, for kernels that are compiled just in time kdagen.autotune.choose's. It
is made once for each kind of call and then remembered; nothing here measures, or needs a compiler.
"""

from __future__ import annotations

import logging
import os
import platform
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from kdagen.autotune.select import Entry, Key, Selection, select_compiling, tables
from kdagen.autotune.sweep import CPU, bucket
from kdagen.runtime.checks import short
from kdagen.schedule import CpuSchedule
from kdagen.target import running

UNTUNED_CPU = CpuSchedule()
log = logging.getLogger("kdagen")


@dataclass(frozen=True)
class Want:
    """What the schedule of a call is chosen by: the key, and what else it must agree with."""

    key: Key
    keep: str = ""  # of a forward in training, which is the user's choice
    every: int = 0  # tokens after which states are returned: whole chunks

    def usable(self, schedule: dict) -> bool:
        """Whether a schedule gives what was asked for."""
        return self.every % schedule.get("chunk_size", 1) == 0 and schedule.get("keep", self.keep) == self.keep


class Tuned:
    """What is chosen for the calls of one op; `off` are the purposes whose schedule the user gave."""

    def __init__(self, op, off: frozenset[str] = frozenset()):
        self.op, self.off = op, off
        self.said: dict[tuple, str] = {}  # by purpose, device and bucket
        self._value, self._gating = op.signature.value, op.signature.gating
        self._wants: dict[tuple, Want | None] = {}
        self._cpu: dict[tuple, CpuSchedule] = {}

    def want(self, call, purpose: str, capability: str) -> Want | None:
        """What to choose kernels by; None where the user gave a schedule, or the GPU is not known to torch."""
        device, processors = gpu(call.like.device)
        if purpose in self.off or not device:
            return None
        known = device, processors, capability, *self._kind(call, purpose)
        if known not in self._wants:
            target = running(capability)
            self._wants[known] = self._want(call, purpose, target.name, device, processors) if target else None
        return self._wants[known]

    def _kind(self, call, purpose: str) -> tuple:
        """What all that is chosen follows from; taken at every call, and so in a few microseconds."""
        size, tensors = call.sizes, call.tensors
        dims = size["K"], size["V"], size["H"], size["HV"]
        if type(sum(dims)) is not int:  # torch's compiler has numbers of its own
            dims = tuple(map(int, dims))
        work, every = bucket(size["B"] * size["T"] * size["HV"]), call.every
        return purpose, work, every, dims, tensors[self._value].dtype, *[tensors[name].dtype for name in self._gating]

    def _want(self, call, purpose: str, target: str, device: str, processors: int) -> Want:
        _, work, every, (k, v, h, hv), dtype, *gates = self._kind(call, purpose)
        dtypes = short(dtype), "+".join(sorted(set(map(short, gates)))) or short(dtype)
        state = f"{self.op.state.layout} {self.op.state.dtype}"
        what = self.op.signature.recurrence, purpose, target, (k, v), hv // h if h else 1, *dtypes, state
        keep = self.op.training.keep.value if purpose == "training" else ""
        return Want(Key(*what, device, processors, work), keep, every)

    @cached_property
    def cpu_entries(self) -> dict[str, list[Entry]]:
        """What tables know of this op on this CPU, by purpose."""
        name, processors = this_cpu()
        found: dict[str, list[Entry]] = {}
        for entry in tables():
            k = entry.key
            known = (k.target, k.recurrence, k.device, k.processors)
            if known == (CPU, self.op.signature.recurrence, name, processors) and k.purpose not in self.off:
                found.setdefault(k.purpose, []).append(entry)
        return found

    def cpu(self, call, purpose: str) -> CpuSchedule:
        """The schedule of a call on the CPU: as tuned on this very one, else the default."""
        if not (entries := self.cpu_entries.get(purpose)):
            return UNTUNED_CPU
        kind = self._kind(call, purpose)
        if kind not in self._cpu:
            self._cpu[kind] = cpu_choice(self, self._want(call, purpose, CPU, *this_cpu()), entries)
        return self._cpu[kind]

    def say(self, want: Want, choice: Selection) -> None:
        """One line for each purpose and bucket, in the log and in `explain`."""
        key, name = want.key, self.op.name
        if (which := (key.purpose, key.device, key.bucket)) not in self.said:
            self.said[which] = str(choice)
            log.info("%s %s on %s: %s", name, key.purpose, key.device, choice)


def cpu_schedule(op, call, purpose: str) -> CpuSchedule:
    """The schedule of an op's call on the CPU."""
    return op.tuned.cpu(call, purpose)


def cpu_choice(tuned: Tuned, want: Want, entries: list[Entry]) -> CpuSchedule:
    """The choice among the entries of this CPU, said; what this kdagen does not know is passed over."""
    choice = select_compiling(want.key, entries, lambda fields: UNTUNED_CPU.replace(**fields))
    tuned.say(want, choice)
    return UNTUNED_CPU.replace(**(choice.schedule or {}))


@cache
def gpu(device) -> tuple[str, int]:
    """A GPU's own name and its number of multiprocessors; none where torch has no GPU, as in tests and exports."""
    import torch

    if not torch.cuda.is_available():
        return "", 0
    found = torch.cuda.get_device_properties(device)
    return found.name, found.multi_processor_count


@cache
def this_cpu() -> tuple[str, int]:
    """This machine's CPU by name, and the cores that this process may use."""
    cpus = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpus.read_text(), re.M) if cpus.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return named[1].strip() if named else platform.processor() or platform.machine(), cores
