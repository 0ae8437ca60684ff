"""A space in words: its axes, what each constraint removes, what the model leaves to a compiler."""

from __future__ import annotations

from kdagen.autotune import gpus
from kdagen.autotune.space import Space, Survey, space_of
from kdagen.autotune.sweep import CPU, Study, Sweep, Task, Workload

from kdagen.schedule import changes, in_words

SHAPES = {"inference": "1x8192x64", "training": "1x8192x64", "decode": "64x1x32"}  # on which the model is asked


def shown(task: Task, fixed: dict, workload: Workload | None = None) -> str:
    """Aligned columns under headings, for a terminal of any kind."""
    space = space_of(task)
    fixed = space.own(fixed)
    survey = space.survey(fixed)
    lines = [f"{task.op}, {task.purpose}, {task.target}, {task.head_dim[0]} x {task.head_dim[1]}, {task.dtype}", ""]
    lines += _columns([("axis", "values"), *((a.field, _values(a.values, space, a.field)) for a in survey.axes)])
    lines += ["", f"{survey.size:,} candidates in all", ""]
    lines += _columns(_constraints(space, survey, fixed))
    lines += ["", f"{len(survey.legal):,} of them legal{_modelled(task, survey, workload)}", ""]
    return "\n".join(lines)


def _values(values: tuple, space: Space, field: str) -> str:
    """The default's in brackets."""
    default = space.default.fields()[field]
    return "  ".join(f"[{v}]" if v == default else str(v) for v in values)


def _constraints(space: Space, survey: Survey, fixed: dict) -> list[tuple[str, ...]]:
    alone = space.alone(fixed)
    rows = [("constraint", "removes", "alone", "for example")]
    for name, removed in survey.removed.items():
        example = next((r.reason for r in survey.rejected if r.constraint == name), "")
        rows.append((name, f"{removed:,}", f"{alone[name]:,}", example))
    return rows


def _modelled(task: Task, survey: Survey, workload: Workload | None) -> str:
    if task.target == CPU:
        return ", all of which are measured"
    from kdagen.autotune.plan import judge

    gpu = gpus.find(task.device)
    if gpu is None:
        return ""
    workload = workload or Workload.parse(SHAPES[task.purpose])
    judged = judge(Study(task, (workload,)), survey.legal, Sweep((), audit=0))
    kept = sum(j.verdict == "kept" for j in judged)
    best = min(judged, key=lambda j: j.predictions[str(workload)].ms)
    p = best.predictions[str(workload)]
    said = f"on {gpu.name} at {workload} the model keeps {kept:,} and thinks best, with {p.ms:.3g} ms ({p.limiter}):"
    changed = changes(best.candidate.schedule.fields(), space_of(task).default.fields())
    return f"; {said}\n  {in_words(changed) or 'the default'}"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows aligned, the last column as long as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)] + [0]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
