"""What a build costs and what it leaves: wall time cold and warm, start-up times, and the figures of each kernel, of
inference, training and decoding.

    pip install -e '.[build,cuda,sass]' && python benchmarks/build.py

Cold is a build with an empty cache; warm, the same command again. Kernels are described by their manifest: what ptxas
reported, tensor-core instructions counted in the machine code, modelled traffic; the cache knows how long each took,
kernels being compiled side by side. Writes benchmarks/results/build.json.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from kdagen.purposes import PURPOSES
from kdagen.runtime import manifest as manifests

RESULTS = Path(__file__).parent / "results" / "build.json"
HEAVY = ("torch", "tilelang", "tvm", "sympy")
LISTED = f"import sys, kdagen; print(*(m for m in {HEAVY} if m in sys.modules))"
PRODUCTS = r"\bT\.(?:wgmma_)?gemm\("  # in TileLang
TENSOR_CORE = r"\btl::(?:wgmma_\w+|mma_sync)<"  # in CUDA


def seconds(command: list[str], **environment) -> float:
    """Wall time of a command that must succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


def repeated(command: list[str], times: int, **environment) -> dict:
    """Median and extremes of several runs."""
    taken = sorted(seconds(command, **environment) for _ in range(times))
    return {
        "median_s": round(statistics.median(taken), 3),
        "least_s": round(taken[0], 3),
        "most_s": round(taken[-1], 3),
    }


def kdagen() -> str:
    """The command beside this interpreter."""
    found = shutil.which("kdagen", path=str(Path(sys.executable).parent)) or shutil.which("kdagen")
    if not found:
        raise click.ClickException("no kdagen command: pip install -e '.[build,cuda,sass]'")
    return found


def build(arch: str, op: str, colds: int, warms: int) -> dict:
    """Cold and warm builds in folders of their own, and the manifest of what was built."""
    command = [kdagen(), "build", "--untuned", "--arch", arch, "--op", op, "--out"]
    with tempfile.TemporaryDirectory() as place:
        cold = {}
        for which, more in (("cold_decode_s", ["--only", "decode"]), ("cold_s", [])):
            folders = [Path(place, which, str(i)) for i in range(colds)]
            cold[which] = [
                seconds([*command, str(f / "ops"), *more], KDAGEN_CACHE_DIR=str(f / "cache")) for f in folders
            ]
        last = folders[-1]
        warm = repeated([*command, str(last / "ops")], warms, KDAGEN_CACHE_DIR=str(last / "cache"))
        taken = compile_seconds(last / "cache")
        plans = {
            path: json.loads(path.read_text())["plan"] for path in sorted((last / "ops" / op).glob("*/manifest.json"))
        }
        made = {manifests.purpose(plan): figures(path, taken) for path, plan in plans.items()}
        return {**{which: [round(s, 1) for s in found] for which, found in cold.items()}, "warm": warm, **made}


def compile_seconds(cache: Path) -> dict[str, float]:
    """How long each kernel of a cache took to compile, by its TileLang text."""
    reports = [(path.parent, json.loads(path.read_text())) for path in cache.glob("entries/*/report.json")]
    return {(folder / report["source"]).read_text(): report["seconds"] for folder, report in reports}


def figures(path: Path, taken: dict[str, float]) -> dict:
    """What the manifest and the sources beside it say of each kernel; `taken` is what `compile_seconds` gave."""
    manifest = json.loads(path.read_text())
    plan = manifest["plan"]
    moved = {k["name"]: k["bytes_a_token"] for k in plan["kernels"]}
    return {
        "versions": manifest["versions"],
        "schedule": plan["schedule"],
        "kernels": [kernel(k, path.parent, moved[k["name"]], taken) for k in manifest["kernels"]],
        "passes": plan["passes"],
        "modelled_bytes_a_token_a_head": {p: sum(moved[name] for name in names) for p, names in plan["passes"].items()},
    }


def kernel(report: dict, folder: Path, moved: float, taken: dict[str, float]) -> dict:
    """Figures of one kernel: those of its report, and products in each form that it takes."""
    copied = ("name", "block", "registers", "spill_stores", "spill_loads", "stack_bytes", "warnings", "sass")
    count = lambda pattern, file: len(re.findall(pattern, (folder / file).read_text()))  # noqa: E731
    return {
        **{key: report[key] for key in copied},
        "shared_bytes": report["shared_bytes"] + report["static_shared_bytes"],
        "products": count(PRODUCTS, report["source"]),
        "tensor_core_calls": count(TENSOR_CORE, report["code"]),
        "modelled_bytes_a_token_a_head": moved,
        "compile_s": taken.get((folder / report["source"]).read_text()),
    }


def starts(times: int) -> dict:
    """How long the command and the package take to start, an empty interpreter beside them, and what gets imported."""
    python = sys.executable
    listed = subprocess.run([python, "-c", LISTED], capture_output=True, text=True, check=True).stdout.split()
    return {
        "kdagen --help": repeated([kdagen(), "--help"], times),
        "import kdagen": repeated([python, "-c", "import kdagen"], times),
        "python": repeated([python, "-c", "pass"], times),
        "imported_with_kdagen": listed,
    }


def machine() -> dict:
    """What the times depend on."""
    from kdagen.runtime.tuned import this_cpu

    cpu, cores = this_cpu()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": cores,
        "python": platform.python_version(),
        "load_before": os.getloadavg(),
    }


def show(found: dict) -> None:
    """The figures, as tables."""
    console, times = Console(width=120, highlight=False, markup=False), _table("", "s")
    times.add_row("build, cold cache", ", ".join(map(str, found["build"]["cold_s"])))
    times.add_row("build of decoding alone, cold cache", ", ".join(map(str, found["build"]["cold_decode_s"])))
    times.add_row("build, warm cache", str(found["build"]["warm"]["median_s"]))
    for what in ("kdagen --help", "import kdagen", "python"):
        times.add_row(what, str(found["starts"][what]["median_s"]))
    console.print(times)
    made = {purpose: found["build"][purpose] for purpose in PURPOSES if purpose in found["build"]}
    for purpose, figures in made.items():
        console.print(_kernels(purpose, figures["kernels"]))
        moved = ", ".join(f"{which} {n:,.0f}" for which, n in figures["modelled_bytes_a_token_a_head"].items())
        console.print(f"modelled traffic in {purpose}, bytes a token a head: {moved}")
    console.print(f"imported with kdagen: {', '.join(found['starts']['imported_with_kdagen']) or f'none of {HEAVY}'}")
    console.print(f"{found['machine']['cores']} cores, load {found['machine']['load_before'][0]:.2f} before")
    if any(k["sass"] is None for figures in made.values() for k in figures["kernels"]):
        console.print("no instruction counts: pip install 'kdagen[sass]' for nvdisasm")


def _kernels(purpose: str, kernels: list[dict]) -> Table:
    figures = (
        "registers",
        "spilled",
        "shared KiB",
        "products",
        "in CUDA",
        "HGMMA",
        "HMMA",
        "bytes a token a head",
        "s",
    )
    table = _table(f"kernel ({purpose})", *figures)
    for k in kernels:
        sass = k["sass"] or {}
        spilled, shared = k["spill_stores"] + k["spill_loads"], k["shared_bytes"] / 1024
        cells = (k["registers"], spilled, f"{shared:.1f}", k["products"], k["tensor_core_calls"])
        moved = f"{k['modelled_bytes_a_token_a_head']:,.0f}"
        counts = (sass.get(op, "-") for op in ("HGMMA", "HMMA"))
        table.add_row(k["name"], *map(str, (*cells, *counts, moved, k["compile_s"])))
    return table


def _table(*titles: str) -> Table:
    made = Table(box=None, pad_edge=False)
    for i, title in enumerate(titles):
        made.add_column(title, justify="right" if i else "left")
    return made


@click.command()
@click.option("--arch", default="sm90", show_default=True)
@click.option("--op", default="kda", show_default=True)
@click.option("--colds", default=1, show_default=True, help="Builds with an empty cache.")
@click.option("--repeats", default=9, show_default=True, help="Runs of everything that is short.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(arch: str, op: str, colds: int, repeats: int, out: Path) -> None:
    """Measure a build and what it leaves."""
    found = {"machine": machine(), "starts": starts(repeats), "build": build(arch, op, colds, repeats)}
    found["machine"]["load_after"] = os.getloadavg()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
