"""Built kernels on a GPU: checked against the float64 recurrence, then timed beside flash-linear-attention.

    python benchmarks/gpu.py device_ops --minutes 9         # folders that `kdagen build` or pack_for_device.py wrote
    python benchmarks/gpu.py device_ops --stages overlap    # one of the open questions alone
    python benchmarks/gpu.py device_ops --dry-run           # no GPU: reads the folders, prints what would be done

The same command again goes on where the last one was cut short. This process touches no GPU: others do (gpu_work.py),
and where a kernel breaks one, or hangs, that is a finding and the next one starts. Everything that a ratio is formed of
is measured in one process, contenders taking turns, and so are the ceilings: a large copy and a large bf16 product.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import gpu_cases as cases
import gpu_experiments as experiments
import gpu_timing as timing
from gpu_report import plan_table, table
from gpu_results import Results, Unit
from gpu_session import Session, console
from kdagen.autotune.pool import WorkerDied

from kdagen.errors import KdagenError

RESULTS = Path(__file__).parent / "results"
DOES = {"time": "time", "more": "time", "overlap": "overlap", "ratio": "ratio"}  # of stages that are timed


def run(session: Session, stages: list[str], units: dict[str, list[Unit]]) -> None:
    """The stages in order."""
    try:
        for stage in stages:
            if stage == "correct":
                session.checked(units[stage])
            elif stage == "sanitizer":
                session.sanitized(units[stage])
            else:
                session.timed(units[stage], DOES.get(stage, "compare"))
    finally:
        session.end()


def units_of(folders, stages, purpose, ops, modes, rounds, todo, more) -> dict[str, list[Unit]]:
    """What each stage is to do."""
    every = cases.names(folders)
    found = {
        "correct": lambda: cases.correct_units(folders, purpose, [*ops, *(op for op in every if op not in ops)]),
        "sanitizer": lambda: cases.sanitizer_units(folders, purpose, [op for op in cases.CHECKED if op in every]),
        "time": lambda: cases.time_units(todo, modes, rounds),
        "more": lambda: cases.time_units(more, modes, rounds),
    }
    found |= {name: lambda name=name: cases.experiment_units(folders, name, rounds) for name in experiments.EXPERIMENTS}
    return {stage: found[stage]() for stage in stages}


def wrong(results: Results, units: list[Unit]) -> list[str]:
    """The kernels that are off, or broke the process, and how."""
    said = []
    for unit in (u for u in units if u.asked.get("labels")):
        record = results.find(unit) or {}
        if "failed" in record or not record.get("figures", {"ok": True})["ok"]:
            said.append(f"{unit.name}: {record.get('failed') or record['figures']['reason']}")
    return said


class Words(click.ParamType):
    """Some of a few words, comma-separated; any where none are listed."""

    name = "LIST"

    def __init__(self, known=()):
        self.known = tuple(known)

    def convert(self, value, param, ctx) -> list[str]:
        words = value if isinstance(value, list) else [word for word in value.split(",") if word]
        if self.known and (unknown := [word for word in words if word not in self.known]):
            self.fail(f"{', '.join(unknown)}: expected some of {', '.join(self.known)}", param, ctx)
        return words


def option(name: str, default, known=(), more: str = ""):
    """A list of words."""
    text = more or f"Some of {', '.join(known)}, comma-separated."
    return click.option(name, type=Words(known), default=",".join(default), show_default=bool(default), help=text)


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@option("--stages", cases.STAGES, cases.STAGES)
@option("--purpose", cases.PURPOSES, cases.PURPOSES)
@option("--ops", (), more=f"Entries of the zoo that are timed.  [default: {','.join(cases.OPS)}, as they were built]")
@option("--gates", cases.GATES, cases.GATES)
@option("--tokens", (), more="Lengths; 8192 if only --heads is given.  [default: fourteen shapes and four ragged ones]")
@option("--heads", (), more="Head counts; 64 if only --tokens is given.")
@click.option("--batch", type=int, help="Sequences; 1, and in decoding 1 to 256, if it is not given.")
@option("--modes", ("device",), timing.MODES)
@click.option("--calls", "rounds", default=30, show_default=True, help="Timed calls of each contender.")
@click.option("--quick", is_flag=True, help="Two shapes, ten calls.")
@click.option("--minutes", default=9.0, show_default=True, help="All is over after this time; a later call goes on.")
@click.option("--jobs", default=4, show_default=True, help="Processes that check kernels at a time.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True,
              help="Folder of the results, <GPU>-<date>.json: the last one of this GPU is gone on with.")  # fmt: skip
@click.option("--fresh", is_flag=True, help="A new file, or today's.")
@click.option("--dry-run", is_flag=True, help="Read the folders, print what would be done; needs no GPU.")
def main(folders, stages, purpose, ops, gates, tokens, heads, batch, modes, rounds, quick, minutes, jobs, out, fresh,
         dry_run) -> None:  # fmt: skip
    """Check and time the ops that were built into FOLDERS."""
    started = time.monotonic()
    if "training" in purpose and "graph" in modes:
        raise click.UsageError(
            "--modes graph is for inference and decoding: add --purpose inference,decode, or leave graph out"
        )
    rounds, tokens, heads = 10 if quick else rounds, [int(n) for n in tokens], [int(n) for n in heads]
    folders, todo, more = list(folders), [], []
    if {"time", "more"} & {*stages}:
        todo, more = cases.cases(folders, purpose, ops, gates, batch, tokens, heads, quick)
    units = units_of(folders, stages, purpose, ops, modes, rounds, todo, more)
    if dry_run:
        todo += more
        console.print(plan_table(todo, modes, rounds))
        counts = ", ".join(f"{stage} {len(found)}" for stage, found in units.items())
        console.print(f"\n{len(todo)} cases; units: {counts}; installed: {timing.versions()}; would write to {out}")
        return
    try:
        session = Session(folders, out, started + 60 * minutes, jobs, fresh=fresh)
    except (KdagenError, WorkerDied) as error:
        raise click.ClickException(str(error)) from None
    run(session, stages, units)
    report(session.results, units)


def report(results: Results, units: dict[str, list[Unit]]) -> None:
    """What was found of these units, and what is left to do."""
    timed = [*units.get("time", []), *units.get("more", [])]
    records = [r for unit in timed if (r := results.find(unit))]
    console.print(table([row for record in records for row in record.get("figures", {}).get("rows", [])]))
    every = [unit for found in units.values() for unit in found]
    done = sum(results.find(unit) is not None for unit in every)
    rest = "; the same command again does the rest" if done < len(every) else ""
    console.print(f"\n{results.path}: {done} of {len(every)} units are done{rest}")
    if off := wrong(results, units.get("correct", [])):
        raise click.ClickException(f"off against float64, so not timed: {'; '.join(off)}")


if __name__ == "__main__":
    main()
