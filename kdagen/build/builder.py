"""Builds ops: every kernel compiled (or found in the cache), each op's folder written.

The parent process here imports neither TileLang nor torch: whether a kernel is cached is decided from its text and
the versions of what would compile it, so that a build with nothing to do is over in a moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once
from importlib import metadata
from pathlib import Path

import kdagen
from kdagen import debug
from kdagen.build import folder as folders
from kdagen.build import pool, toolchain
from kdagen.build.cache import Cache, key
from kdagen.build.kernel import REPORT, Job, job_fields, job_of
from kdagen.build.progress import Progress
from kdagen.errors import ToolchainError
from kdagen.runtime import manifest as manifests
from kdagen.runtime.loader import cached_op_folder
from kdagen.target import target

TRANSIENT = ("seconds",)  # in the cache's report, but not in the manifest: two builds leave the same bytes
# The modules whose text decides what a kernel compiles to; a change in them makes every cache entry stale.
DECISIVE = ("adapter.py", "kernel.py", "launcher.py", "launcher.h", "launcher.c.j2", "toolchain.py")


@dataclass(frozen=True)
class Built:
    """What a build made of one OpSource."""

    name: str
    target: str
    folder: Path
    kernels: tuple[dict, ...]  # each kernel's report, with "cached"
    purpose: str = "inference"


def build(sources: Sequence, out_dir: Path, jobs: int | None = None, progress: Progress | None = None) -> list[Built]:
    """Compiles the kernels of `sources` (OpSources, each for its own target) and writes them to `out_dir`.

    Raises:
        ToolchainError: no nvcc, no C compiler, no TileLang, or one of them failed.
        ScheduleError: a kernel needs more shared memory or threads than its target has.
        ArtefactError: `out_dir` holds something else.
    """
    folders.check_ours(out_dir)
    entries = compile_kernels(sources, jobs, progress or Progress(silent=True))
    built = [_write(source, entries, out_dir) for source in sources]
    for place in {b.folder for b in built if not manifests.TUNED.search(b.folder.name)}:
        folders.remove_tuned(place, keep={b.folder for b in built})
    return built


def build_cached(source, jobs: int | None = None, progress: Progress | None = None) -> Path:
    """The folder of this OpSource's kernels in the cache, built if it is not there: what an op uses just in time."""
    entries = compile_kernels([source], jobs, progress or Progress(silent=True))
    files, contents, _ = _assemble(source, entries)
    return folders.write_variant(cached_op_folder(contents["digest"]), files, contents)


def compile_kernels(sources: Sequence, jobs: int | None, progress: Progress) -> dict[str, tuple[Path, bool]]:
    """The cache entry of every kernel by key, and whether it was there before."""
    cache = Cache(debug.cache_dir())
    wanted = {job_key(job): job for source in sources for job in jobs_of(source)}
    found = {k: entry for k in wanted if (entry := cache.get(k))}
    longest_first = sorted(wanted.items(), key=lambda item: -len(item[1].text))  # long texts take long to compile
    missing = {k: job for k, job in longest_first if k not in found}
    with progress.over(wanted, done=found) as say:
        if missing:
            pool.compile_all(missing, debug.cache_dir(), jobs or os.cpu_count() or 1, say)
    return {k: (cache.entries / k, k in found) for k in wanted}


def job_key(job: Job) -> str:
    """The cache key of a kernel: its text and all that will work on it."""
    gpu = target(job.target)
    compiler = toolchain.find_nvcc().version if gpu.compiles else None
    made_from = {**job_fields(job), "schedule": None, "purpose": None}  # for messages: the text says it all
    return key({"job": made_from, "arch": gpu.arch, "nvcc": compiler, "flags": toolchain.NVCC_FLAGS, **_versions()})


@once
def _versions() -> dict[str, str]:
    try:
        tilelang = metadata.version("tilelang")
    except metadata.PackageNotFoundError:
        raise ToolchainError("TileLang is not installed: pip install 'kdagen[build]'") from None
    here = Path(__file__).parent
    decisive = hashlib.sha256(b"".join((here / name).read_bytes() for name in DECISIVE)).hexdigest()
    sass = str(toolchain.has_disassembler())
    return {"kdagen": kdagen.__version__, "tilelang": tilelang, "build": decisive, "sass": sass}


def jobs_of(source) -> list[Job]:
    """The jobs of an OpSource's kernels, in launch order."""
    return [job_of(kernel, source) for kernel in source.kernels]


def _write(source, entries, out_dir: Path) -> Built:
    files, contents, kernels = _assemble(source, entries)
    name = (manifests.tuned_variant if source.beside else manifests.variant)(contents["plan"])
    place = folders.write_op(out_dir, source.name, name, files, contents)
    return Built(source.name, source.target, place, kernels, manifests.purpose(contents["plan"]))


def _assemble(source, entries) -> tuple[list[Path], dict, tuple[dict, ...]]:
    """An op's files, the contents of its manifest, and the report of each kernel for people."""
    found = [entries[job_key(job)] for job in jobs_of(source)]
    reports = [json.loads((entry / REPORT).read_text()) for entry, _ in found]
    files = [
        entry / r[kind] for (entry, _), r in zip(found, reports) for kind in ("source", "code", "library") if r[kind]
    ]
    contents = manifest_of(source, reports)
    return files, contents, tuple({**r, "cached": cached} for r, (_, cached) in zip(reports, found))


def manifest_of(source, reports: list[dict]) -> dict:
    """What the manifest of an op says, but for its format and files; `reports` are those of its kernels."""
    gpu = target(source.target)
    versions = {"kdagen": kdagen.__version__, "tilelang": _versions()["tilelang"]}
    if gpu.compiles:
        versions["nvcc"] = toolchain.find_nvcc().version
    tuned = {"tuned": list(source.tuned)} if source.tuned else {}
    return {
        "name": source.name,
        "digest": manifests.digest(source),
        "target": {"name": gpu.name, "arch": gpu.arch, "runs_on": list(gpu.runs_on), "compiled": gpu.compiles},
        "host": platform.machine() if gpu.compiles else None,
        "versions": versions,
        "plan": source.plan(),
        **tuned,
        "kernels": [{k: v for k, v in r.items() if k not in TRANSIENT} for r in reports],
    }
