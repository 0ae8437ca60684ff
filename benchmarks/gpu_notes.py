"""Notes of what was expected of each case on a GPU and what was found: docs/gpu/notes.md.

    python benchmarks/gpu_notes.py                          # with all that is in benchmarks/results

Floors follow from the least traffic and the data sheet's bandwidth, predictions from the tuner's model
(kdagen.autotune.model) for the default schedule; neither needs a GPU, and both are marked as not measured. What was
measured is of gpu.py's files, a line a file, the oldest first: kernels change between them. Only what stands between
the marks is written; the rest of the page is anybody's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import gpu_cases as cases
import gpu_predicted as predicted
from gpu_docs import DOCS, NAMED, RESULTS, Found, _table
from gpu_report import Case
from kdagen.autotune import gpus, launches, model

from kdagen.runtime.loader import LoadedOp

BEGIN, END = "<!-- made by benchmarks/gpu_notes.py: not by hand -->", "<!-- end -->"
HEAD = "# Expected and found on GPUs\n\n"
CHIPS = ("H100",)  # that are written about before any file is there
NEVER = "not measured yet"


@dataclass(frozen=True)
class Expected:
    """A case on a GPU, before any measurement."""

    case: Case
    least_bytes: int
    floor_ms: float  # least traffic at the data sheet's bandwidth
    predicted: model.Prediction


def expected(op: str, purpose: str, shape, lengths, gpu: gpus.Gpu) -> Expected:
    made = predicted.compiled(op, purpose)
    kernels = LoadedOp(Path(), {"plan": made.source.plan()})
    least = launches.least_bytes(kernels, shape)[""]
    case = Case(op, shape, {}, purpose, cases.GATES[0], tuple(lengths))
    time = model.predict(made, gpu, predicted.workload(shape, lengths))
    return Expected(case, least, 1e3 * least / gpu.memory, time)


def every(gpu: gpus.Gpu, ops=cases.OPS, purposes=cases.PURPOSES) -> list[Expected]:
    """The cases that gpu.py times with slow gates."""
    return [
        expected(op, purpose, shape, lengths, gpu)
        for purpose in purposes
        for op in ops
        for i, (shape, lengths) in enumerate(cases.shapes(purpose, None, [], [], False))
        if op in cases.WIDE or i < cases.OTHERS
    ]


@dataclass(frozen=True)
class Aim:
    """What is wanted of a GPU's figures: a limit, and where it is looked for."""

    words: str
    op: str
    purpose: str
    where: tuple  # (B, T, H), None for any
    figure: str  # of a row, or "ratio"
    limit: float
    gpu: str = ""  # the only one that it is about

    def holds(self, row: dict) -> bool:
        value = self.value(row)
        return value is not None and (value <= self.limit if self.figure == "ms" else value >= self.limit)

    def value(self, row: dict) -> float | None:
        return row["ms"]["median"] if self.figure == "ms" else row[self.figure]

    def rows(self, found: Found) -> list[dict]:
        return [r for r in found.rows if self._is_of(r)]

    def _is_of(self, row: dict) -> bool:
        there = all(want is None or want(row[name]) for want, name in zip(self.where, "BTH"))
        what = (row["op"], row["purpose"], row["part"], row["contender"]) == (
            self.op,
            self.purpose,
            "",
            "kdagen default",
        )
        return what and there and not row["lengths"]


def _is(n: int):
    return lambda value: value == n


FASTER, MIN = "times_faster_than_fla", "at least"
HERE, STEPS = ("kda", "inference"), ("kda", "decode", (lambda b: b >= 64, None, None))
ANY, LONG = (None, None, None), (_is(1), lambda t: t >= 8192)
AIMS = (
    *(
        Aim(f"KDA forward, T = 8192, {n} heads: at most {ms} ms", *HERE, (_is(1), _is(8192), _is(n)), "ms", ms, "H100")
        for n, ms in ((64, 0.6), (96, 0.8))
    ),
    *(Aim(f"KDA forward, {n} heads: {MIN} 3x FLA", *HERE, (*LONG, _is(n)), FASTER, 3) for n in (64, 96, 12)),
    Aim(f"General DPLR forward: {MIN} 2x FLA", "dplr", "inference", ANY, FASTER, 2),
    Aim(f"KDA forward + backward: {MIN} 2x FLA", "kda", "training", ANY, FASTER, 2),
    Aim(f"Decoding, batches of 64 on: {MIN} 80% of a copy", *STEPS, "of_copy", 0.8),
)
RATIO = 2.0  # KDA over kdagen's own DPLR


def text(found: list[Found], ops=cases.OPS, purposes=cases.PURPOSES) -> str:
    """What stands between the marks."""
    parts = [
        "Floor: the least traffic (arguments read once, results written once) at the data sheet's bandwidth. "
        "Predicted: the model's time of the default schedule, with what limits it. **Both are predicted, not "
        "measured.** Measured: medians of `gpu.py`, slow gates, with what came of the prediction."
    ]
    for name in dict.fromkeys([*CHIPS, *(f.gpu for f in found if gpus.find(f.gpu))]):
        mine = [f for f in found if f.gpu == name]
        parts += [f"## {name}", aims(name, mine), expectations(gpus.find(name), mine, ops, purposes)]
        parts += predicted.questions(gpus.find(name), mine[-1] if mine else None, ops)
    return "\n\n".join(parts) + "\n"


def aims(gpu: str, found: list[Found]) -> str:
    """What is aimed at, and what the last file says of it."""
    lines = []
    for aim in (a for a in AIMS if a.gpu in ("", gpu)):
        rows = aim.rows(found[-1]) if found else []
        rows = [row for row in rows if aim.value(row) is not None]
        lines.append((aim.words, _reached(aim, rows)))
    ratios = [row for row in _ratios(found[-1])] if found else []
    told = ", ".join(f"{value:.2f}x ({name})" for name, value in ratios)
    lines.append((f"KDA: at least {RATIO:g}x kdagen's own DPLR", told or NEVER))
    return _table(("aim", f"found, {found[-1].date}" if found else "found"), lines)


def _reached(aim: Aim, rows: list[dict]) -> str:
    if not rows:
        return NEVER
    held = sum(map(aim.holds, rows))
    values = sorted(map(aim.value, rows))
    unit = {"ms": "{:.3f} ms", FASTER: "{:.2f}x", "of_copy": "{:.0%}"}[aim.figure]
    span = " to ".join(dict.fromkeys(unit.format(v) for v in (values[0], values[-1])))
    return (
        f"{'reached' if held == len(rows) else f'reached in {held} of {len(rows)} calls' if held else 'missed'}: {span}"
    )


def _ratios(found: Found) -> list[tuple[str, float]]:
    """How much longer DPLR takes than KDA, by call."""
    tables = [(r["name"], r["figures"]["table"]) for r in found.records("ratio") if "figures" in r]
    return [(name, table[1]["ms"] / table[0]["ms"]) for name, table in tables if len(table) > 1]


def expectations(gpu: gpus.Gpu, found: list[Found], ops, purposes) -> str:
    """A line for each case, and one more for each file that has it."""
    titles = ("case", "least MB", "floor ms, not measured", "predicted ms, not measured", "limited by", "measured ms",
              "of floor", "measured / predicted", "times FLA", "when")  # fmt: skip
    lines = []
    for e in every(gpu, ops, purposes):
        cells = [f"{e.least_bytes / 1e6:.1f}", f"{e.floor_ms:.3f}", f"{e.predicted.ms:.3f}", e.predicted.limiter]
        measured = [(f, row) for f in found if (row := _measured(f, e.case))]
        lines += [(e.case, *cells, *_outcome(e, f, row)) for f, row in measured]
        if not measured:
            lines.append((e.case, *cells, NEVER, "", "", "", ""))
    named = [(str(case).replace(", mild gates", ""), *rest) for case, *rest in lines]
    return _table(titles, named, right=1)


def _measured(found: Found, case: Case) -> dict | None:
    """The default kernels' row."""
    same = (case.op, case.purpose, case.gate, "", "kdagen default", *case.shape, list(case.lengths))
    names = ("op", "purpose", "gate", "part", "contender", *"BTH", "lengths")
    return next((row for row in found.rows if tuple(row[n] for n in names) == same), None)


def _outcome(e: Expected, found: Found, row: dict) -> tuple:
    ms, faster = row["ms"]["median"], row[FASTER]
    times = f"{faster:.2f}" if faster else ""
    return f"{ms:.3f}", f"{e.floor_ms / ms:.0%}", f"{ms / e.predicted.ms:.2f}", times, found.date


def put(path: Path, made: str) -> None:
    """Between the marks of a page; the page is made where there is none."""
    page = path.read_text() if path.exists() else f"{HEAD}{BEGIN}\n{END}\n"
    if BEGIN not in page or END not in page:
        raise click.ClickException(f"{path}: expected the marks {BEGIN} and {END}: put them where the tables belong")
    before, _, rest = page.partition(BEGIN)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{BEGIN}\n\n{made}\n{END}{rest.partition(END)[2]}")


@click.command()
@click.option("--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=DOCS / "notes.md", show_default=True)
def main(results, out) -> None:
    """Write the tables of the notes."""
    files = sorted(
        (p for p in results.glob("*.json") if NAMED.fullmatch(p.name)), key=lambda p: NAMED.fullmatch(p.name)[2]
    )
    put(out, text([Found(path) for path in files]))
    click.echo(out)


if __name__ == "__main__":
    main()
