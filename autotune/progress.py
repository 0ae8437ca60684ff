"""`say`: what a sweep tells people while it runs; a live display on a terminal, plain lines elsewhere, or nothing.

say(line)               a line was appended to the log
say.stage(name, total)  work begins that has so many steps: lines of that rung where the name is a rung's, else lines
                        that end what a candidate does for now (rejected, failed, or kept on one of the rungs ENDS)
say.note(text)          something worth a line of its own: a worker that is started again, a sweep that goes on

Each may be called from several threads, and is a context manager, for the length of the work.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter

from kdagen.autotune.log import RUNGS
from kdagen.autotune.standing import Place, Standing, StudyStanding, Timed
from kdagen.autotune.sweep import Sweep

ENDS = ("model", "identical", "screen", "final")
KINDS = {"ptxas": "not compiled", "lowered": "not lowered", "correct": "wrong"}  # of failures, by rung


class Silent:
    """Says nothing: for tests and for calls from programs."""

    def __call__(self, line: dict) -> None:
        pass

    def stage(self, name: str, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


class _Counting(Silent):
    """Counts what it is told; says nothing yet. `deadline` is of time.monotonic, as the stages have it."""

    def __init__(self, standing: Standing | None = None, deadline: float | None = None, clock=time.monotonic):
        self.standing, self.deadline = standing or Standing(Sweep(())), deadline
        self.clock, self.lock = clock, threading.RLock()
        self.name, self.total, self.done, self.began = "", 0, 0, clock()
        self.verdicts, self.failures = Counter(), Counter()

    def __call__(self, line: dict) -> None:
        self.standing.add(line)
        step = ends(line, self.name)
        self.done += step
        self.verdicts[line["verdict"]] += step
        self.failures[line.get("death") or KINDS.get(line["rung"], "not timed")] += line["verdict"] == "failed"

    def stage(self, name: str, total: int) -> None:
        self.name, self.total, self.done, self.began = name, total, 0, self.clock()
        self.verdicts.clear()

    @property
    def left(self) -> str:
        """How long it may yet take, in words."""
        now = self.clock()
        if self.deadline is not None and now >= self.deadline:
            return "budget spent"
        rate = (now - self.began) * (self.total - self.done) / self.done if 0 < self.done < self.total else None
        budget = None if self.deadline is None else self.deadline - now
        if rate is None or (budget is not None and budget < rate):
            return "" if budget is None else f"{duration(budget)} of budget left"
        return f"about {duration(rate)} left"

    @property
    def counts(self) -> str:
        stage = f"{self.name} {min(self.done, self.total)}/{self.total}" if self.name else ""
        said = ", ".join(f"{self.verdicts[v]} {v}" for v in ("kept", "rejected", "failed") if self.verdicts[v])
        return "; ".join(filter(None, (stage, said, self.left)))


class Plain(_Counting):
    """A line for each event of note; for the many that are not, at most one every second."""

    def __init__(self, standing: Standing | None = None, deadline: float | None = None, out=None, **options):
        super().__init__(standing, deadline, **options)
        self._out, self._last, self._best = out or sys.stderr, float("-inf"), {}

    def __call__(self, line: dict) -> None:
        with self.lock:
            super().__call__(line)
            if line["verdict"] == "failed":
                self._print(f"failed: {self._name(line)} at {line['rung']}: {line['reason']}")
            if line["rung"] == "final":
                self._final(line)
            if self.clock() - self._last >= 1:
                self._last = self.clock()
                self._print(self.counts)

    def stage(self, name: str, total: int) -> None:
        with self.lock:
            super().stage(name, total)
            self._print(f"{name}: {total} to do")

    def note(self, text: str) -> None:
        with self.lock:
            self._print(text)

    def _final(self, line: dict) -> None:
        """A line where another candidate leads than before."""
        study = self.standing.studies.get(line["task"])
        if study is None or not (ranking := study.ranking(Place.of(line), line["workload"])):
            return
        where = (line["task"], Place.of(line), line["workload"])
        if self._best.get(where) != ranking[0].candidate:
            self._best[where] = ranking[0].candidate
            self._print(f"best of {line['task']} {line['workload']}: {leader(study, line['workload'], ranking)}")

    def _name(self, line: dict) -> str:
        study = self.standing.studies.get(line["task"])
        return f"{line['task']} {line['candidate']}" + (f" ({study.difference(line['candidate'])})" if study else "")

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class Live(_Counting):
    """A display that stands still: the stage, who leads where, failures by kind, the time left."""

    def __init__(self, standing: Standing | None = None, deadline: float | None = None, console=None, **options):
        from rich.console import Console
        from rich.live import Live as Display

        super().__init__(standing, deadline, **options)
        self.console = console or Console(stderr=True)
        self._display = Display(console=self.console, get_renderable=self.picture, refresh_per_second=4)

    def __call__(self, line: dict) -> None:
        with self.lock:
            super().__call__(line)

    def stage(self, name: str, total: int) -> None:
        with self.lock:
            super().stage(name, total)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def __enter__(self):
        self._display.start(refresh=True)
        return self

    def __exit__(self, *_) -> None:
        self._display.stop()

    def picture(self):
        """What is shown now."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        with self.lock:
            failed = ", ".join(f"{n} {kind}" for kind, n in sorted(self.failures.items()) if n)
            stage = Table.grid(padding=(0, 1))
            stage.add_row(ProgressBar(total=max(1, self.total), completed=self.done, width=40), self.counts)
            return Group(self._table(), stage, f"failed: {failed}" if failed else "")

    def _table(self):
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for title in ("study", "shape", "best so far"):
            table.add_column(title, no_wrap=title != "best so far")
        for name, study, place, workload in self._led()[: max(3, self.console.height - 6)]:
            table.add_row(name, workload, leader(study, workload, study.ranking(place, workload)))
        return table

    def _led(self) -> list[tuple]:
        """Study, machine and shape wherever something was timed."""
        every = (
            (name, study, place, str(workload))
            for name, study in self.standing.studies.items()
            for place in study.places
            for workload in study.study.workloads
        )
        return [(name, study, place, w) for name, study, place, w in every if study.times(place, w)]


def show(standing: Standing | None = None, deadline: float | None = None) -> Silent:
    """What suits where stderr goes."""
    return (Live if sys.stderr.isatty() else Plain)(standing, deadline)


def ends(line: dict, stage: str) -> bool:
    """Whether a line is a step of a stage."""
    return line["rung"] == stage if stage in RUNGS else line["verdict"] != "kept" or line["rung"] in ENDS


def leader(study: StudyStanding, workload: str, ranking: list[Timed]) -> str:
    """Who leads a ranking, in words."""
    best = ranking[0]
    default = next((t for t in ranking if t.candidate == study.twin(study.default)), None)
    gain = f", {default.ms / best.ms:.2f}x the default's speed" if default and default is not best else ""
    part = study.roofline(best, workload)
    roofline = f", {part:.0%} of roofline" if part else ""
    return f"{digits(best.ms)} ms by {study.difference(best.candidate)}{gain}{roofline}"


def digits(ms: float) -> str:
    """Three digits that count."""
    return f"{ms:#.3g}".rstrip(".") if ms < 1000 else f"{ms:.0f}"


def duration(seconds: float) -> str:
    """90 s, 4 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
