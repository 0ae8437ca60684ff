"""A schedule: every choice that changes how fast a kernel runs and none that changes what it computes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from enum import Enum

from kdagen.errors import ScheduleError

DTYPES = ("bfloat16", "float16")  # of operands; sums and states are fp32


class DecayForm(str, Enum):
    """How exp(g_i + ...) between two tokens of a chunk is kept finite."""

    NONE = "none"  # the state does not decay
    SCALAR = "scalar"  # one rate a head: a C x C matrix of decays, after the product
    FACTORED = "factored"  # bounded gate: rows and columns scaled about one fixed row
    TREE = "tree"  # any gate: midpoint tree, every factor <= 1


class Choices:
    """What schedules share. A canonical JSON is its identity: it names the build, the cache entry and the manifest."""

    def json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.fields(), sort_keys=True, separators=(",", ":"))

    def fields(self) -> dict:
        """The choices by name, as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def replace(self, **choices) -> Choices:
        """A copy with some choices changed; unknown names are refused."""
        names = {f.name for f in dataclasses.fields(self)}
        if unknown := sorted(set(choices) - names):
            raise ScheduleError(
                f"unknown schedule field {', '.join(unknown)}: expected some of {', '.join(sorted(names))}"
            )
        for field, kind in (("decay", DecayForm), ("keep", Keep)):
            if field in choices:
                choices[field] = _member(kind, field, choices[field])
        return dataclasses.replace(self, **choices)


@dataclass(frozen=True)
class Schedule(Choices):
    """How the forward kernels of one op are laid out on one target."""

    chunk_size: int = 16  # tokens a chunk; 16, 32 or 64
    decay: DecayForm = DecayForm.TREE
    prepare_threads: int = 64
    v_tile: int = 64  # value channels a scan block holds
    scan_threads: int = 128  # threads that do the products (a producer warpgroup comes on top)
    stages: int = 2  # chunks in flight between memory and the scan
    split: int = 0  # chunks of a segment that is scanned by itself, beside the others; 0: a sequence is one scan
    output: str = "fused"  # "fused": the scan writes O; "split": it stores states, and a third kernel writes O
    prepare_skeleton: str = "prepare"
    scan_skeleton: str = "scan_pipelined"
    output_skeleton: str = "output"


class Keep(str, Enum):
    """What a forward in training leaves for its backward, beside its arguments."""

    INPUTS = "inputs"  # nothing: the backward computes everything again
    STATES = "states"  # the state before each chunk
    ALL = "all"  # these, and all that prepare made


@dataclass(frozen=True)
class TrainingSchedule(Schedule):
    """How the kernels of an op in training are laid out: the forward that a backward follows, and the backward.

    The backward is a reverse scan, which leaves the state's cotangent at the end of each segment of chunks, and then a
    kernel whose blocks take a segment each, from its last chunk to its first, and write the gradients.
    """

    keep: Keep = Keep.STATES
    reverse_v_tile: int = 64  # value channels that a block of the reverse scan holds, by twice as many threads
    segment: int = 8  # chunks that a block of the gradients kernel takes
    gradient_threads: int = 256
    gradients_skeleton: str = "gradients"


@dataclass(frozen=True)
class DecodeSchedule(Choices):
    """How the kernel that decodes is laid out: a block has a tile of one head's state in registers."""

    v_tile: int = 32  # value channels that a block holds
    threads: int = 128
    skeleton: str = "decode"


CPU_ROWS = (16, 32, 64, 128)


@dataclass(frozen=True)
class CpuSchedule(Choices):
    """How the CPU backend runs an op; decoding, which has no chunks, takes only `threads`.

    Another `rows` adds up in another order, and so gives results that agree to rounding but not to the bit; another
    `span` does so for gradients of parameters alone.
    """

    rows: int = 64  # of a chunk's solve, tokens times streams that read the state: one of CPU_ROWS
    span: int = 1  # times as many tokens are prepared at once as commonly: fewer, larger ops, and as much more scratch
    threads: int = 0  # of torch, at most: never more than it has; 0: all that it has

    def __post_init__(self):
        legal = {"rows": self.rows in CPU_ROWS, "span": self.span > 0, "threads": self.threads >= 0}
        if bad := [f"{name} = {getattr(self, name)}" for name, good in legal.items() if not good]:
            raise ScheduleError(
                f"{', '.join(bad)}: expected rows among {', '.join(map(str, CPU_ROWS))}, span from 1 on, and threads "
                f"from 1 on or 0 for all"
            )


def changes(fields: dict, default: dict) -> dict:
    """The fields of a schedule in which it differs from another one."""
    return {name: value for name, value in fields.items() if name not in default or default[name] != value}


def in_words(fields: dict) -> str:
    """Fields as people read them."""
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def _member(kind: type[Enum], field: str, name: str) -> Enum:
    try:
        return kind(name)
    except ValueError:
        raise ScheduleError(f"{field} '{name}': expected one of {', '.join(m.value for m in kind)}") from None
