"""Records of benchmarks on the CPU: what their figures depend on, and where they are kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def machine(*packages: str) -> dict:
    """Date, processor, load, and the versions of kdagen, torch and other packages."""
    from kdagen.runtime.tuned import this_cpu

    cpu, cores = this_cpu()
    return {
        "date": datetime.date.today().isoformat(), "cpu": cpu, "cores": cores,
        "load_before": round(os.getloadavg()[0], 1), "python": platform.python_version(),
        **{name: version(name) for name in ("kdagen", "torch", *packages)},
    }  # fmt: skip


def keep(name: str, record: dict) -> None:
    """Adds a line to results/NAME.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
