"""What the tuner's model expects of the kernels that gpu.py's experiments compare, beside what was found.

A part of the notes (gpu_notes.py). The model knows kernels one after another: of what runs side by side on two streams
it says nothing.
"""

from __future__ import annotations

from functools import cache

import gpu_cases as cases
from gpu_docs import Found, _table, words
from gpu_experiments import EXPERIMENTS, VARIANTS, Experiment
from gpu_report import Case
from kdagen.autotune import gpus, model
from kdagen.autotune.sweep import Workload

from kdagen import zoo
from kdagen.errors import ScheduleError
from kdagen.pipeline import Compilation, compile_decode_stages, compile_stages, compile_training_stages

COMPILE = {"inference": compile_stages, "training": compile_training_stages, "decode": compile_decode_stages}


@cache
def compiled(op: str, purpose: str, label: str = "default") -> Compilation | None:
    """The kernels of an op in the default schedule or a variant's; None where there are none that differ."""
    try:
        made = COMPILE[purpose](zoo.get(op), schedule=VARIANTS.get(label))
    except ScheduleError:
        return None
    return None if label in VARIANTS and made.kernels == compiled(op, purpose).kernels else made


def workload(shape: tuple[int, int, int], lengths=()) -> Workload:
    batch, tokens, heads = shape
    return Workload(batch, tokens, heads, heads, tuple(lengths))


def questions(gpu: gpus.Gpu, found: Found | None, ops) -> list[str]:
    """A table for each question of these ops."""
    parts = []
    for name, asks in EXPERIMENTS.items():
        lines = [
            line for point in asks.points() if {*point[1]} <= {*ops} for line in _lines(name, asks, point, gpu, found)
        ]
        if lines and not asks.alone:
            titles = (
                "call",
                "contender",
                "predicted ms, not measured",
                "times the first",
                "measured ms",
                "times the first",
            )
            parts += [f"### {asks.question}", _table(titles, lines, right=2)]
    return parts


def _lines(name: str, asks: Experiment, point: tuple, gpu: gpus.Gpu, found: Found | None) -> list[tuple]:
    purpose, (op, *others), shape, gate = point
    call = cases.point_name(Case(op, shape, {}, purpose, gate), others)
    made = {f"{of} default": compiled(of, purpose) for of in (op, *others)} if others else {}
    made = made or {f"kdagen {label}": compiled(op, purpose, label) for label in asks.labels}
    times = {label: model.predict(k, gpu, workload(shape)).ms for label, k in made.items() if k}
    first, measured = next(iter(times.values())), _measured(found, name, call)
    return [
        (
            call.replace(", mild gates", ""),
            words(label),
            f"{ms:.3f}",
            f"{first / ms:.2f}",
            *measured.get(label, ("", "")),
        )
        for label, ms in times.items()
    ]


def _measured(found: Found | None, name: str, call: str) -> dict[str, tuple[str, str]]:
    records = [r for r in found.records(name) if r["name"] == call and "figures" in r] if found else []
    rows = [row for record in records for row in record["figures"]["table"]]
    return {row["contender"]: (f"{row['ms']:.3f}", f"{row['times_the_first']:.2f}") for row in rows}
