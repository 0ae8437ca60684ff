"""Checks of what tensors hold: ends of sequences, slots of a pool, finite numbers. Every message names the fix.

They read the tensors: on the CPU always, on a GPU, where that waits for it, only if `check=True`. Shapes and dtypes are
checked before, in kdagen.runtime.checks.
"""

from __future__ import annotations

from kdagen.errors import ArgumentError


def ends_of(op: str, cu_seqlens, tokens: int) -> list[int]:
    """The ends of a ragged batch's sequences, 0 first."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ArgumentError(f"{op}: cu_seqlens begins with {ends[0]}, expected 0: the first sequence's first token")
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            raise ArgumentError(
                f"{op}: cu_seqlens[{i}] = {ends[i]} comes after {ends[i - 1]}: sequences overlap; expected numbers "
                f"that do not fall, such as torch.cat([zero, lengths.cumsum(0)])"
            )
    if ends[-1] > tokens:
        raise ArgumentError(
            f"{op}: cu_seqlens ends at {ends[-1]}, but there are {tokens} tokens: expected at most as many"
        )
    return ends


def check_finite(op: str, name: str, x, gate: bool = False) -> None:
    """Refuses NaN and infinity; of a gate, whose -inf is a full reset, NaN and +inf."""
    if not x.numel() or (_below_infinity(x) if gate else _finite(x)):
        return
    bad = ~(x < float("inf")) if gate else ~x.isfinite()
    if not bad.any():  # a sum that overflowed
        return
    place = tuple(bad.nonzero()[0].tolist())
    legal = "numbers below infinity (-inf resets the state)" if gate else "finite numbers"
    raise ArgumentError(
        f"{op}: {name}{list(place)} is {float(x[place])}, expected {legal}: look at what made {name}, or "
        f"replace it by torch.nan_to_num({name})"
    )


def _finite(x) -> bool:
    """Whether all are finite for sure: one pass without a tensor of bools; a sum may overflow."""
    import math

    return math.isfinite(float(x.sum()))


def _below_infinity(x) -> bool:
    return float(x.amax()) < float("inf")


def check_slots(op: str, slots: list[list[int]], pool: int, null_below: int) -> None:
    """Refuses indices beyond the pool, and slots that two sequences or columns would write; -1 is none."""
    owner: dict[int, int] = {}
    for n, row in enumerate(slots):
        for slot in row:
            if slot >= pool:
                raise ArgumentError(
                    f"{op}: state_indices of sequence {n} hold {slot}, but state_pool has {pool} slots: expected "
                    f"indices below {pool}, or below {max(null_below, 0)} for no slot"
                )
            if slot in owner:
                raise ArgumentError(
                    f"{op}: state_indices of sequence {n} hold slot {slot}, which sequence {owner[slot]} has: "
                    f"expected each slot once, for its new state to be one"
                )
            if slot >= 0:
                owner[slot] = n


def check_accepted(op: str, accepted: list[int], slots: list[list[int]], columns: int) -> None:
    """Refuses counts that are no column of the indices, but of sequences without any slot."""
    for n, count in enumerate(accepted):
        if not 1 <= count <= columns and any(slot >= 0 for slot in slots[n]):
            raise ArgumentError(
                f"{op}: num_accepted_tokens[{n}] = {count}, expected 1..{columns}: the column of state_indices that "
                f"sequence {n} starts from, counted from 1"
            )


def check_lengths(op: str, ends: list[int], columns: int) -> None:
    """Refuses a speculative sequence of more tokens than it has slots."""
    for n, (start, end) in enumerate(zip(ends, ends[1:])):
        if end - start > columns:
            raise ArgumentError(
                f"{op}: sequence {n} has {end - start} tokens and state_indices {columns} columns, expected one column "
                f"for each token: the state after token t goes to the slot in column t"
            )
