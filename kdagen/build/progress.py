"""What a build tells people while it runs and when it is done: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from contextlib import contextmanager


class Progress:
    """Shows the stages of kernels on stderr; `silent` shows nothing."""

    def __init__(self, silent: bool = False):
        self.silent = silent

    @contextmanager
    def over(self, jobs: dict, done):
        """For the length of a build of `jobs` (by key), of which `done` were cached. Yields say(key, stage)."""
        if self.silent or len(done) == len(jobs):
            yield lambda key, stage: None
        elif sys.stderr.isatty():
            with self._bar(jobs, done) as say:
                yield say
        else:
            yield self._lines(jobs, done)

    def _lines(self, jobs: dict, done):
        finished = set(done)

        def say(key: str, stage: str) -> None:
            finished.update([key] if stage == "done" else [])
            print(f"[{len(finished)}/{len(jobs)}] {label(jobs[key])}: {stage}", file=sys.stderr, flush=True)

        return say

    @contextmanager
    def _bar(self, jobs: dict, done):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        stages: dict[str, str] = {}
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("starting TileLang", total=len(jobs), completed=len(done))

            def say(key: str, stage: str) -> None:
                stages[key] = stage
                doing = (f"{label(jobs[k])}: {s}" for k, s in stages.items() if s != "done")
                bar.update(task, advance=stage == "done", description=", ".join(doing))

            yield say


WAIT_INJECTED = "(C7517)"  # ptxas moved a wait for wgmma; nothing is lost but overlap


def label(job) -> str:
    """A kernel and its target, for people."""
    return f"{job.name} ({job.target}{'' if job.purpose == 'inference' else f', {job.purpose}'})"


def summary(built) -> str:
    """A table of what was built, and a warning for each kernel that spills or that ptxas complains of."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("op", "for", "target", "kernel"):
        table.add_column(title)
    for title in ("threads", "registers", "spilled bytes", "shared KiB", "seconds"):
        table.add_column(title, justify="right")
    for op in built:
        for kernel in op.kernels:
            table.add_row(op.name, op.purpose, op.target, kernel["name"], *_figures(kernel))
    console = Console(width=120)
    with console.capture() as text:
        console.print(table)
    return text.get() + "".join(f"warning: {w}\n" for op in built for k in op.kernels for w in warnings(k, op.purpose))


def _figures(kernel: dict) -> list[str]:
    threads = kernel["block"][0] * kernel["block"][1] * kernel["block"][2]
    shared = kernel["shared_bytes"] + (kernel["static_shared_bytes"] or 0)
    if kernel["library"]:
        code = [str(kernel["registers"]), str(kernel["spill_stores"] + kernel["spill_loads"])]
    else:
        code = ["source only", "-"]
    return [str(threads), *code, f"{shared / 1024:.1f}", "cached" if kernel["cached"] else f"{kernel['seconds']:.1f}"]


def warnings(kernel: dict, purpose: str = "inference") -> list[str]:
    """What may make a kernel slow: spills, and products that ptxas runs one at a time; the manifest holds the rest."""
    name = f"{kernel['name']}{'' if purpose == 'inference' else f' ({purpose})'}"
    spilled = (kernel["spill_stores"] or 0) + (kernel["spill_loads"] or 0)
    spill = [f"{name} spills {spilled} bytes of registers to memory: right, but slower"] if spilled else []
    return [*spill, *(f"{name}: {line}" for line in kernel["warnings"] if WAIT_INJECTED not in line)]
