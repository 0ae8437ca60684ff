"""The order in which a chunk's ops run: each as soon as it leaves the fewest bytes in use.

Tiles are what takes room: arguments, the results of products, operands formed for them. Other values are expressions,
so an op that reads one reads the tiles behind it. A greedy choice, the same for every recurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kdagen.ir.tensor import Decay, Map, Op, Value, reads, writes

Size = Callable[[Value], int]  # bytes of a value's tile


def least_in_use(ops: Sequence[Op], before: Sequence[Op], size: Size, given: Sequence[Value] = ()) -> tuple[Op, ...]:
    """`ops` in an order that keeps few tiles in use at once; `before` holds those that have run."""
    behind = tiles_behind((*before, *ops))
    read = {op: frozenset().union(*(behind(v) for v in reads(op))) for op in ops}
    waiting, made = list(ops), {v for op in before for v in writes(op)} | set(given)
    live = {v for op in before for v in writes(op) if v in behind(v)} | set(given)
    order: list[Op] = []
    while waiting:
        ready = [op for op in waiting if all(v in made for v in reads(op))]
        op = min(ready, key=lambda op: _growth(op, waiting, read, live, behind, size))
        waiting.remove(op)
        order.append(op)
        made |= set(writes(op))
        live |= {v for v in writes(op) if v in behind(v)}
        live &= frozenset().union(*(read[other] for other in waiting)) if waiting else set()
    return tuple(order)


def _growth(op: Op, waiting: list[Op], read: dict, live: set[Value], behind, size: Size) -> int:
    """By how many bytes what is in use grows when the op has run, counting what it frees; expressions come first."""
    new = sum(size(v) for v in writes(op) if v in behind(v))
    still = frozenset().union(*(read[other] for other in waiting if other is not op), frozenset())
    return new - sum(size(v) for v in live & read[op] - still)


def tiles_behind(ops: Sequence[Op]) -> Callable[[Value], frozenset[Value]]:
    """The tiles that reading a value reads: its own, or those of the values in its expression."""
    made_by = {v: op for op in ops for v in writes(op)}
    known: dict[Value, frozenset[Value]] = {}

    def behind(value: Value) -> frozenset[Value]:
        if value not in known:
            op = made_by.get(value)
            lazy = isinstance(op, Map | Decay)
            known[value] = frozenset().union(*map(behind, reads(op))) if lazy else frozenset((value,))
        return known[value]

    return behind
