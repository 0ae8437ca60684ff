"""Which schedules there are: a product of typed axes, and named constraints that say what of it is legal, and why not.

Each family of kernels has a file: forward, training, decode and, for the CPU, cpu. A constraint names the fields that
it looks at, so what it refuses is counted, and logged, once for all candidates that share them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

from kdagen.autotune.sweep import CPU, SCHEDULES, Task

from kdagen.errors import ArgumentError
from kdagen.schedule import Choices, CpuSchedule


@dataclass(frozen=True)
class Axis:
    """A field of the schedule and the values that it may take."""

    field: str
    values: tuple


@dataclass(frozen=True)
class Constraint:
    """What some fields of a schedule must satisfy; the others are as the default has them beside these."""

    name: str
    fields: tuple[str, ...]
    refusal: Callable[[Choices, Task, object], str | None]  # (schedule, task, canonical form): None, or the reason


@dataclass(frozen=True)
class Rejected:
    """Candidates that a constraint refuses: all that have these fields and that no constraint before it refused."""

    fields: dict
    constraint: str
    reason: str
    candidates: int


@dataclass(frozen=True)
class Survey:
    """What became of each candidate of a space."""

    axes: tuple[Axis, ...]
    size: int
    rejected: tuple[Rejected, ...]
    legal: tuple[Choices, ...]
    removed: dict[str, int]  # by constraint, in order


@dataclass(frozen=True)
class Space:
    """The candidates of a task."""

    task: Task
    axes: tuple[Axis, ...]
    constraints: tuple[Constraint, ...]
    complete: Callable[..., Choices]  # the default schedule, some fields being given
    canonical: object = None
    refused: dict = field(default_factory=dict, compare=False, repr=False)  # by constraint and values, what was asked

    @property
    def default(self) -> Choices:
        """The untuned schedule."""
        return self.complete()

    def own(self, fixed: dict) -> dict:
        """Of fields that are narrowed for several tasks, those that are not another kind of schedule's alone."""
        others = {f.name for kind in (*SCHEDULES.values(), CpuSchedule) for f in dataclasses.fields(kind)}
        others -= {a.field for a in self.axes}
        return {field: values for field, values in fixed.items() if field not in others}

    def narrowed(self, fixed: dict) -> tuple[Axis, ...]:
        """The axes, some of them with the values of `fixed` alone: a list of values by field, or one value."""
        names = [a.field for a in self.axes]
        if unknown := sorted(set(fixed) - set(names)):
            raise ArgumentError(
                f"no axis {', '.join(unknown)} in the space of {self.task.op} for {self.task.purpose} on "
                f"{self.task.target}: expected some of {', '.join(names)}"
            )
        return tuple(_narrowed(a, fixed[a.field]) if a.field in fixed else a for a in self.axes)

    def survey(self, fixed: dict | None = None) -> Survey:
        """Every candidate is legal, or refused by the first constraint that it does not satisfy."""
        axes = self.narrowed(fixed or {})
        rejected: dict[tuple, Rejected] = {}
        alive, bound = [{}], []
        for constraint in self.constraints:
            new = [a for a in axes if a.field in constraint.fields and a.field not in bound]
            bound += [a.field for a in new]
            each = math.prod(len(a.values) for a in axes if a.field not in bound)
            candidates = [{**c, **rest} for c in alive for rest in _product(new)]
            alive = []
            for candidate in candidates:
                fields, reason = self._refusal(constraint, candidate)
                if reason is None:
                    alive.append(candidate)
                else:
                    key = (constraint.name, *fields.values())
                    so_far = rejected[key].candidates if key in rejected else 0
                    rejected[key] = Rejected(fields, constraint.name, reason, so_far + each)
        rest = [a for a in axes if a.field not in bound]
        legal = [{**c, **others} for c in alive for others in _product(rest)]
        legal.sort(key=lambda c: [a.values.index(c[a.field]) for a in axes])
        removed = {
            c.name: sum(r.candidates for r in rejected.values() if r.constraint == c.name) for c in self.constraints
        }
        size, base = math.prod(len(a.values) for a in axes), self.default
        return Survey(axes, size, tuple(rejected.values()), tuple(base.replace(**fields) for fields in legal), removed)

    def alone(self, fixed: dict | None = None) -> dict[str, int]:
        """How many candidates each constraint would remove if there were no others."""
        axes, found = self.narrowed(fixed or {}), {}
        for constraint in self.constraints:
            own = [a for a in axes if a.field in constraint.fields]
            refused = sum(self._refusal(constraint, c)[1] is not None for c in _product(own))
            found[constraint.name] = refused * math.prod(len(a.values) for a in axes if a not in own)
        return found

    def _refusal(self, constraint: Constraint, candidate: dict) -> tuple[dict, str | None]:
        """The fields that a constraint looks at, and why it refuses them."""
        fields = {f: candidate[f] for f in constraint.fields if f in candidate}
        key = (constraint.name, *fields.values())
        if key not in self.refused:
            self.refused[key] = constraint.refusal(self.complete(**fields), self.task, self.canonical)
        return fields, self.refused[key]


def _narrowed(axis: Axis, given) -> Axis:
    values = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if wrong := [v for v in values if v not in axis.values]:
        raise ArgumentError(
            f"{axis.field} {', '.join(map(str, wrong))} is not on its axis: expected some of "
            f"{', '.join(map(str, axis.values))}"
        )
    return Axis(axis.field, values)


def _product(axes: list[Axis]) -> Iterator[dict]:
    for values in itertools.product(*(a.values for a in axes)):
        yield dict(zip((a.field for a in axes), values))


@cache
def space_of(task: Task) -> Space:
    """The space of a task, by its purpose and target."""
    if task.target == CPU:
        from kdagen.autotune.space import cpu

        return cpu.space(task)
    from kdagen.autotune.space import decode, forward, training

    return {"inference": forward, "training": training, "decode": decode}[task.purpose].space(task)


def describe(task: Task, fixed: dict | None = None) -> str:
    """Axes, what each constraint removes, and what the model keeps: the text of `kdagen tune space`."""
    from kdagen.autotune.space.shown import shown

    return shown(task, fixed or {})
