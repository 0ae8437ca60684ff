"""Waits for asynchronous products: as late as the first statement that needs them, and no later."""

from __future__ import annotations

from itertools import dropwhile, takewhile

from kdagen.ir.tile import Gemm, Statement, Wait, base, reads, writes


def insert_waits(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """`body` with its products asynchronous: a Wait stands before each statement that would otherwise meet an
    unfinished accumulator or overwrite an operand in use; all are finished at the end.

    ptxas does not see that the end of the loop's last round had waited: where an accumulator from there is touched with
    products in flight, it would wait for these. A wait for nothing as the first statement tells it.
    """
    pending: list[Gemm] = []
    result: list[Statement] = []
    for statement in body:
        keep = _unfinished_after(statement, pending)
        if keep < len(pending):
            result.append(Wait(keep))
            pending = pending[len(pending) - keep :]
        result.append(statement)
        if isinstance(statement, Gemm):
            pending.append(statement)
    first = [Wait(0)] if _meets_last_round(result) else []
    return (*first, *result, Wait(0)) if pending else (*first, *result)


def _meets_last_round(body: list[Statement]) -> bool:
    """Whether registers that the last round's products filled are touched behind a product and before any wait."""
    filled = {s.acc for s in body if isinstance(s, Gemm)}
    before_wait = list(takewhile(lambda s: not isinstance(s, Wait), body))
    behind = list(dropwhile(lambda s: not isinstance(s, Gemm), before_wait))
    return any(filled & (reads(s) | writes(s)) for s in behind if not isinstance(s, Gemm))


def _unfinished_after(statement: Statement, pending: list[Gemm]) -> int:
    """How many of the last products may go on while the statement runs; they finish in order."""
    touched, written = reads(statement) | writes(statement), writes(statement)
    if isinstance(statement, Gemm):  # products queue behind one another: only their operand `a` must be there
        touched = {base(statement.a)}
        written = set()
    for age, gemm in enumerate(reversed(pending)):
        if gemm.acc in touched or {base(gemm.a), base(gemm.b)} & written:
            return age
    return len(pending)
