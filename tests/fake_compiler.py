"""A compiler that makes nothing but reports: what becomes of a kernel, a test says. For the tuner's tests.

Candidates are KDA's on sm90 by their schedules, but their kernels are texts that name what each depends on, so that
candidates share kernels as real ones do: prepare by chunk_size and prepare_threads, scan by chunk_size, v_tile, stages.
"""

import dataclasses
import hashlib
import json
import os
from types import SimpleNamespace

import toy
from kdagen.autotune import compile as tuner
from kdagen.autotune.folder import Folder
from kdagen.autotune.progress import Silent
from kdagen.autotune.sweep import Candidate, Study, Sweep, Task, Workload

from kdagen.build import builder, toolchain
from kdagen.build.cache import Cache
from kdagen.build.pool import Event
from kdagen.schedule import Schedule

TASK = Task("kda", "inference", "sm90", "H100")
LAUNCH = {"grid": ["N", "HV", "1"], "block": [128, 1, 1], "shared_bytes": 4096}
REPORT = {
    **{"family": "scan", "registers": 168, "spill_stores": 0, "spill_loads": 0, "static_shared_bytes": 0},
    **{"stack_bytes": 0, "warnings": [], "tma_descriptors": 0, "sass": None, "seconds": 1.5, "code": "x.cu"},
}


class Said(Silent):
    """Remembers what it was told."""

    def __init__(self):
        self.lines, self.stages, self.notes = [], [], []
        self.stage, self.note = lambda *stage: self.stages.append(stage), self.notes.append

    def __call__(self, line: dict) -> None:
        self.lines.append(line)


def candidate(task: Task = TASK, **fields) -> Candidate:
    return Candidate(task, Schedule().replace(**fields))


def source_of(wanted: Candidate):
    """The toy op, its kernels' texts by the schedule."""
    s = wanted.schedule
    texts = {
        "prepare": f"prepare for {wanted.task.head_dim}: {s.chunk_size} tokens, {s.prepare_threads} threads",
        "scan": f"scan: {s.chunk_size} tokens, tile {s.v_tile}, {s.stages} stages",
    }
    op, target = toy.toy(**texts), wanted.task.target
    return dataclasses.replace(op, schedule=s.fields(), target=target, chunk_size=s.chunk_size)


class Compiler:
    """Stands for kdagen.build.pool.compile_each; `outcomes` are by a part of a kernel's text.

    An exception: that is raised, after nvcc began if `late`; a list of them: by attempt, None for success. A dict: in
    its report. `library` in it: the bytes of the machine code, else the text.
    """

    def __init__(self, outcomes: dict | None = None, late: bool = False, backwards: bool = False):
        self.outcomes, self.late, self.backwards, self.compiled = outcomes or {}, late, backwards, []

    def __call__(self, take, root, workers: int, timeout: float):
        self.workers, self.timeout, cache = workers, timeout, Cache(root)
        while True:
            taken = []
            while len(taken) < workers and (item := take()):
                taken.append(item)
            if not taken:
                return
            for key, job in reversed(taken) if self.backwards else taken:
                yield from self._compile(cache, key, job)

    def _compile(self, cache: Cache, key: str, job):
        outcome = next((o for part, o in self.outcomes.items() if part in job.text), {})
        if isinstance(outcome, list):
            outcome = outcome.pop(0) or {} if outcome else {}
        self.compiled.append(job.text)
        yield Event(key, "lowering")
        error = isinstance(outcome, Exception)
        launch = LAUNCH if error else {**LAUNCH, **{n: v for n, v in outcome.items() if n in LAUNCH}}
        yield Event(key, "lowered", launch)
        if error and not self.late:
            yield Event(key, "failed", error=outcome)
            return
        yield Event(key, "nvcc")
        if error:
            yield Event(key, "failed", error=outcome)
            return
        cache.make(key, lambda folder: _fill(folder, job, launch, dict(outcome)))
        yield Event(key, "done")


def _fill(folder, job, launch: dict, more: dict) -> None:
    code = more.pop("library", job.text.encode())
    library = f"{job.name}.so" if code is not None else None
    if library:
        (folder / library).write_bytes(code)
    report = {"name": job.name, "source": f"{job.name}.py", **launch, **REPORT, **more, "library": library}
    (folder / "report.json").write_text(json.dumps(report))


class Bench:
    """A folder of studies, and a machine on which nothing is installed."""

    def __init__(self, monkeypatch, path, tasks=(TASK,)):
        studies = tuple(Study(task, (Workload.parse("1x8192x64"),)) for task in tasks)
        self.folder, self.path = Folder.create(path / "sweep", Sweep(studies)), path
        self.fresh_cache(monkeypatch, "cache")
        monkeypatch.setattr(tuner, "source_of", source_of)
        monkeypatch.setattr(builder, "job_key", lambda job: hashlib.sha256(job.text.encode()).hexdigest()[:40])
        monkeypatch.setattr(builder, "_versions", lambda: {"tilelang": "0.1.15"})
        monkeypatch.setattr(toolchain, "find_nvcc", lambda: SimpleNamespace(version="13.0.88"))
        monkeypatch.setattr(toolchain, "check", lambda: None)

    def fresh_cache(self, monkeypatch, name: str) -> None:
        monkeypatch.setenv("KDAGEN_CACHE_DIR", str(self.path / name))

    def planned(self, *candidates: Candidate) -> None:
        """Their lines of the model, the first of each task being the default."""
        seen = set()
        for c in candidates:
            default = {} if c.task in seen else {"default": True}
            self.folder.log.append(c.task.name, c.id, "model", "kept", schedule=c.schedule.fields(), **default)
            seen.add(c.task)

    def run(self, candidates, compiler: Compiler | None = None, deadline=None, jobs: int = 2) -> Compiler:
        """Compiles these, whichever study each is of; remembers what was said."""
        compiler, self.said = compiler or Compiler(), Said()
        todo = lambda folder, study, lines: [c for c in candidates if c.task == study.task]  # noqa: E731
        tuner.compile_candidates(self.folder, jobs, deadline, self.said, todo=todo, compile_each=compiler)
        return compiler

    def verdicts(self, wanted: Candidate) -> list[str]:
        """Of one candidate, in order: "lowered kept"."""
        return [f"{v['rung']} {v['verdict']}" for v in self.lines(wanted)]

    def lines(self, wanted: Candidate) -> list[dict]:
        return [v for v in self.folder.log if v["candidate"] == wanted.id and v["rung"] != "model"]


class RemoteCompiler:
    """Stands for the actor kdagen.autotune.distribute.Compiler: some kernels hang, others take the actor with them."""

    def ready(self) -> None:
        pass

    def run(self, key: str, job, timeout: float):
        stages = [("lowering", {}), ("lowered", {"launch": LAUNCH})]
        if "9 stages" in job.text:
            return [], {}, toolchain.Died("it compiles otherwise", "start")
        if "tile 128" in job.text:
            return stages, {}, toolchain.Died("it hangs", "hang")
        if "3 stages" in job.text:
            os._exit(1)
        library = f"{job.name}.so"
        report = json.dumps({"name": job.name, "source": f"{job.name}.py", **LAUNCH, **REPORT, "library": library})
        return [*stages, ("nvcc", {})], {library: job.text.encode(), "report.json": report.encode()}, None
