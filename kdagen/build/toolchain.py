"""The programs that a build runs: nvcc, a C compiler and, where there is one, nvdisasm.

Finds them, runs them and reads what they report. Knows nothing of TileLang, ops or folders.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from kdagen import debug
from kdagen.errors import ToolchainError

NVCC_FLAGS = ("-cubin", "-std=c++20", "-O3", "-Xptxas", "-v")
CC_FLAGS = ("-O2", "-std=c11", "-shared", "-fPIC", "-Wall", "-Werror")
NO_NVCC = """no nvcc found; kdagen compiles kernels with CUDA 13. any one of these will do:
  1. put nvcc on PATH (a system CUDA toolkit);
  2. set CUDA_HOME (or CUDA_PATH) to the toolkit's folder;
  3. pip install 'kdagen[cuda]' (nvcc from PyPI, no system CUDA needed)."""
# What a SASS listing is searched for: tensor cores, TMA, other asynchronous or matrix memory moves, spills.
SASS_OPCODES = ("HGMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDSM", "STSM", "LDL", "STL")


KILLED = "died due to signal 9"  # what nvcc says of one of its programs; memory ran out


class Died(ToolchainError):
    """A process that compiles was killed, crashed or hung: the kernel itself may be right."""

    def __init__(self, message: str, death: str):
        """`death` is "out of memory", "hang", "crash", or "start": it never began."""
        super().__init__(message)
        self.death = death

    def __reduce__(self):
        return Died, (str(self), self.death)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler and where it came from."""

    path: str
    version: str  # "13.0.88"
    origin: str  # "PATH", "CUDA_HOME", "CUDA_PATH" or "kdagen[cuda]"


def check() -> None:
    """Raises what compiling any kernel would, if a program for it is missing."""
    find_nvcc(), find_cc(), find_cxx(), tilelang_includes()


@functools.cache
def find_nvcc() -> Nvcc:
    """The first nvcc of PATH, CUDA_HOME, CUDA_PATH and the wheels of kdagen[cuda]."""
    for origin, path in _candidates("nvcc"):
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        if match := re.search(r"\bV(\d+(?:\.\d+)+)", text):
            return Nvcc(path, match[1], origin)
    raise ToolchainError(NO_NVCC)


def _candidates(tool: str):
    """(origin, path) of every place that holds an executable of this CUDA tool, in order of preference."""
    if on_path := shutil.which(tool):
        yield "PATH", on_path
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if (home := os.environ.get(variable)) and (path := shutil.which(tool, path=str(Path(home, "bin")))):
            yield variable, path
    for folder in _wheel_folders():
        if path := shutil.which(tool, path=str(folder / "bin")):
            yield "kdagen[cuda]", path


def _wheel_folders() -> list[Path]:
    """site-packages/nvidia/cu13, where the CUDA wheels of PyPI install themselves."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(p, "cu13") for p in (spec.submodule_search_locations or ())] if spec else []


def find_cc(purpose: str = "builds each kernel's host launcher") -> list[str]:
    """The C compiler's command: $CC, cc, gcc or clang; `purpose` is said where there is none."""
    return _host_compiler("CC", ("cc", "gcc", "clang"), purpose)


def find_cxx() -> list[str]:
    """The C++ compiler that nvcc preprocesses with: $CXX, g++ or clang++."""
    return _host_compiler("CXX", ("g++", "clang++"), "is what nvcc preprocesses with")


def _host_compiler(variable: str, names: tuple[str, ...], purpose: str) -> list[str]:
    command = shlex.split(os.environ.get(variable, ""))
    for name in command[:1] or names:
        if path := shutil.which(name):
            return [path, *command[1:]]
    language = {"CC": "C", "CXX": "C++"}[variable]
    tried = f"${variable} is '{command[0]}', which is not there" if command else f"tried {', '.join(names)}"
    raise ToolchainError(
        f"no {language} compiler found ({tried}); it {purpose}: "
        f"install gcc (apt install build-essential) or set {variable}"
    )


def tilelang_includes() -> list[str]:
    """-I flags for the headers that TileLang's CUDA source includes (found without importing TileLang)."""
    spec = importlib.util.find_spec("tilelang")
    if not spec:
        raise ToolchainError("TileLang is not installed: pip install 'kdagen[build]'")
    root = Path(spec.submodule_search_locations[0])
    templates = os.environ.get("TL_TEMPLATE_PATH") or root / "src"
    cutlass = os.environ.get("TL_CUTLASS_PATH") or root / "3rdparty" / "cutlass" / "include"
    return [f"-I{templates}", f"-I{cutlass}"]


def compile_cubin(source: Path, arch: str) -> dict:
    """Compiles `source` (x.cu) to x.cubin beside it; returns what ptxas reported. The log stays in x.log."""
    nvcc, log = find_nvcc(), source.with_suffix(".log")
    command = [nvcc.path, *NVCC_FLAGS, f"-arch={arch}", "-ccbin", find_cxx()[0], *tilelang_includes()]
    run = subprocess.run(
        [*command, source.name, "-o", source.with_suffix(".cubin").name],
        cwd=source.parent,
        capture_output=True,
        text=True,
    )
    log.write_text(run.stdout + run.stderr)
    if run.returncode:
        kept = keep_failed(source, log)
        message = (
            f"nvcc {nvcc.version} failed on {source.name} for {arch}: {first_error(run.stdout + run.stderr)} "
            f"(full log {kept / log.name}, source {kept / source.name})"
        )
        if run.returncode == -signal.SIGKILL or KILLED in run.stderr:
            raise Died(message, "out of memory")
        raise ToolchainError(message)
    return ptxas_report(run.stderr)


def keep_failed(*files: Path) -> Path:
    """Copies what a failed compilation leaves to where it stays."""
    folder = debug.cache_dir() / "failed"
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, folder)
    return folder


def first_error(log: str) -> str:
    """The first line of a compiler's log that says what is wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    wrong = (line for line in lines if re.search(r"\b(error|fatal|not found|no such file)\b", line, re.IGNORECASE))
    return next(wrong, lines[-1] if lines else "it printed nothing")


def ptxas_report(log: str) -> dict:
    """Registers, spills, stack, static shared memory and warnings from `ptxas -v`, for a file with one kernel."""

    def number(pattern: str) -> int:
        return max((int(found) for found in re.findall(pattern, log)), default=0)

    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "static_shared_bytes": number(r"(\d+) bytes smem"),
        "warnings": [w.strip() for w in re.findall(r"^ptxas.*(?:\(C\d+\)|warning).*$", log, re.MULTILINE)],
    }


def compile_library(source: Path) -> Path:
    """Compiles the launcher `source` (x.c), which embeds x.cubin, to x.so beside it."""
    from tvm_ffi import libinfo

    library = source.with_suffix(".so")
    folders = (libinfo.find_include_path(), libinfo.find_dlpack_include_path(), Path(__file__).parent)
    command = [*find_cc(), *CC_FLAGS, *(f"-I{folder}" for folder in folders)]
    run = subprocess.run(
        [*command, source.name, "-o", library.name, "-ldl", "-lpthread"],
        cwd=source.parent,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise ToolchainError(f"{command[0]} failed on the launcher {source}: {first_error(run.stderr)}")
    return library


def has_disassembler() -> bool:
    """Whether sass_counts will find nvdisasm."""
    return next(_candidates("nvdisasm"), None) is not None


def sass_counts(cubin: Path) -> dict[str, int] | None:
    """How often each of SASS_OPCODES occurs in the machine code; None where nvdisasm is not installed."""
    for _, nvdisasm in _candidates("nvdisasm"):
        listing = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
        if listing.returncode == 0:
            return count_opcodes(listing.stdout)
    return None


def count_opcodes(listing: str) -> dict[str, int]:
    """Occurrences of SASS_OPCODES in nvdisasm's listing, predicates and modifiers put aside."""
    found = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", listing))
    return {opcode: found[opcode] for opcode in SASS_OPCODES}
