"""The way from a recurrence to the sources of its kernels, a line a stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdagen.autotune.defaults import default_decode_schedule, default_schedule, default_training_schedule
from kdagen.codegen.source import OpSource
from kdagen.codegen.tilelang import render
from kdagen.derive.adjoint import adjoint
from kdagen.derive.canonical import canonical as derive_canonical
from kdagen.derive.chunk import chunk_form
from kdagen.derive.step import step_form
from kdagen.errors import RecurrenceError, ScheduleError
from kdagen.ir import step as step_ir
from kdagen.ir.canonical import Canonical
from kdagen.ir.tensor import Adjoint, Program
from kdagen.ir.tensor_verify import verify, verify_adjoint
from kdagen.ir.tile import Kernel
from kdagen.lower import lower
from kdagen.lower.decode import lower_decode
from kdagen.lower.training import lower_training
from kdagen.runtime.signature import describe
from kdagen.schedule import DTYPES, Choices, DecodeSchedule, Schedule, TrainingSchedule
from kdagen.state import DEFAULT, StateType
from kdagen.target import target as find_target


@dataclass(frozen=True)
class Compilation:
    """What each stage of the pipeline made, first to last."""

    canonical: Canonical
    program: Program
    kernels: tuple[Kernel, ...]
    source: OpSource
    adjoint: Adjoint | None = None  # in training
    step: step_ir.StepForm | None = None  # in decoding


def compile_op(recurrence, *args, **choices) -> OpSource:
    """The generated TileLang modules of a recurrence and their launch plan: see `compile_stages`."""
    return compile_stages(recurrence, *args, **choices).source


def compile_training(recurrence, *args, **choices) -> OpSource:
    """The same for training, the forward and the backward: see `compile_training_stages`."""
    return compile_training_stages(recurrence, *args, **choices).source


def compile_decode(recurrence, *args, **choices) -> OpSource:
    """The same for decoding, token by token on a pool of states: see `compile_decode_stages`."""
    return compile_decode_stages(recurrence, *args, **choices).source


def compile_stages(
    recurrence,
    head_dim: int | tuple[int, int] = (128, 128),
    dtype: str = "bfloat16",
    arch: str = "sm90",
    schedule: Schedule | dict | None = None,
    gate_dtype: str | None = None,
    template_folders: Sequence[str | Path] = (),
    state: StateType = DEFAULT,
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
        state: layout and dtype of states, as they are given and returned.

    Raises:
        RecurrenceError: the recurrence is outside the family.
        ScheduleError, TargetError: the choices do not fit.
    """
    call = Call(recurrence, head_dim, dtype, arch, gate_dtype, state)
    schedule = call.schedule(schedule, Schedule, default_schedule)
    kernels = lower(call.program, call.dims, call.dtypes, dtype, schedule, call.target, state)  # tile IR
    return Compilation(call.canonical, call.program, kernels, call.source(kernels, schedule, template_folders))


def compile_training_stages(
    recurrence,
    head_dim: int | tuple[int, int] = (128, 128),
    dtype: str = "bfloat16",
    arch: str = "sm90",
    schedule: TrainingSchedule | dict | None = None,
    gate_dtype: str | None = None,
    template_folders: Sequence[str | Path] = (),
    state: StateType = DEFAULT,
) -> Compilation:
    """Derive a recurrence's kernels for training, forward and backward; arguments and errors as `compile_stages` has.

    The source's `passes` name the kernels of each in launch order, `kept` what passes from one to the other.
    """
    call = Call(recurrence, head_dim, dtype, arch, gate_dtype, state)
    derived = verify_adjoint(adjoint(call.program))  # tensor IR of a chunk's backward
    schedule = call.schedule(schedule, TrainingSchedule, default_training_schedule)
    lowered = lower_training(derived, call.dims, call.dtypes, dtype, schedule, call.target, state)
    kernels = tuple({k.name: k for k in lowered.forward + lowered.backward}.values())
    assert {*lowered.forward, *lowered.backward} == {*kernels}, "two kernels share a name"
    passes = {which: tuple(k.name for k in getattr(lowered, which)) for which in ("forward", "backward")}
    source = call.source(kernels, schedule, template_folders)
    source = dataclasses.replace(source, passes=passes, kept=lowered.kept)
    return Compilation(call.canonical, call.program, kernels, source, derived)


def compile_decode_stages(
    recurrence,
    head_dim: int | tuple[int, int] = (128, 128),
    dtype: str = "bfloat16",
    arch: str = "sm90",
    schedule: DecodeSchedule | dict | None = None,
    gate_dtype: str | None = None,
    template_folders: Sequence[str | Path] = (),
    state: StateType = DEFAULT,
) -> Compilation:
    """Derive a recurrence's kernel for decoding, the only one of pass "decode"; else as `compile_stages`."""
    call = Call(recurrence, head_dim, dtype, arch, gate_dtype, state)
    step = step_ir.verify(step_form(call.canonical))  # one token as tensor ops
    schedule = call.schedule(schedule, DecodeSchedule, default_decode_schedule)
    kernels = (lower_decode(step, call.dims, call.dtypes, dtype, schedule, state),)
    source = call.source(kernels, schedule, template_folders)
    source = dataclasses.replace(source, passes={"decode": tuple(k.name for k in kernels)})
    return Compilation(call.canonical, call.program, kernels, source, step=step)


COMPILERS = {"inference": compile_op, "training": compile_training, "decode": compile_decode}  # by purpose


class Call:
    """What all kinds of compilation share: what was asked for, and what follows from it before any schedule."""

    def __init__(self, recurrence, head_dim, dtype: str, arch: str, gate_dtype: str | None, state: StateType):
        k, v = (head_dim, head_dim) if isinstance(head_dim, int) else head_dim
        self.recurrence, self.dims, self.dtype, self.target = recurrence, {"K": k, "V": v}, dtype, find_target(arch)
        self.state = state
        self.canonical = canonical = derive_canonical(recurrence)  # rank-one streams over one decayed state
        if not canonical.streams:
            raise RecurrenceError(
                f"recurrence '{canonical.name}' writes nothing to its state, so there is nothing for kernels to do: "
                f"expected a write, such as S + kg.outer(k, v)"
            )
        self.program = verify(chunk_form(canonical))  # tensor IR of a chunk
        self.dtypes = argument_dtypes(canonical, dtype, gate_dtype or dtype)

    def schedule(self, given, kind: type, default) -> Choices:
        if isinstance(given, Choices):
            if not isinstance(given, kind):
                raise ScheduleError(f"a {type(given).__name__} is no choice here: expected a {kind.__name__}")
            return given
        return default(self.canonical, self.dims, self.dtype, self.target, **(given or {}))

    def source(self, kernels: tuple[Kernel, ...], schedule: Choices, template_folders) -> OpSource:
        return OpSource(
            self.canonical.name,
            tuple(render(kernel, template_folders) for kernel in kernels),  # TileLang
            kernels[-1].chunk_size,
            self.dims,
            self.dtype,
            schedule.fields(),
            self.target.name,
            tuple(a.name for a in self.canonical.arguments),
            describe(self.recurrence, self.canonical),
            state=self.state,
        )


def argument_dtypes(canonical: Canonical, dtype: str, gate_dtype: str) -> dict[str, str]:
    """Those of Canonical.dtypes, if there are kernels of such."""
    if dtype not in DTYPES:
        raise ScheduleError(f"dtype '{dtype}' has no kernels: expected {' or '.join(DTYPES)}")
    if gate_dtype not in (*DTYPES, "float32"):
        raise ScheduleError(f"gate_dtype '{gate_dtype}': expected {', '.join(DTYPES)} or float32")
    return canonical.dtypes(dtype, gate_dtype)
