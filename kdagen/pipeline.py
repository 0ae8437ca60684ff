"""The way from a recurrence to the sources of its kernels, a line a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdagen.autotune.select import default_schedule
from kdagen.codegen.source import OpSource
from kdagen.codegen.tilelang import render
from kdagen.derive.canonical import canonical as derive_canonical
from kdagen.derive.chunk import chunk_form
from kdagen.errors import RecurrenceError, ScheduleError
from kdagen.ir.canonical import Canonical
from kdagen.ir.tensor import Program
from kdagen.ir.tensor_verify import verify
from kdagen.ir.tile import Kernel
from kdagen.lower import lower
from kdagen.runtime.signature import describe
from kdagen.schedule import DTYPES, Schedule
from kdagen.target import target as find_target


@dataclass(frozen=True)
class Compilation:
    """What each stage of the pipeline made, first to last."""

    canonical: Canonical
    program: Program
    kernels: tuple[Kernel, ...]
    source: OpSource


def compile_op(recurrence, *args, **choices) -> OpSource:
    """The generated TileLang modules of a recurrence and their launch plan: see `compile_stages`."""
    return compile_stages(recurrence, *args, **choices).source


def compile_stages(
    recurrence,
    head_dim: int | tuple[int, int] = (128, 128),
    dtype: str = "bfloat16",
    arch: str = "sm90",
    schedule: Schedule | dict | None = None,
    gate_dtype: str | None = None,
    template_folders: Sequence[str | Path] = (),
) -> Compilation:
    """Derive a recurrence's forward kernels and generate their TileLang modules.

    Args:
        recurrence: what `@kg.recurrence` returns.
        head_dim: (K, V), each 64, 128 or 256; one number stands for both.
        dtype: of keys, values, operands and output: "bfloat16" or "float16"; sums and states are fp32.
        arch: a name from `kdagen.target.TARGETS`.
        schedule: a whole schedule, or the fields in which it differs from the default.
        gate_dtype: of gates and scalars a token, `dtype` unless given.
        template_folders: folders of skeletons that come before kdagen's own.

    Raises:
        RecurrenceError: the recurrence is outside the family.
        ScheduleError, TargetError: the choices do not fit.
    """
    dims, target = _dims(head_dim), find_target(arch)
    canonical = derive_canonical(recurrence)  # rank-one streams over one decayed state
    if not canonical.streams:
        raise RecurrenceError(
            f"recurrence '{canonical.name}' writes nothing to its state, so there is nothing for kernels to do: "
            f"expected a write, such as S + kg.outer(k, v)"
        )
    program = verify(chunk_form(canonical))  # tensor IR of a chunk
    dtypes = argument_dtypes(canonical, dtype, gate_dtype or dtype)
    if not isinstance(schedule, Schedule):
        schedule = default_schedule(canonical, dims, dtype, target, **(schedule or {}))
    kernels = lower(program, dims, dtypes, dtype, schedule, target)  # tile IR
    modules = tuple(render(kernel, template_folders) for kernel in kernels)  # TileLang
    source = OpSource(
        canonical.name,
        modules,
        schedule.chunk_size,
        dims,
        dtype,
        schedule.fields(),
        target.name,
        tuple(a.name for a in canonical.arguments),
        describe(recurrence, canonical),
    )
    return Compilation(canonical, program, kernels, source)


def _dims(head_dim: int | tuple[int, int]) -> dict[str, int]:
    k, v = (head_dim, head_dim) if isinstance(head_dim, int) else head_dim
    return {"K": k, "V": v}


def argument_dtypes(canonical: Canonical, dtype: str, gate_dtype: str) -> dict[str, str]:
    """Parameters of the head in fp32; keys and values in `dtype`; what only gates and scales in `gate_dtype`."""
    if dtype not in DTYPES:
        raise ScheduleError(f"dtype '{dtype}' has no kernels: expected {' or '.join(DTYPES)}")
    if gate_dtype not in (*DTYPES, "float32"):
        raise ScheduleError(f"gate_dtype '{gate_dtype}': expected {', '.join(DTYPES)} or float32")
    vectors = {
        s.name
        for stream in canonical.streams
        for e in (stream.x, stream.reader.y, stream.reader.z)
        for s in e.free_symbols
    }
    vectors |= {s.name for e in (canonical.output.z, canonical.output.y) for s in e.free_symbols}
    gates = {s.name for s in canonical.decay.free_symbols} - vectors
    return {
        a.name: "float32" if not a.per_token else gate_dtype if not a.axis or a.name in gates else dtype
        for a in canonical.arguments
    }
