"""A GPU as a device of the tuner: checks and times built kernels with torch and tvm-ffi, without any compiler.

What is launched is in kdagen.autotune.launches, how one call is timed in kdagen.autotune.devices.clock.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import subprocess
from dataclasses import dataclass, field
from functools import cached_property, partial

from kdagen.autotune import launches
from kdagen.autotune.check import check
from kdagen.autotune.compiled import FIX
from kdagen.autotune.devices import Compiled, Contender, Sampler, clock
from kdagen.autotune.sweep import Candidate, Policy, Task, Workload

from kdagen.errors import ArgumentError
from kdagen.runtime import manifest as manifests
from kdagen.runtime.loader import LoadedOp
from kdagen.target import running

GATE = "mild"  # class of the gates that are timed: kernels take as long for any
REASONS = {  # bits of nvidia-smi's active reasons; an idle GPU, and clocks as they were set, are no throttling
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
NOW = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
MADE = (*launches.ALLOCATED, *launches.ZERO, "state_pool")  # roles of what a contender has for itself


@dataclass(frozen=True)
class Inputs:
    """Sets of inputs on the device, which contenders share; `turn` says whose turn it is, whoever asks."""

    key: tuple
    sets: list
    turn: itertools.count = field(default_factory=itertools.count)


class Device:
    """One GPU, by its number among those that torch sees."""

    def __init__(self, number: str):
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number) >= count:
            seen = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0" if count else "no GPU"
            raise ArgumentError(
                f"device 'cuda:{number}': torch {torch.__version__} sees {seen} here: choose that, or --device cpu"
            )
        self.name = f"cuda:{int(number)}"
        torch.cuda.set_device(int(number))
        self.properties = torch.cuda.get_device_properties(int(number))
        self._inputs: Inputs | None = None
        self._loaded: dict[str, LoadedOp] = {}

    def facts(self) -> dict:
        """Its own name, multiprocessors and cache, and the versions of all that runs here."""
        import torch

        found = self.properties
        target = running(f"{found.major}.{found.minor}")
        driver = smi(self.uuid, ["driver_version"])
        versions = {"cuda": torch.version.cuda, "driver": driver.get("driver_version")}
        versions |= installed("torch", "apache-tvm-ffi")
        return {
            "device": found.name,
            "processors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "versions": {name: version for name, version in versions.items() if version},
            "target": target.name if target else None,
        }

    @property
    def uuid(self) -> str:
        """As nvidia-smi knows it, whatever CUDA_VISIBLE_DEVICES hides."""
        return f"GPU-{self.properties.uuid}"

    def state(self) -> dict:
        """As nvidia-smi tells."""
        now = {name: number(text) for name, text in smi(self.uuid, NOW).items()}
        clocks = {short: now.get(f"clocks.{short}") for short in ("sm", "mem")}
        found = {
            "temperature": now.get("temperature.gpu"),
            "power": now.get("power.draw"),
            "throttling": self._reasons(),
        }
        clocks = {name: mhz for name, mhz in clocks.items() if mhz is not None}
        return {name: x for name, x in {"clocks": clocks or None, **found}.items() if x is not None}

    def _reasons(self) -> list[str] | None:
        """Why it is slower than it could be; drivers call the field by one of two names."""
        for name in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
            if text := smi(self.uuid, [name]).get(name, "").strip():
                return [words for bit, words in REASONS.items() if hexadecimal(text) & bit]
        return None

    def check(self, candidate: Candidate, compiled: Compiled) -> dict:
        """Against the float64 recurrence, on this GPU."""
        import torch

        kernels = self._kernels(compiled)
        with torch.no_grad():
            return check(candidate.task, partial(launches.run, kernels), self.name, kernels.plan)

    def samplers(self, contenders: list[Contender], workload: Workload, policy: Policy) -> dict[str, Sampler]:
        """By candidate; inputs are made once for a task and a workload, workspaces and results for each contender."""
        import torch

        with torch.no_grad():
            return {
                c.id: self._sampler(c.task, self._kernels(compiled), workload, policy) for c, compiled in contenders
            }

    def _kernels(self, compiled: Compiled) -> LoadedOp:
        """Loaded once: a library stays open anyway."""
        key = f"{compiled.kernels}: {compiled.manifest['digest']}"
        if key not in self._loaded:
            manifests.verify(compiled.kernels, compiled.manifest["files"], FIX, "the manifest")
            self._loaded[key] = LoadedOp(compiled.kernels, compiled.manifest)
        return self._loaded[key]

    def _sampler(self, task: Task, kernels: LoadedOp, workload: Workload, policy: Policy) -> Sampler:
        shape = workload.batch, workload.tokens, workload.value_heads
        sizes = {"sequences": workload.sequences, "key_heads": workload.heads}
        l2 = self.properties.L2_cache_size
        least = launches.least_bytes(kernels, shape, **sizes)[""]
        cold = policy.cache == "cold"
        count = clock.sets_needed(least, l2) if cold else 1
        inputs = self._inputs_for(task, kernels, workload, count)
        self._check_room(launches.tensor_bytes(kernels, shape, *MADE, **sizes) * count, workload)
        sets, call = self._calls(kernels, inputs, policy)
        small = cold and count * least < clock.COLD * l2
        return clock.sampler(call, sets, policy, inputs.turn, self.clear_cache if small else lambda: None)

    def _calls(self, kernels: LoadedOp, inputs: Inputs, policy: Policy) -> tuple:
        """What a contender is called on, and the call: as people make it, or bare launches."""
        if policy.mode != "eager":
            return [launches.memory(kernels, shared) for shared in inputs.sets], launches.whole_call(kernels)
        if kernels.purpose != "decode":
            return inputs.sets, launches.as_called(kernels)
        pools = [launches.of_type(kernels, shared["states"]).clone() for shared in inputs.sets]
        return [{**s, "state_pool": p} for s, p in zip(inputs.sets, pools)], launches.as_called(kernels)

    def _inputs_for(self, task: Task, kernels: LoadedOp, workload: Workload, count: int) -> Inputs:
        """Those of the last call, if they are for the same; else they make room first."""
        key = task, str(workload), count
        if self._inputs is None or self._inputs.key != key:
            self._inputs = None
            self._free()
            sizes = {"sequences": workload.sequences, "key_heads": workload.heads}
            shape = workload.batch, workload.tokens, workload.value_heads
            self._check_room(count * launches.tensor_bytes(kernels, shape, "argument", "d_out", **sizes), workload)
            self._inputs = Inputs(key, [self._set(kernels, workload, seed) for seed in range(count)])
        return self._inputs

    def _set(self, kernels: LoadedOp, workload: Workload, seed: int) -> dict:
        tokens = min(workload.tokens, launches.SAMPLED)
        shape = workload.batch, tokens, workload.value_heads
        drawn = launches.arguments(kernels, shape, GATE, seed, workload.value_heads // workload.heads)
        long = launches.stretched(kernels, launches.on_device(drawn, self.name), workload.tokens)
        return launches.shared_inputs(kernels, launches.ragged(long, workload.lengths), seed)

    def clear_cache(self) -> None:
        """Fills the L2 cache with something else."""
        self._other.zero_()

    @cached_property
    def _other(self):
        import torch

        return torch.empty(clock.COLD * self.properties.L2_cache_size, dtype=torch.uint8, device=self.name)

    def _check_room(self, needed: int, workload: Workload) -> None:
        """Refuses what cannot fit before any of it is made."""
        import torch

        if needed <= self._room():
            return
        self._free()
        if needed > (free := self._room()):
            raise torch.OutOfMemoryError(
                f"{workload}: {needed / 1e9:.1f} GB more are needed, {free / 1e9:.1f} GB are free"
            )

    def _room(self) -> int:
        """Bytes that the device has free, and those that torch keeps without use."""
        import torch

        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def _free(self) -> None:
        import torch

        torch.cuda.empty_cache()


def installed(*names: str) -> dict[str, str]:
    """Versions of packages; those that are not there are left out."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def smi(gpu: str, names) -> dict[str, str]:
    """Fields of nvidia-smi by name; none where it is missing or does not know them."""
    asked = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={gpu}"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (word.strip() for word in told.strip().split(","))))


def number(text: str) -> float | None:
    """ "1980 MHz" as 1980.0."""
    try:
        return float(text.split()[0])
    except (ValueError, IndexError):
        return None


def hexadecimal(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        return 0
