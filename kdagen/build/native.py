"""Compiles C for this machine's CPU: a shared library, once for each text, compiler and set of CPU features.

What kernels need (nvcc, launchers, cubins) is in toolchain; here there is one file, and nothing but the C compiler.
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from kdagen import debug
from kdagen.build import cache
from kdagen.build.toolchain import Died, find_cc, first_error, keep_failed
from kdagen.errors import ToolchainError

# Bits: contraction only where the text says so. That errno and traps are left alone changes no value.
FLAGS = (
    "-O3", "-march=native", "-std=c11", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math",
)  # fmt: skip
THREADS = (
    "-fopenmp",
    "-fopenmp-simd",
)  # the second where the compiler has no OpenMP: vectors, one thread
SECONDS = 60  # after which a compiler hangs
PURPOSE = "compiles the loop that decodes on the CPU"


def library(name: str, text: str) -> Path:
    """The library of C `text`, from the cache or compiled; ToolchainError if it cannot be."""
    cc = find_cc(PURPOSE)
    try:
        for threads in THREADS:
            flags = (*FLAGS, threads)
            key = cache.key({"c": text, "compiler": cc, "flags": flags, "predefined": predefined(tuple(cc))})
            store = cache.Cache(debug.cache_dir())
            try:
                entry = store.get(key) or store.make(key, lambda folder: _compile(cc, flags, folder, name, text))[0]  # noqa: B023
            except ToolchainError as error:
                if threads == THREADS[-1] or isinstance(error, Died):
                    raise
                continue
            return entry / f"{name}.so"
    except OSError as error:
        raise ToolchainError(
            f"{debug.cache_dir()} cannot keep a compiled library ({error}): set KDAGEN_CACHE_DIR to a folder that can "
            f"be written"
        ) from None


@functools.cache
def predefined(cc: tuple[str, ...]) -> str:
    """All macros that the compiler defines by itself: its version, and each feature of the CPU that it compiles for."""
    return _run([*cc, "-march=native", "-dM", "-E", "-x", "c", "/dev/null"], None).stdout


def _compile(cc: list[str], flags: tuple[str, ...], folder: Path, name: str, text: str) -> None:
    source, log = folder / f"{name}.c", folder / f"{name}.log"
    source.write_text(text)
    run = _run([*cc, *flags, source.name, "-o", f"{name}.so", "-lm"], folder)
    if run.returncode:
        log.write_text(run.stdout + run.stderr)
        kept = keep_failed(source, log)
        raise ToolchainError(
            f"{cc[0]} failed on {source.name}: {first_error(run.stdout + run.stderr)} (full log {kept / log.name}, "
            f"source {kept / source.name})"
        )


def _run(command: list[str], folder: Path | None) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise Died(f"{command[0]} hung: it was stopped after {SECONDS} s", "hang") from None
