"""Built kernels on a GPU: checked against the float64 recurrence, then timed beside flash-linear-attention.

    python benchmarks/gpu.py device_ops --minutes 9         # folders that `kdagen build` or pack_for_device.py wrote
    python benchmarks/gpu.py device_ops --stages overlap    # one of the open questions alone
    python benchmarks/gpu.py device_ops --dry-run           # no GPU: reads the folders, prints what would be done

The same command again goes on where the last one was cut short. This process touches no GPU: others do (gpu_work.py),
and where a kernel breaks one, or hangs, that is a finding and the next one starts. Everything that a ratio is formed of
is measured in one process, contenders taking turns, and so are the ceilings: a large copy and a large bf16 product.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import click
import gpu_cases as cases
import gpu_experiments as experiments
import gpu_sanitizer as sanitizer
import gpu_timing as timing
from gpu_report import plan_table, table
from gpu_results import Results, Unit, path_for
from kdagen.autotune.bench import in_threads
from kdagen.autotune.pool import Worker, WorkerDied
from kdagen.autotune.progress import Silent
from rich.console import Console

from kdagen.errors import KdagenError

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PATIENCE = 240  # seconds that a unit may take: peers tune themselves at first
SANITIZER_SECONDS = 240
LEAST = 20  # seconds without which no unit is begun
DOES = {"time": "time", "more": "time", "overlap": "overlap", "ratio": "ratio"}  # of stages that are timed
console = Console(width=200, highlight=False, soft_wrap=True)


class GpuWorker(Worker):
    """A process that owns the GPU's figures: gpu_work.py."""

    def __init__(self, folders: list[Path]):
        super().__init__("cuda:0")
        self.program = (str(HERE / "gpu_work.py"), *map(str, folders))


class Session:
    """One call of gpu.py: what is done until the time is up, and where it is written."""

    def __init__(self, folders: list[Path], out: Path, until: float, jobs: int = 1, worker=None, fresh=False):
        self.folders, self.until, self.jobs, self.lock = folders, until, jobs, threading.Lock()
        self.make = lambda: (worker or GpuWorker)(folders)
        self.worker = self.make()
        facts = self.worker.ask({"do": "facts"}, until - time.monotonic())["facts"]
        self.results = Results(path_for(out, facts, fresh))
        self.results.facts = facts

    def checked(self, units: list[Unit]) -> None:
        """Those of "correct": several processes at a time, each with all kernels of an op and purpose."""
        groups: dict[tuple, list[Unit]] = {}
        for unit in self._missing(units):
            groups.setdefault((unit.asked["op"], unit.asked["purpose"]), []).append(unit)
        waiting = deque(groups.values())

        def work(worker) -> None:
            try:
                while waiting:
                    for unit in self._pop(waiting):
                        self.do(unit, worker, "correct")
            finally:
                if worker is not self.worker:
                    worker.end()

        self._several(work, [self.worker, *(self.make() for _ in range(min(self.jobs, len(groups)) - 1))])

    def sanitized(self, units: list[Unit]) -> None:
        """Those of "sanitizer", several at a time."""
        waiting = deque([unit] for unit in self._missing(units))

        def work(_) -> None:
            while waiting:
                for unit in self._pop(waiting):
                    self._sanitize(unit)

        self._several(work, range(self.jobs))

    def timed(self, units: list[Unit], do) -> None:
        """All other stages: by one process that has the GPU for itself; kernels that are off are left out."""
        for unit in map(self._sound, self._missing(units)):
            if unit.asked["unknown"]:
                self._left(unit)
            elif unit.asked["labels"]:
                self.do(unit, self.worker, do)
            else:
                self._left(unit, "no kernels that are right")

    def _missing(self, units: list[Unit]) -> list[Unit]:
        return [unit for unit in units if not self.results.find(unit)]

    def _pop(self, waiting: deque) -> list[Unit]:
        try:
            return waiting.popleft()
        except IndexError:
            return []

    def _several(self, work, over) -> None:
        if bugs := in_threads([lambda item=item: work(item) for item in over]):
            raise bugs[0]

    def do(self, unit: Unit, worker, do: str) -> None:
        """A record of one unit; without the contenders that broke the process, which are named."""
        broken: dict[str, str] = {}
        while unit.asked.get("labels", True):
            kill = min(PATIENCE, self.until - time.monotonic())
            if kill < LEAST:
                return self._left(unit)
            began = time.monotonic()
            try:
                reply = worker.ask({"do": do, **unit.asked}, kill, Notes())
            except WorkerDied as death:
                if death.kind == "hang" and kill < PATIENCE:
                    return self._left(unit)
                if not death.running or death.running in broken:
                    return self._add(unit, {}, failed=f"{death.kind}: {death}")
                broken[death.running] = f"{death.kind}: {death}"
                unit = unit.without(death.running)
                continue
            if "error" in reply and reply["running"] and reply["running"] not in broken:
                broken[reply["running"]] = reply["reason"]
                unit = unit.without(reply["running"])
                continue
            more = {"broken": broken} if broken else {}
            if "error" in reply:
                return self._add(unit, {}, failed=reply["reason"], **more)
            seconds = round(time.monotonic() - began, 1)
            found = {"figures": reply["figures"], "state": reply.get("state"), "seconds": seconds}
            return self._add(unit, reply["run"], **found, **more, **unit.asked.get("out", {}))
        return self._add(unit, {}, failed="; ".join(broken.values()), broken=broken)

    def _sanitize(self, unit: Unit) -> None:
        left = self.until - time.monotonic()
        if left < LEAST:
            return self._left(unit)
        asked = unit.asked
        program = sanitizer.watched(asked["op"], asked["purposes"], self.folders)
        found = sanitizer.run(asked["tool"], program, min(SANITIZER_SECONDS, left))
        if found["verdict"] == "late" and left < SANITIZER_SECONDS:
            return self._left(unit)
        return self._add(unit, {}, figures=found)

    def _sound(self, unit: Unit) -> Unit:
        """Without what is known to be off, and with the errors of the rest; what was not checked is so now."""
        asked, wanted = unit.asked, dict.fromkeys(unit.asked["labels"])
        for label in wanted:
            wanted[label] = self._standing(asked["op"], asked["purpose"], label)
        for other in asked.get("others", ()):
            wanted[other] = self._standing(other, asked["purpose"], asked["labels"][0])
        some = any(found and found["ok"] for found in wanted.values())
        peer = self._peer(asked["op"], asked["purpose"]) if some and asked.get("peer") else None
        wanted |= {"peer": peer} if peer else {}
        out = {name: found["reason"] for name, found in wanted.items() if found and not found["ok"]}
        right = {name: found for name, found in wanted.items() if found and found["ok"]}
        more = {
            "labels": [label for label in asked["labels"] if label in right],
            "others": [other for other in asked.get("others", ()) if other in right],
            "peer": "peer" in right,
            "errors": {
                name: max((e for e, _ in found["errors"].values()), default=None) for name, found in right.items()
            },
            "unknown": [name for name, found in wanted.items() if not found],
        }
        return replace(unit, asked={**asked, **more, **({"out": {"left_out": out}} if out else {})})

    def _standing(self, op: str, purpose: str, label: str) -> dict | None:
        """What the check found of kernels, in this call or before."""
        (unit,) = (u for u in cases.correct_units(self.folders, [purpose], [op]) if u.asked.get("labels") == [label])
        return self._found(unit)

    def _peer(self, op: str, purpose: str) -> dict | None:
        units = [u for u in cases.correct_units(self.folders, [purpose], [op]) if u.asked.get("peer")]
        return self._found(units[0]) if units else None

    def _found(self, unit: Unit) -> dict | None:
        if not self.results.find(unit):
            self.do(unit, self.worker, "correct")
        record = self.results.find(unit) or {}
        return record.get("figures") or ({"ok": False, "reason": record["failed"]} if "failed" in record else None)

    def _add(self, unit: Unit, run: dict, **found) -> None:
        known = {name: self.results.facts[name] for name in self.results.facts if name not in ("date", "state")}
        with self.lock:
            self.results.add(unit, run or {"facts": known}, **found)
        console.print(f"{time.strftime('%H:%M:%S')}  {unit.stage}: {unit.name}{_in_short(found)}")

    def _left(self, unit: Unit, why: str = "no time") -> None:
        with self.lock:
            self.results.left.append(f"{unit.stage}: {unit.name}: {why}")

    def end(self) -> None:
        """Writes what is left to do."""
        self.worker.end()
        self.results.save()


class Notes(Silent):
    """Says that a process was started again."""

    def note(self, text: str) -> None:
        console.print(text)


def _in_short(found: dict) -> str:
    """A record's outcome in a line."""
    figures = found.get("figures", {})
    if "failed" in found:
        return f": failed: {found['failed']}"
    if "verdict" in figures:
        return f": {figures['verdict']}"
    if "ok" in figures:
        return f": {'right' if figures['ok'] else figures['reason']}"
    times = {row["contender"]: row["ms"] for row in figures.get("table", [])}
    times = times or {row["contender"]: row["ms"]["median"] for row in figures["rows"] if not row["part"]}
    return ": " + ", ".join(f"{contender} {ms:.3f} ms" for contender, ms in times.items())


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
@option("--ops", cases.OPS, more="Entries of the zoo that are timed, comma-separated.")
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
    console.print(f"\n{results.path}: {done} of {len(every)} units are done; the same command again does the rest")
    if off := wrong(results, units.get("correct", [])):
        raise click.ClickException(f"off against float64, so not timed: {'; '.join(off)}")


if __name__ == "__main__":
    main()
