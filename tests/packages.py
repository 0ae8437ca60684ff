"""Output folders as `kdagen build` leaves them, but for the libraries: made in a moment, without nvcc."""

from __future__ import annotations

import platform

from kdagen.build import folder
from kdagen.build.kernel import job_of
from kdagen.runtime import manifest
from kdagen.target import target

REPORT = {"registers": 96, "spill_stores": 0, "spill_loads": 0, "static_shared_bytes": 0, "shared_bytes": 4096}


def contents(source) -> dict:
    """The manifest's contents for an OpSource."""
    gpu = target(source.target)
    kernels = [
        {
            "name": k.name, "family": k.family, "block": [k.threads, 1, 1], "source": f"{k.name}.py",
            "library": f"{k.name}.so", **REPORT,
        }
        for k in source.kernels
    ]  # fmt: skip
    return {
        "name": source.name,
        "digest": manifest.digest(source),
        "host": platform.machine(),
        "target": {"name": gpu.name, "arch": gpu.arch, "runs_on": list(gpu.runs_on), "compiled": gpu.compiles},
        "versions": {},
        "plan": source.plan(),
        **({"tuned": list(source.tuned)} if source.tuned else {}),
        "kernels": kernels,
    }


def write(out, source, tmp_path):
    """Writes the op of an OpSource into the package `out`; returns the folder of its kernels."""
    files = []
    for job in (job_of(kernel, source) for kernel in source.kernels):
        for suffix, text in ((".py", job.text), (".so", "no machine code")):
            files.append(tmp_path / f"{job.name}{suffix}")
            files[-1].write_text(text)
    variant = (manifest.tuned_variant if source.beside else manifest.variant)(source.plan())
    return folder.write_op(out, source.name, variant, files, contents(source))
