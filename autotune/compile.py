"""Candidates through the compiler, rung by rung, with a line for each: why it goes on, or why not.

    lowered     whether the GPU takes its threads and shared memory, by the lowered program, before nvcc is run
    ptxas       whether its registers spill, or its asynchronous products wait for each other, unlike the default's
    identical   whether an earlier candidate came out as the same machine code

Candidates share kernels, and each is compiled once, by the build's workers into the build's cache: that remembers what
went well, the log what did not. Candidates come in the order of the search, those of several studies in turn, so that a
deadline leaves whole ones; of a candidate's kernels the longest first. What is said of them is kdagen.autotune.climb's.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable
from functools import cache as once

from kdagen.autotune.climb import Climb, Course, Kernel, Past
from kdagen.autotune.compiled import load
from kdagen.autotune.folder import Folder
from kdagen.autotune.sweep import CPU, Candidate, Study

from kdagen import debug
from kdagen.errors import KdagenError, ScheduleError

__all__ = ["compile_candidates", "load", "source_of"]
KERNEL_SECONDS = 600.0  # after which a kernel is given up: most take 10, the slowest known a minute


def compile_candidates(
    folder: Folder,
    jobs: int | None,
    deadline: float | None,
    say,
    *,
    todo: Callable[[Folder, Study, list[dict]], list[Candidate]] | None = None,
    compile_each: Callable | None = None,
) -> None:
    """Compiles what the search wants by now and the log does not settle; begins no kernel after the deadline.

    The deadline is of time.monotonic.

    Raises:
        ToolchainError: there is no nvcc, C compiler or TileLang.
    """
    from kdagen.build import pool, toolchain

    if todo is None:
        from kdagen.autotune.search import todo
    with folder.lock():
        lines = list(folder.log)
        studies = [study for study in folder.sweep.studies if study.task.target != CPU]
        ascent = Ascent(folder, {study: todo(folder, study, lines) for study in studies}, lines, deadline, say)
        if not ascent.climbs:
            return
        toolchain.check()
        say.stage("compile", len(ascent.climbs))
        workers = jobs or os.cpu_count() or 1
        events = (compile_each or pool.compile_each)(ascent.take, debug.cache_dir(), workers, KERNEL_SECONDS)
        with contextlib.closing(events):
            for event in events:
                ascent.hear(event)
        if left := sum(not climb.ended for climb in ascent.climbs):
            say.note(f"{left} of {len(ascent.climbs)} candidates are left for another `kdagen tune compile`")


class Ascent:
    """All candidates of all studies, and the kernels that they share."""

    def __init__(self, folder: Folder, todo: dict[Study, list[Candidate]], lines: list[dict], deadline, say):
        from kdagen.build.cache import Cache

        self.past, self.deadline = Past(lines), deadline
        self.courses = [Course(folder, study, self.past, candidates, say) for study, candidates in todo.items()]
        turns = itertools.zip_longest(*(course.climbs for course in self.courses))
        self.climbs = [climb for turn in turns for climb in turn if climb]
        self.cache, self.kernels = Cache(debug.cache_dir()), {}

    def take(self) -> tuple | None:
        """The next kernel to compile, as (key, job)."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return None
        for climb in self.climbs:
            if climb.source is None and not climb.ended:
                self._open(climb)
            for kernel in sorted(climb.kernels, key=lambda k: -len(k.job.text)):
                if kernel.waiting and not climb.ended:
                    kernel.owner = climb
                    return kernel.key, kernel.job
        return None

    def _open(self, climb: Climb) -> None:
        """Generates a candidate's source, and looks for its kernels."""
        from kdagen.build.builder import jobs_of

        try:
            climb.source = source_of(climb.candidate)
        except ScheduleError as error:
            return climb.log("lowered", "rejected", str(error), kernels={})
        except KdagenError:
            raise  # of the op or the target: no candidate would fare better
        except Exception as error:
            reason = f"no source: {type(error).__name__}: {error} (a bug in kdagen)"
            return climb.log("lowered", "failed", reason, kernels={})
        climb.kernels = tuple(self._kernel(job) for job in jobs_of(climb.source))
        climb.course.settle()

    def _kernel(self, job) -> Kernel:
        from kdagen.build.builder import job_key

        if (key := job_key(job)) not in self.kernels:
            self.kernels[key] = Kernel(key, job, self.past)
            if entry := self.cache.get(key):
                self.kernels[key].finish(entry)
        return self.kernels[key]

    def hear(self, event) -> None:
        """What the compiler says of a kernel (kdagen.build.pool.Event)."""
        kernel = self.kernels[event.key]
        if event.stage == "lowered":
            kernel.lower(event.launch)
        elif event.stage == "nvcc":
            kernel.compiling = True
        elif event.stage == "done":
            kernel.finish(self.cache.entries / event.key)
        elif event.stage == "failed":
            owner, line = kernel.owner, kernel.fail(event.error)
            if not owner.ended:
                owner.fail(kernel, line)
        for course in self.courses:
            course.settle()


@once
def _recurrence(op: str):
    from kdagen.recurrence import load as find

    return find(op)


def source_of(candidate: Candidate):
    """The OpSource of a candidate."""
    from kdagen import pipeline

    t = candidate.task
    made_for = t.head_dim, t.dtype, t.target, candidate.schedule, t.gate_dtype
    return pipeline.COMPILERS[t.purpose](_recurrence(t.op), *made_for, state=t.state)
