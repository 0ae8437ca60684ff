"""Small launches under compute-sanitizer: `python gpu_sanitizer.py OP PURPOSE,.. FOLDER..` is what it watches.

Where the tool is missing, or does not take the device, that is a finding too; only what it says of a program that ran
is for or against the kernels.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck")
NAME = "compute-sanitizer"
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error)")
SHAPES = {"decode": ((3, 1, 2), ()), "": ((1, 99, 2), (33, 0, 65, 1))}  # (B, T, H), lengths
SAID = 20  # lines of the tool's that are kept where it found something


def find() -> str | None:
    """The tool's path."""
    return shutil.which(NAME) or shutil.which(NAME, path=os.pathsep.join(PLACES))


def watched(op: str, purposes, folders) -> list[str]:
    """The program that the tool watches."""
    return [sys.executable, __file__, op, ",".join(purposes), *map(str, folders)]


def run(tool: str, program: list[str], seconds: float) -> dict:
    """ "verdict": "clean", "errors", "not run", "late" or "absent", and what the tool said."""
    path = find()
    if path is None:
        return {"verdict": "absent", "said": f"no {NAME} on the PATH or in {', '.join(PLACES)}: not checked"}
    started = time.perf_counter()
    command = [path, "--tool", tool, "--error-exitcode", "9", *program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        process = subprocess.Popen(command, start_new_session=True, **pipes)
    except OSError as error:
        return {"verdict": "not run", "said": f"{path}: {error}"}
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it watches
        process.communicate()
        return {"verdict": "late", "said": f"not done within {seconds:.0f} s"}
    return verdict(said, process.returncode) | {"seconds": round(time.perf_counter() - started, 1)}


def verdict(text: str, status: int) -> dict:
    """What the tool's words mean."""
    counts = [int(a or b) for a, b in SUMMARY.findall(text)]
    said = [line for line in text.splitlines() if line.strip()][-SAID:]
    if counts and max(counts):
        return {"verdict": "errors", "errors": max(counts), "said": "\n".join(said)}
    if counts and status == 0:
        return {"verdict": "clean", "errors": 0, "said": said[-1].strip("= ")}
    return {"verdict": "not run", "said": f"exit status {status}: " + "\n".join(said)}


def small(op: str, purposes: list[str], folders: list[Path]) -> int:
    """One launch of all kernels of an op, on a few short sequences; returns how many there were."""
    import gpu_contenders as contenders
    import torch
    from kdagen.autotune import launches

    count = 0
    for purpose in purposes:
        for kernels in contenders.built(folders, op, purpose).values():
            shape, lengths = SHAPES.get(purpose, SHAPES[""])
            drawn = contenders.on_gpu(launches.arguments(kernels, shape))
            shared = launches.shared_inputs(kernels, launches.ragged(drawn, lengths), 0)
            launches.whole_call(kernels)(launches.memory(kernels, shared))
            count += 1
    torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    print(small(sys.argv[1], sys.argv[2].split(","), [Path(folder) for folder in sys.argv[3:]]), "launches")
