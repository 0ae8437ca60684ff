"""Recurrences of the field, one short file each: documentation as much as code. None is special to the compiler."""

from __future__ import annotations

import importlib

from kdagen.errors import RecurrenceError

# Where each recurrence stands: several variants may share a file.
_FILES = {
    "linear_attention": "linear_attention",
    "retnet": "retnet",
    "mamba2": "mamba2",
    "gla": "gla",
    "hgrn2": "hgrn2",
    "deltanet": "deltanet",
    "gated_deltanet": "gated_deltanet",
    "kda": "kda",
    "kda_softplus": "kda",
    "kda_bounded": "kda",
    "kda_clamped": "kda",
    "comba": "comba",
    "gdn2": "gdn2",
    "deltaproduct": "deltaproduct",
    "dplr": "dplr",
    "rwkv7": "rwkv7",
    "longhorn": "longhorn",
}


def names() -> tuple[str, ...]:
    """What there is, without importing any of it."""
    return tuple(_FILES)


def get(name: str):
    """The recurrence called `name`."""
    if name not in _FILES:
        raise RecurrenceError(
            f"no recurrence '{name}' in the zoo: expected one of {', '.join(_FILES)}, or file.py:name"
        )
    return getattr(importlib.import_module(f"kdagen.zoo.{_FILES[name]}"), name)


def hints(name: str) -> dict:
    """Functions that draw arguments whose role alone does not tell what is natural (see kdagen.zoo.inputs)."""
    return getattr(importlib.import_module(f"kdagen.zoo.{_FILES[name]}"), "SAMPLE", {}) if name in _FILES else {}


def sample(canonical, shape: tuple[int, int, int, int, int], gate: str = "mild", seed: int = 0) -> dict:
    """Float64 sample inputs for any canonical form and shape (B, T, H, K, V)."""
    from kdagen.zoo.inputs import sample

    return sample(canonical, shape, gate, seed)
