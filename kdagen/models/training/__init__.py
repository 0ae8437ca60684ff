"""Training models: a loop with checkpoints that loses nothing, one process or several, and synthetic tasks.

The examples train_synthetic.py and train_bytes.py are programs on it. Names are imported when first used.
"""

from __future__ import annotations

import importlib

_WHERE = {
    "Settings": "settings",
    "train": "loop",
    "Run": "loop",
    "Processes": "parallel",
    "draw": "plot",
    "TASKS": "tasks",
    "IGNORED": "tasks",
}

__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module 'kdagen.models.training' has no attribute '{name}'")
    return getattr(importlib.import_module(f"kdagen.models.training.{_WHERE[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})
