"""Models that run on the generated ops: Kimi Linear, its variants, and any recurrence of yours in its place.

Names are imported when first used. Nothing in the compiler knows this package; it uses kdagen as any program would.
"""

from __future__ import annotations

import importlib

_WHERE = {
    "Config": "config",
    "LinearAttention": "config",
    "KimiLinear": "model",
    "Cache": "cache",
    "generate": "generation",
    "prefill": "generation",
}

__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module 'kdagen.models' has no attribute '{name}'")
    return getattr(importlib.import_module(f"kdagen.models.{_WHERE[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})
