"""What is tuned, on which shapes and how it is timed: plain frozen data, whose canonical JSON is its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kdagen.errors import ArgumentError
from kdagen.runtime.manifest import canonical
from kdagen.schedule import Choices, CpuSchedule, DecodeSchedule, Schedule, TrainingSchedule
from kdagen.state import DEFAULT, StateType

CPU = "cpu"  # the target of the CPU backend
SCHEDULES = {"inference": Schedule, "training": TrainingSchedule, "decode": DecodeSchedule}
MODES = ("graph", "eager", "device")  # replays of a CUDA graph; as called; the GPU's time, the host being ahead
CACHES = ("cold", "warm")  # whether each call finds its inputs in the L2 cache


def short_hash(data, length: int = 12) -> str:
    """The name of plain data."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:length]


def source_hash(paths: Iterable[Path]) -> str:
    """A hash of files' text, by which it is told that what they decide may have changed."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(f"{path.name}\n{path.read_text()}".encode())
    return found.hexdigest()[:12]


@dataclass(frozen=True)
class Task:
    """Kernels of one recurrence for one purpose on one kind of device; what a schedule is chosen for."""

    op: str  # a name of the zoo, or "file.py:name"
    purpose: str  # "inference", "training" (forward and backward) or "decode"
    target: str  # of kdagen.target.TARGETS, or "cpu"
    device: str  # a name of kdagen.autotune.gpus, or "cpu": whose facts the model takes
    head_dim: tuple[int, int] = (128, 128)
    dtype: str = "bfloat16"
    gate_dtype: str | None = None
    state: StateType = DEFAULT

    @property
    def schedule_type(self) -> type[Choices]:
        """The kind of schedule that its candidates have."""
        return CpuSchedule if self.target == CPU else SCHEDULES[self.purpose]

    @property
    def dims(self) -> dict[str, int]:
        return {"K": self.head_dim[0], "V": self.head_dim[1]}

    @property
    def name(self) -> str:
        """For people and for files; two tasks of one sweep that differ otherwise have a hash behind it."""
        op = self.op.rpartition(":")[2]
        return f"{op}-{self.purpose}-{self.device}-{self.head_dim[0]}x{self.head_dim[1]}-{short_hash(self.fields(), 4)}"

    def fields(self) -> dict:
        return json.loads(canonical(dataclasses.asdict(self)))

    @staticmethod
    def of(fields: dict) -> Task:
        """The inverse of `fields`."""
        return Task(**{**fields, "head_dim": tuple(fields["head_dim"]), "state": StateType(**fields["state"])})


@dataclass(frozen=True)
class Workload:
    """A call's shape, written 1x8192x64 (B x T x H), 1x8192x16/64 (H / HV) or 1300+547+2048:64 (ragged lengths : H)."""

    batch: int
    tokens: int  # of each sequence; of a ragged batch all together
    heads: int  # of keys
    value_heads: int
    lengths: tuple[int, ...] = ()  # of a ragged batch's sequences

    @staticmethod
    def parse(text: str) -> Workload:
        """The inverse of `str`."""
        if not (match := re.fullmatch(r"(?:(\d+)x(\d+)x|([\d+]+):)(\d+)(?:/(\d+))?", text)):
            raise ArgumentError(
                f"shape '{text}': expected BxTxH such as 1x8192x64, BxTxH/HV, or lengths of a ragged batch such as "
                f"1300+547+2048:64"
            )
        lengths = tuple(map(int, match[3].split("+"))) if match[3] else ()
        b, t = (1, sum(lengths)) if lengths else (int(match[1]), int(match[2]))
        found = Workload(b, t, int(match[4]), int(match[5] or match[4]), lengths)
        if min(b, t, found.heads, found.value_heads) < 1 or found.value_heads % found.heads:
            raise ArgumentError(f"shape '{text}': expected positive numbers, and HV a multiple of H")
        return found

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.value_heads else f"{self.heads}/{self.value_heads}"
        if self.lengths:
            return f"{'+'.join(map(str, self.lengths))}:{heads}"
        return f"{self.batch}x{self.tokens}x{heads}"

    @property
    def sequences(self) -> int:
        return len(self.lengths) or self.batch

    @property
    def work(self) -> int:
        """Tokens times heads of values."""
        return self.batch * self.tokens * self.value_heads

    @property
    def bucket(self) -> int:
        """Calls of one bucket share a schedule: floor(log2(B T HV))."""
        return bucket(self.work)


def bucket(work) -> int:
    """The bucket of a call with so many tokens times heads of values.

    Where torch's compiler asks for any number of tokens, by comparisons alone.
    """
    if isinstance(work, int):
        return max(1, work).bit_length() - 1
    found = 0
    while work >= 2 << found:
        found += 1
    return found


@dataclass(frozen=True)
class Policy:
    """How calls are timed; figures of two policies are never compared."""

    mode: str = "device"
    cache: str = "cold"

    def __post_init__(self):
        if self.mode not in MODES or self.cache not in CACHES:
            raise ArgumentError(
                f"timing policy '{self}': expected one of {', '.join(MODES)} and one of {', '.join(CACHES)}, such as "
                f"'graph cold'"
            )

    @staticmethod
    def parse(text: str) -> Policy:
        """The inverse of `str`: "graph cold"."""
        mode, _, cache = text.partition(" ")
        return Policy(mode, cache or "cold")

    def __str__(self) -> str:
        return f"{self.mode} {self.cache}"


@dataclass(frozen=True)
class Candidate:
    """One schedule of a task."""

    task: Task
    schedule: Choices

    @property
    def id(self) -> str:
        """Names it in logs and files."""
        return short_hash({"task": self.task.fields(), "schedule": self.schedule.fields()})

    @staticmethod
    def of(task: Task, fields: dict) -> Candidate:
        """The candidate of a task whose schedule has these fields, as logs have them."""
        return Candidate(task, task.schedule_type().replace(**fields))


@dataclass(frozen=True)
class Study:
    """A task and the shapes that its candidates are timed on, the most important first."""

    task: Task
    workloads: tuple[Workload, ...]


@dataclass(frozen=True)
class Sweep:
    """All that a directory is tuned for: what `plan` was asked."""

    studies: tuple[Study, ...]
    policy: Policy = Policy()
    seed: int = 0
    exhaustive: int = 200  # candidates of a task up to which all are tried
    audit: float = 0.05  # of what the model rejects, the part that is tried all the same
    fixed: dict = field(default_factory=dict)  # axes of the spaces that are narrowed: values by field

    def fields(self) -> dict:
        studies = [{"task": s.task.fields(), "workloads": [str(w) for w in s.workloads]} for s in self.studies]
        rest = {"seed": self.seed, "exhaustive": self.exhaustive, "audit": self.audit, "fixed": self.fixed}
        return {"studies": studies, "policy": str(self.policy), **rest}

    @staticmethod
    def of(fields: dict) -> Sweep:
        """The inverse of `fields`."""
        studies = tuple(
            Study(Task.of(s["task"]), tuple(map(Workload.parse, s["workloads"]))) for s in fields["studies"]
        )
        return Sweep(**{**fields, "studies": studies, "policy": Policy.parse(fields["policy"])})
