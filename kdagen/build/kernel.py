"""One kernel, from TileLang text to machine code in a folder. Runs in a worker process, for TileLang is slow to import.

Leaves <name>.py (TileLang), <name>.cu or .hip, <name>.so (cubin and launcher) and report.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdagen.build import toolchain
from kdagen.build.launcher import launcher_source
from kdagen.errors import ScheduleError, ToolchainError
from kdagen.purposes import without
from kdagen.runtime import manifest as manifests
from kdagen.target import Target, target

REPORT = "report.json"
MAX_THREADS = 1024
KIB = 1024
# The schedule's fields that decide how much shared memory, or how many threads, a family of kernels takes.
SHARED_FIELDS = {
    "prepare": ("chunk_size",),
    "scan": ("stages", "v_tile", "chunk_size"),
    "output": ("v_tile", "chunk_size"),
    **dict.fromkeys(("ends", "transitions"), ("stages", "v_tile", "chunk_size")),
    "carry": ("stages",),
    "replay": ("stages", "v_tile", "chunk_size"),
    "reverse": ("stages", "v_tile", "chunk_size"),
    "gradients": ("chunk_size",),
    "decode": ("v_tile",),
}
THREAD_FIELDS = {
    "prepare": ("prepare_threads",),
    **dict.fromkeys(("scan", "output", "ends", "transitions", "replay", "reverse"), ("scan_threads",)),
    "gradients": ("gradient_threads",),
    "decode": ("threads",),
}


@dataclass(frozen=True)
class Job:
    """All that a worker needs to compile one kernel; plain data, so that it can be hashed and sent."""

    name: str
    family: str
    text: str
    params: list[dict]  # name and dtype of each argument, in order, and whether it is passed by value
    schedule: dict
    target: str
    purpose: str = "inference"  # for people: a kernel for training may serve inference as well


def compile_kernel(job: Job, folder: Path, say: Callable[..., None] = lambda stage, **more: None) -> None:
    """Compiles `job` into `folder`; `say(stage)` hears each stage, and `say("lowered", launch=...)` the exact launch.

    Whether the target can launch it is decided between these, before nvcc is run.
    """
    from kdagen.build import adapter

    started, gpu = time.perf_counter(), target(job.target)
    module = folder / f"{job.name}.py"
    module.write_text(job.text)
    say("lowering")
    try:
        lowered = adapter.lower(adapter.trace(job.text, job.name, module.name), gpu)
    except ToolchainError as error:
        raise ToolchainError(f"{error} (the module: {toolchain.keep_failed(module) / module.name})") from error
    launch = {
        "grid": list(lowered.grid),
        "block": [int(n) for n in lowered.threads],
        "shared_bytes": lowered.shared_bytes,
    }
    say("lowered", launch=launch)
    _check_arguments(job, lowered)
    check_threads(job, lowered)
    check_shared(job, gpu, lowered.shared_bytes)
    report = {
        "name": job.name,
        "family": job.family,
        "symbol": lowered.kernel,
        **launch,
        "tma_descriptors": len(lowered.descriptors),
        "source": module.name,
        **(_machine_code(job, gpu, lowered, folder, say) if gpu.compiles else _source_only(job, lowered, folder)),
    }
    (folder / REPORT).write_text(json.dumps({**report, "seconds": round(time.perf_counter() - started, 2)}, indent=1))


def _machine_code(job: Job, gpu: Target, lowered, folder: Path, say) -> dict:
    cuda, c = folder / f"{job.name}.cu", folder / f"{job.name}.c"
    cuda.write_text(lowered.source)
    say("nvcc")
    ptxas = toolchain.compile_cubin(cuda, gpu.arch)
    check_shared(job, gpu, lowered.shared_bytes, ptxas["static_shared_bytes"])
    say("launcher")
    cubin = cuda.with_suffix(".cubin")
    c.write_text(launcher_source(job.name, lowered, gpu, cubin.name, [p["name"] for p in job.params]))
    library = toolchain.compile_library(c)
    sass = toolchain.sass_counts(cubin)
    for leftover in (c, cubin, cuda.with_suffix(".log")):
        leftover.unlink()
    return {"code": cuda.name, "library": library.name, **ptxas, "sass": sass}


def _source_only(job: Job, lowered, folder: Path) -> dict:
    hip = folder / f"{job.name}.hip"
    hip.write_text(lowered.source)
    unknown = dict.fromkeys(("registers", "spill_stores", "spill_loads", "stack_bytes", "static_shared_bytes", "sass"))
    return {"code": hip.name, "library": None, **unknown, "warnings": []}


def _check_arguments(job: Job, lowered) -> None:
    """The module's parameters are those that the plan will pass."""
    wanted = [_argument(p["dtype"], p["by_value"]) for p in job.params]
    found = [_argument(a.dtype, not hasattr(a, "shape")) for a in lowered.arguments]
    if wanted != found:
        raise ToolchainError(
            f"{job.name}: the generated module takes {', '.join(found)}, but the launch plan passes "
            f"{', '.join(wanted)}: the skeleton must declare the kernel's parameters in their order"
        )


def _argument(dtype: str, by_value: bool) -> str:
    return f"{dtype} by value" if by_value else f"a tensor of {dtype}"


def check_threads(job: Job, lowered) -> None:
    """A block has at most 1024 threads, whatever the target."""
    if (threads := math.prod(int(n) for n in lowered.threads)) > MAX_THREADS:
        raise ScheduleError(
            f"{job.name} has {threads} threads a block (its producer warps included), a GPU takes {MAX_THREADS}: "
            f"lower {_fields(job, THREAD_FIELDS)} in {_schedule(job)}"
        )


def check_shared(job: Job, gpu: Target, dynamic: int, static: int = 0) -> None:
    """Nothing in TileLang or nvcc checks this; the driver would refuse the launch."""
    if (needed := dynamic + static) > gpu.shared_bytes:
        raise ScheduleError(
            f"{job.name} needs {needed / KIB:.1f} KiB of shared memory a block, {gpu.name} ({gpu.example}) has "
            f"{gpu.shared_bytes // KIB} KiB: lower {_fields(job, SHARED_FIELDS)} in {_schedule(job)}"
        )


def _fields(job: Job, table: dict) -> str:
    present = [f"{field} (now {job.schedule[field]})" for field in table.get(job.family, ()) if field in job.schedule]
    return " or ".join(present) or "the tile sizes"


def _schedule(job: Job) -> str:
    return "the schedule" if job.purpose == "inference" else f"the schedule of {job.purpose} ({without(job.purpose)})"


def job_of(kernel, source) -> Job:
    """The job of one KernelSource of an OpSource."""
    params = [{"name": p.name, "dtype": p.dtype, "by_value": p.role == "scalar"} for p in kernel.params]
    purpose = manifests.purpose({"passes": source.passes})
    return Job(kernel.name, kernel.family, kernel.text, params, source.schedule, source.target, purpose)


def job_fields(job: Job) -> dict:
    """A job as JSON; Job(**fields) is its inverse."""
    return dataclasses.asdict(job)
