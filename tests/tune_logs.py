"""Folders of sweeps for tests of what reads them. Every figure in them is made up: nothing was measured."""

import itertools
import json

from kdagen.autotune.folder import Folder
from kdagen.autotune.log import Log
from kdagen.autotune.sweep import Candidate, Policy, Study, Sweep, Task, Workload, short_hash

from kdagen.schedule import DecodeSchedule, Schedule

INFERENCE = Task("kda", "inference", "sm90", "H100")
DECODE = Task("kda", "decode", "sm90", "H100")
SHAPES = tuple(map(Workload.parse, ("1x8192x64", "1x8192x12")))
STEPS = (Workload.parse("64x1x32"),)
SWEEP = Sweep((Study(INFERENCE, SHAPES), Study(DECODE, STEPS)), policy=Policy("graph", "cold"))
DEVICE = {"device": "A made-up GPU", "processors": 132, "versions": {"cuda": "13.0", "tilelang": "0.1.15"}}
BEFORE = {"clocks": {"sm": 1755, "memory": 2619}, "temperature": 51, "throttling": [], "load": 0.1}
STATE = {"before": BEFORE, "after": {**BEFORE, "temperature": 57}}
BOUND = {"1x8192x64": 0.3, "1x8192x12": 0.1, "64x1x32": 0.09}


def candidates() -> list[Candidate]:
    """27 of inference: chunks, tiles and stages; the first is the default."""
    product = itertools.product((16, 32, 64), (128, 64, 32), (2, 3, 1))
    return [Candidate(INFERENCE, Schedule(chunk_size=c, v_tile=v, stages=s)) for c, v, s in product]


def made_up_ms(candidate: Candidate, workload: str) -> float:
    s = candidate.schedule
    slow = (
        (1 + 0.02 * abs(s.chunk_size - 32)) * (1.4 if s.v_tile == 128 else 1 + s.v_tile / 1000) * (1.3 - s.stages / 10)
    )
    slow *= 1.5 if workload == "1x8192x12" and s.v_tile == 128 else 1.4
    return round(BOUND[workload] * slow, 4)


def planned(path) -> Folder:
    """After `plan`: two are outside the space; of the rest the model rejects nine, and one of these is tried."""
    folder = Folder.create(path, SWEEP)
    for stages in (7, 8):
        odd = Candidate(INFERENCE, Schedule(stages=stages))
        reason = f"{stages} stages of 40 KiB do not fit"
        _line(folder, odd, "space", "rejected", reason, schedule=odd.schedule.fields(), constraint="shared memory")
    for i, candidate in enumerate(candidates()):
        _model(folder, candidate, SHAPES, rejected=candidate.schedule.stages == 1, default=i == 0, audit=i == 5)
    _model(folder, Candidate(DECODE, DecodeSchedule()), STEPS, default=True)
    _model(folder, Candidate(DECODE, DecodeSchedule(v_tile=64)), STEPS)
    return folder


def compiled(path) -> Folder:
    """After `compile`: one has too much shared memory, one spills, one breaks the compiler, one is another's twin."""
    folder = planned(path)
    tried = [c for c in candidates() if c.schedule.stages != 1] + [candidates()[5]]
    for candidate in tried:
        _compile(folder, candidate, tried[0])
    return folder


def measured(path) -> Folder:
    """After `measure`: of inference; one is wrong, one crashes three times; of decoding nothing yet."""
    folder = compiled(path)
    alive = [c for c in candidates() if _compiled(folder, c)]
    for candidate in alive:
        _check(folder, candidate)
    good = [c for c in alive if not _failed(folder, c)]
    for workload in map(str, SHAPES):
        times = {c: made_up_ms(c, workload) for c in good}
        for candidate, ms in times.items():
            stopped = ms > 1.5 * min(times.values())
            verdict, reason = ("rejected", "1.5x the best so far") if stopped else ("kept", "")
            _timed(folder, candidate, "screen", workload, verdict, reason, ms=ms, calls=5, stopped=stopped)
        for candidate, ms in times.items():
            if ms <= 1.5 * min(times.values()) or candidate is good[0]:
                interval = {"median": ms, "low": round(0.99 * ms, 4), "high": round(1.01 * ms, 4), "calls": 40}
                _timed(folder, candidate, "final", workload, "kept", "", **interval, state=STATE)
    return folder


def replace_dates(folder: Folder) -> None:
    """The lines a second apart, so that a folder is the same text each time."""
    lines = list(folder.log)
    text = (json.dumps(line | {"at": f"2026-01-01T00:{i // 60:02}:{i % 60:02}+00:00"}) for i, line in enumerate(lines))
    folder.log.path.write_text("\n".join(text) + "\n")


def under(candidate: Candidate, workload: str | None = None) -> dict:
    more = {"bucket": Workload.parse(workload).bucket} if workload else {}
    task = candidate.task
    fixed = {"dtype": task.dtype, "head_dim": list(task.head_dim), "ratio": 1}
    return {"kernels": short_hash(candidate.id), "policy": str(SWEEP.policy), **DEVICE, **fixed, **more}


def _line(folder, candidate, rung, verdict, reason="", **figures) -> dict:
    return folder.log.append(candidate.task.name, candidate.id, rung, verdict, reason, **figures)


def _model(folder, candidate, shapes, rejected=False, default=False, audit=False) -> None:
    predicted = {str(w): round(BOUND[str(w)] * (1.5 + 0.1 * i), 4) for i, w in enumerate(shapes)}
    if candidate.task == INFERENCE:
        predicted = {str(w): round(made_up_ms(candidate, str(w)) ** 0.8, 4) for w in shapes}
    verdict = "rejected" if rejected and not audit else "kept"
    figures = {"schedule": candidate.schedule.fields(), "predicted_ms": predicted}
    figures |= {"bound_ms": {str(w): BOUND[str(w)] for w in shapes}, "limiter": {str(w): "memory" for w in shapes}}
    figures |= {"default": True} if default else {}
    figures |= {"audit": True} if audit else {}
    reason = f"predicted {max(predicted.values())} ms, over 1.3x the best" if rejected else ""
    _line(folder, candidate, "model", verdict, reason, **figures)


def _compile(folder, candidate, first) -> None:
    s = candidate.schedule
    kernels = {"scan": {"shared_bytes": 1024 * s.chunk_size * s.stages, "threads": 2 * s.v_tile, "grid": [128]}}
    if (s.chunk_size, s.v_tile, s.stages) == (64, 128, 3):
        return _line(
            folder, candidate, "lowered", "rejected", "scan: 240 KiB of shared memory, most is 227", kernels={}
        )
    _line(folder, candidate, "lowered", "kept", kernels=kernels)
    if (s.v_tile, s.stages) == (64, 3) and s.chunk_size == 16:
        return _line(folder, candidate, "ptxas", "rejected", "scan spills 96 bytes", kernels={})
    if (s.chunk_size, s.v_tile, s.stages) == (16, 64, 2):
        return _line(folder, candidate, "ptxas", "failed", "nvcc was killed", death="out of memory", kernels={})
    built = {"scan": {"registers": 168, "spills": 0, "warnings": [], "seconds": 4.0}}
    _line(folder, candidate, "ptxas", "kept", kernels=built)
    if (s.chunk_size, s.v_tile, s.stages) == (16, 128, 3):
        return _line(folder, candidate, "identical", "rejected", "same machine code", same_as=first.id)
    hashes = {"binary": short_hash(s.fields()), "kernels_hash": short_hash(candidate.id)}
    return _line(folder, candidate, "identical", "kept", **hashes)


def _compiled(folder, candidate) -> bool:
    return any(
        x["candidate"] == candidate.id and (x["rung"], x["verdict"]) == ("identical", "kept") for x in folder.log
    )


def _failed(folder, candidate) -> bool:
    return any(x["candidate"] == candidate.id and x["verdict"] == "failed" for x in folder.log)


def _check(folder, candidate) -> None:
    s, where = candidate.schedule, under(candidate)
    if (s.chunk_size, s.v_tile, s.stages) == (32, 128, 2):
        for _ in range(3):
            _line(folder, candidate, "correct", "failed", "the worker died: signal 11", under=where, death="crash")
    elif (s.chunk_size, s.v_tile, s.stages) == (32, 64, 2):
        reason = "output is 0.31 from the recurrence, at most 0.005 is right"
        _line(folder, candidate, "correct", "failed", reason, under=where, errors={"output": [0.31, 0.005]})
    else:
        _line(folder, candidate, "correct", "kept", under=where, errors={"output": [0.003, 0.005]})


def _timed(folder, candidate, rung, workload, verdict, reason, **figures) -> None:
    _line(folder, candidate, rung, verdict, reason, under=under(candidate, workload), workload=workload, **figures)


def recording(folder: Folder, path):
    """A log of its own for the replay device: made-up times of all that the plan kept; one candidate is wrong."""
    log, kept = Log(path), [line for line in folder.log if (line["rung"], line["verdict"]) == ("model", "kept")]
    study = folder.sweep.studies[0]
    for i, line in enumerate(kept):
        candidate, name = Candidate.of(study.task, line["schedule"]), study.task.name
        where = under(candidate)
        wrong = {"verdict": "failed", "reason": "output is off"} if i == 2 else {"verdict": "kept"}
        log.append(name, candidate.id, "correct", **wrong, under=where, errors={"output": [0.003, 0.005]})
        for workload in study.workloads:
            ms = 0.15 + 0.01 * ((7 * i) % 5) - 0.05 * (i == 4)
            figures = {"ms": ms, "calls": 5, "stopped": False, "under": where, "workload": str(workload)}
            log.append(name, candidate.id, "screen", "kept", **figures)
    return path
