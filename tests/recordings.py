"""Small sweeps and recordings of them, for tests of what measures: a replay device answers. Every figure is made up."""

import json

from kdagen.autotune.folder import Folder
from kdagen.autotune.log import Log
from kdagen.autotune.sweep import Candidate, Policy, Study, Sweep, Task, Workload

TASK = Task("kda", "decode", "sm90", "H100")
SHAPE, OTHER = Workload.parse("64x1x32"), Workload.parse("8x1x32")
STUDY = Study(TASK, (SHAPE,))
UNDER = {"kernels": "code", "device": "A made-up GPU", "processors": 132, "versions": {"cuda": "13.0"}}
CANDIDATES = [
    Candidate.of(TASK, {"v_tile": v, "threads": t})
    for v, t in ((32, 128), (16, 128), (64, 128), (32, 64), (64, 64), (16, 64))
]
DEFAULT, BEST, WRONG, SLOW, CLOSE, MIDDLE = CANDIDATES
MS = {DEFAULT: 1.0, BEST: 0.8, WRONG: 0.5, SLOW: 3.0, CLOSE: 0.805, MIDDLE: 0.95}


def planned(path, *studies, candidates=CANDIDATES, **options) -> Folder:
    """A folder in which these are to be tried, the first being the default."""
    folder = Folder.create(path, Sweep(studies or (STUDY,), policy=Policy("device", "cold"), **options))
    for study in folder.sweep.studies:
        for candidate in (Candidate(study.task, c.schedule) for c in candidates):
            figures = {"default": True} if candidate.schedule == candidates[0].schedule else {}
            figures |= {"schedule": candidate.schedule.fields(), "predicted_ms": {}, "bound_ms": {}, "limiter": {}}
            folder.log.append(study.task.name, candidate.id, "model", "kept", **figures)
    return folder


def todo(folder, study, lines) -> list[Candidate]:
    """All that the model kept, the default first."""
    models = [x for x in lines if x["rung"] == "model" and x["verdict"] == "kept" and x["task"] == study.task.name]
    return [Candidate.of(study.task, x["schedule"]) for x in sorted(models, key=lambda x: not x.get("default"))]


def recording(path, ms=None, shapes=(SHAPE, OTHER), wrong=(WRONG,), spread=0.01, tasks=(TASK,)):
    """The log of a device on which calls took so long; the wrong ones are fast. Returns the spec of its replay."""
    log = Log(path)
    for candidate in (Candidate(task, c.schedule) for task in tasks for c in CANDIDATES):
        time = (ms or MS)[Candidate(TASK, candidate.schedule)]
        fails = candidate.schedule in [c.schedule for c in wrong]
        found = [0.31, 0.005] if fails else [0.002, 0.005]
        reason = "output is 0.31 from the recurrence" if fails else ""
        verdict = "failed" if fails else "kept"
        name = candidate.task.name, candidate.id
        log.append(*name, "correct", verdict, reason, under=UNDER, errors={"output": found})
        for shape in shapes:
            where = {"workload": str(shape), "under": UNDER}
            interval = {"median": time, "low": time * (1 - spread / 4), "high": time * (1 + spread / 4), "calls": 100}
            log.append(*name, "screen", "kept", ms=time, calls=5, stopped=False, **where)
            log.append(*name, "final", "kept", **interval, state={"before": {"clocks": {"sm": 1755}}}, **where)
    return f"replay:{path}"


def faulty(spec, path, *faults) -> str:
    """A replay with faults: (does, at, candidate or None, attempts)."""
    lines = []
    for does, at, candidate, on in faults:
        who = {"candidate": candidate.id} if candidate else {}
        lines.append(json.dumps({"does": does, "at": at, "on": list(on), **who}) + "\n")
    path.write_text("".join(lines))
    return f"{spec}{'&' if '?' in spec else '?'}faults={path}"
