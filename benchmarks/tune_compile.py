"""How many candidates of a sweep are decided an hour without a GPU: `kdagen tune plan` and `compile`, cold.

    pip install -e '.[build,cuda]' && python benchmarks/tune_compile.py --minutes 20

Cold: a sweep and a cache that are new. No kernel is begun after the given minutes; those under way are waited for, and
count. A candidate is decided once it is kept with its machine code, or rejected or failed with a reason. Writes
benchmarks/results/tune_compile.json after every run.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import click

RESULTS = Path(__file__).parent / "results" / "tune_compile.json"
RUNGS = ("lowered", "ptxas", "identical")


def sweep(op: str, purpose: str, gpu: str):
    """The sweep that `kdagen tune plan --op OP --purpose PURPOSE --gpu GPU` makes."""
    from kdagen.autotune.asked import Asked, sweep_of

    return sweep_of(Asked((op,), (purpose,), gpu))


def measure(place: Path, wanted, jobs: int, minutes: float) -> dict:
    """One cold run in an empty folder."""
    from kdagen.autotune.compile import compile_candidates
    from kdagen.autotune.folder import Folder
    from kdagen.autotune.plan import plan
    from kdagen.autotune.progress import Plain

    folder, started = Folder.create(place / "sweep", wanted), time.perf_counter()
    with Plain() as say:
        plan(folder, say)
        planned = time.perf_counter()
        compile_candidates(folder, jobs, time.monotonic() + 60 * minutes, say)
    ended = time.perf_counter()
    seconds = {"plan_s": round(planned - started, 1), "compile_s": round(ended - planned, 1)}
    return {**seconds, **figures(list(folder.log), place / "cache", ended - started)}


def figures(lines: list[dict], cache: Path, seconds: float) -> dict:
    """What a log and a cache come to."""
    compiled = [line for line in lines if line["rung"] in RUNGS]
    ends = [line for line in compiled if line["verdict"] != "kept" or line["rung"] == "identical"]
    reports = [json.loads(path.read_text()) for path in cache.glob("entries/*/report.json")]
    needed = sum(len(line["kernels"]) for line in compiled if line["rung"] == "ptxas" and line["verdict"] != "failed")
    return {
        "candidates_kept_by_the_model": sum(v["rung"] == "model" and v["verdict"] == "kept" for v in lines),
        "decided": len(ends),
        "decided_an_hour": round(3600 * len(ends) / seconds, 1),
        "verdicts": dict(Counter(f"{line['verdict']} at {line['rung']}" for line in ends)),
        "without_a_reason": sum(line["verdict"] != "kept" and not line.get("reason") for line in lines),
        "kernels_compiled": len(reports),
        "kernels_needed": needed,
        "kernels_shared": needed - len(reports),
        "kernel_median_s": round(statistics.median(r["seconds"] for r in reports), 1) if reports else None,
        "kernel_most_s": max((r["seconds"] for r in reports), default=None),
    }


def machine() -> dict:
    """What the times depend on."""
    from kdagen.build.toolchain import find_nvcc
    from kdagen.runtime.tuned import this_cpu

    cpu, cores = this_cpu()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": cores,
        "load_before": os.getloadavg(),
        "python": platform.python_version(),
        "tilelang": metadata.version("tilelang"),
        "nvcc": find_nvcc().version,
    }


@click.command()
@click.option("--op", default="kda", show_default=True)
@click.option("--purpose", default="inference", show_default=True)
@click.option("--gpu", default="H100", show_default=True)
@click.option("--jobs", default=2, show_default=True)
@click.option("--minutes", default=20.0, show_default=True, help="After which no kernel is begun.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(op: str, purpose: str, gpu: str, jobs: int, minutes: float, out: Path) -> None:
    """Plan and compile the sweep of one op."""
    wanted, found = sweep(op, purpose, gpu), {"machine": machine()}
    with tempfile.TemporaryDirectory() as place:
        os.environ["KDAGEN_CACHE_DIR"] = str(Path(place, "cache"))
        found |= {"op": op, "purpose": purpose, "gpu": gpu, "jobs": jobs, **measure(Path(place), wanted, jobs, minutes)}
    found["machine"]["load_after"] = os.getloadavg()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(json.dumps({n: v for n, v in found.items() if n != "machine"}, indent=1))


if __name__ == "__main__":
    main()
