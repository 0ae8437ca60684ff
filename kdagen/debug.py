"""The environment variables that kdagen reads: all of them, in one table, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLES = {
    "KDAGEN_DEBUG": "0 to 5: how much kdagen shows of its inner workings; from 1, tracebacks and TileLang's output",
    "KDAGEN_CACHE_DIR": "where compiled kernels are kept (default: the user's cache folder)",
    "KDAGEN_BUILD_DIR": "the folder that `kdagen build` writes and ops look in (default: ./kdagen_ops)",
}


def level() -> int:
    """KDAGEN_DEBUG as a number; anything that is not one counts as 1."""
    text = os.environ.get("KDAGEN_DEBUG", "0")
    return int(text) if text.isdigit() else 1


def cache_dir() -> Path:
    """KDAGEN_CACHE_DIR, or the platform's cache folder of this user."""
    if folder := os.environ.get("KDAGEN_CACHE_DIR"):
        return Path(folder).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("kdagen", appauthor=False))


def build_dir() -> Path:
    """KDAGEN_BUILD_DIR, or kdagen_ops in the working directory."""
    return Path(os.environ.get("KDAGEN_BUILD_DIR") or "kdagen_ops").expanduser()


def one_gpu(number: int) -> dict[str, str]:
    """The environment for a process that is to see only this one of the GPUs that this process sees, as its first."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else [str(number)] * (number + 1)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": names[number] if number < len(names) else ""}


def keep_ray_to_itself() -> None:
    """A Ray that this process starts tells nobody how it is used, unless it is asked to."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
