"""One timed call on a GPU, by its own events: as the device alone would run it, as called, or as a graph's replay.

Knows nothing of recurrences: what is timed takes one set of inputs. Sets are used in turn, so that the L2 cache holds
none of the next. Statistics of many calls are kdagen.autotune.timing's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kdagen.autotune.sweep import Policy

AHEAD = 4_000_000  # clock cycles of sleep, 2 ms or so, in which the host issues a whole call
COLD = 3  # the sets of inputs hold this many times the L2 cache, together
MOST_SETS = 16
WARM_UPS = 3


@dataclass(frozen=True)
class Call:
    """What is timed, perhaps after what is not: `run` takes what `before` makes of a set of inputs."""

    run: Callable
    before: Callable = staticmethod(lambda given: given)
    ahead: int = AHEAD  # for a host that takes long to issue it: more

    def __call__(self, given):
        return self.run(self.before(given))


def sets_needed(bytes_a_set: int, l2_bytes: int) -> int:
    """How many sets of inputs, used in turn, make each one cold again before its next use."""
    if bytes_a_set >= COLD * l2_bytes:
        return 1
    return max(1, min(MOST_SETS, -(-COLD * l2_bytes // max(1, bytes_a_set)) + 1))


def timed(call: Callable | Call, given, mode: str) -> tuple:
    """Events about one call: the time between them is there once the device has come so far."""
    import torch

    call = call if isinstance(call, Call) else Call(call)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    made = call.before(given)
    if mode == "eager":
        torch.cuda.synchronize()
    else:
        torch.cuda._sleep(call.ahead)
    start.record()
    call.run(made)
    end.record()
    return start, end


def warm_up(call: Callable, sets: Sequence) -> None:
    """A few calls, for what is made at a first one."""
    import torch

    for given in itertools.islice(itertools.cycle(sets), WARM_UPS):
        call(given)
    torch.cuda.synchronize()


def replays(call: Callable, sets: Sequence) -> Callable:
    """A callable that replays the graph of `call` on one of the sets."""
    import torch

    graphs = {}
    for given in sets:
        graphs[id(given)] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(given)
    return lambda given: graphs[id(given)].replay()


def sampler(
    call: Callable, sets: Sequence, policy: Policy, turn: Iterator[int], clear: Callable = lambda: None
) -> Callable[[], float]:
    """A function that makes one timed call and returns its ms; `turn` goes on whichever sampler has it.

    Cold: on the next set, after `clear`, for sets that all fit into the cache. Warm: after the same call, untimed.
    """
    import torch

    warm_up(call, sets)
    run = replays(call, sets) if policy.mode == "graph" else call
    before = run if policy.cache == "warm" else lambda given: clear()

    def prepared(given):
        before(given)
        return given

    def sample() -> float:
        start, end = timed(Call(run, prepared), sets[next(turn) % len(sets)], policy.mode)
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    sample()
    return sample
