"""Packages whose names are imported when first used, so that importing the package alone costs nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping


def attributes(package: str, where: Mapping[str, str | tuple[str, str]]) -> tuple[Callable, Callable]:
    """`__getattr__` and `__dir__` of a package whose names are in `where`: a module, or (module, its name there)."""

    def get(name: str):
        if name not in where:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        found = where[name]
        module, attribute = found if isinstance(found, tuple) else (found, name)
        return getattr(importlib.import_module(module), attribute)

    return get, lambda: sorted(where)
