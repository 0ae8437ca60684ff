"""Real releases of flash-linear-attention, side by side, on a machine without a GPU.

Both are packages called fla, so neither is installed beside kdagen: each goes into a folder of its own and is in
sys.modules while a test runs that asks for it, and gone after, so that transformers does not see it. Its kernels need
triton, which is replaced (no_triton): what is real are signatures, checks, the dispatcher and the torch references.
"""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import no_triton
from filelock import FileLock

VERSIONS = ("0.5.2", "0.6.0")
MODULES = (
    "fla.ops",
    "fla.ops.kda.naive",
    "fla.ops.kda.gate",
    "fla.ops.gla.naive",
    "fla.ops.gated_delta_rule.gate",
    "fla.ops.generalized_delta_rule.dplr.naive",
    "fla.ops.linear_attn.naive",
    "fla.ops.retention.naive",
    "fla.ops.simple_gla.naive",
)


def installed(version: str, cache: Path) -> Path:
    """The folder that holds this release of fla-core and nothing else; pip puts it there once."""
    folder = cache / f"fla-core-{version}"
    with FileLock(cache / f"fla-core-{version}.lock"):
        if not (folder / "fla").is_dir():
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
            subprocess.run([*pip, f"fla-core=={version}"], check=True)
    return folder


@functools.cache
def loaded(folder: Path) -> dict:
    """The modules of this release, imported, by name."""
    no_triton.install()
    sys.path.insert(0, str(folder))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that there is no GPU
            for name in MODULES:
                importlib.import_module(name)
        return taken_out()
    finally:
        sys.path.remove(str(folder))
        no_triton.remove()


def taken_out() -> dict:
    """All modules of FLA and triton, out of sys.modules."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ("fla", "triton")}


@contextmanager
def present(version: str, cache: Path):
    """This release of FLA as the one that is installed; gives the module `fla`."""
    modules = loaded(installed(version, cache))
    sys.modules.update(modules)
    try:
        yield modules["fla"]
    finally:
        modules.update(taken_out())
