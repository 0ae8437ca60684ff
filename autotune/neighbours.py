"""Neighbours of a schedule among others, for descents along its fields, by the model or by measurement."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


def neighbours(centre: dict, others: Mapping[Key, dict], rank: Callable[[Key], tuple]) -> dict[tuple, Key]:
    """By (field, value), for each value of a field that is not the centre's: of those that have it the one nearest.

    Where none differs in that field alone, others change with it: a wider tile wants more threads. Of those that are
    equally near the first by rank.
    """
    nearest: dict[tuple, tuple] = {}
    found: dict[tuple, Key] = {}
    for key, fields in others.items():
        changed = [field for field in centre if fields[field] != centre[field]]
        for field in changed:
            place = (len(changed), rank(key))
            at = (field, fields[field])
            if at not in nearest or place < nearest[at]:
                nearest[at], found[at] = place, key
    return found
