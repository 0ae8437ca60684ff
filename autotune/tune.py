"""All of a sweep on one machine: plan, compile, measure, again while the search finds more to try, publish.

Whenever it is stopped, the folder is of use: whatever was found is in its log, and the next run goes on from there.
"""

from __future__ import annotations

import time
from pathlib import Path

from kdagen.autotune.compile import compile_candidates
from kdagen.autotune.folder import Folder
from kdagen.autotune.measure import measure
from kdagen.autotune.plan import plan
from kdagen.autotune.publish import publish
from kdagen.autotune.search import todo
from kdagen.autotune.standing import Standing
from kdagen.autotune.sweep import CPU

COMPILE_SHARE = 0.6  # of the budget that is left: a candidate compiles for a minute, is measured within seconds


def tune(
    folder: Folder,
    devices: list[str],
    jobs: int | None,
    deadline: float | None,
    say,
    into: Path | None = None,
    compilers=compile_candidates,
    workers=None,
) -> list[Path]:
    """Tunes until nothing is left to do, or the deadline (of time.monotonic); returns the tables that it wrote.

    `workers()` makes those of `measure`, instead of one a device here; it is called once compilers have made room.
    """
    plan(folder, say)
    recorded = devices and all(device.startswith("replay:") for device in devices)  # which runs nothing
    compiled = not recorded and any(study.task.target != CPU for study in folder.sweep.studies)
    while True:
        before = len(list(folder.log))
        if compiled:
            compilers(folder, jobs, share(deadline), say)
        measure(folder, devices, deadline, say, workers and workers())
        lines = list(folder.log)
        spent = deadline is not None and time.monotonic() >= deadline
        if spent or len(lines) == before or done(folder, lines):
            return publish(folder, into)


def done(folder: Folder, lines: list[dict]) -> bool:
    """Whether there is nothing that another round could add."""
    studies = Standing(folder.sweep, lines).studies.values()
    return all(
        study.finished and not any(study.waits(c.id) for c in todo(folder, study.study, lines)) for study in studies
    )


def share(deadline: float | None) -> float | None:
    """When compilers must stop so that time is left to measure what they made."""
    now = time.monotonic()
    return None if deadline is None else now + COMPILE_SHARE * max(0.0, deadline - now)
