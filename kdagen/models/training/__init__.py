"""Training models: a loop with checkpoints that loses nothing, one process or several, and synthetic tasks.

The examples train_synthetic.py and train_bytes.py are programs on it. Names are imported when first used.
"""

from __future__ import annotations

from kdagen.lazy import attributes

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
__getattr__, __dir__ = attributes(__name__, {name: f"{__name__}.{module}" for name, module in _WHERE.items()})
