"""Which schedule the CPU backend runs a call by, and torch's threads meanwhile.

A schedule is as tuned for this machine (kdagen.runtime.tuned), unless the caller pins one. What it means for a call is
in cpu and cpu_decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kdagen.schedule import CpuSchedule

_pinned: ContextVar[CpuSchedule | None] = ContextVar("kdagen_cpu_schedule", default=None)


@contextmanager
def pinned(schedule: CpuSchedule) -> Iterator[None]:
    """All calls of ops on CPU tensors that this thread makes inside run by one schedule, whatever was tuned.

    A backward must run by the schedule of its forward: call it inside too.
    """
    token = _pinned.set(schedule)
    try:
        yield
    finally:
        _pinned.reset(token)


def schedule_of(op, call, purpose: str) -> CpuSchedule:
    """The schedule of an op's call; the same for forward and backward, which see the same sizes."""
    from kdagen.runtime import tuned

    return _pinned.get() or tuned.cpu_schedule(op, call, purpose)


def pinned_schedule() -> CpuSchedule | None:
    """That of this thread's calls, if they are pinned to one."""
    return _pinned.get()


@contextmanager
def at_most(threads: int) -> Iterator[None]:
    """Torch takes at most so many threads inside, and never more than it has; 0 for as many as it has.

    With OpenMP, torch's way on Linux and Windows, the number is the calling thread's own: calls of several threads do
    not disturb each other. A thread that first uses torch meanwhile starts with as many. Changing it twice takes 0.2
    us where this was measured.
    """
    import torch

    most = torch.get_num_threads()
    if not 0 < threads < most:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(most)
