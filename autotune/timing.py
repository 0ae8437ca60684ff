"""Statistics of timings, knowing nothing of what is timed: samplers are functions that make a call and return its ms.

The figure is the median, with an interval that assumes nothing of the noise: two order statistics between which the
true median lies with 95%. Contenders are called in turn, so that whatever drifts does so for all of them. (When calls
are made, and on what, is kdagen.autotune.worker's.)
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

ODDS = 20  # the median is outside its interval once in so many
SLOWER = 1.25  # than the best: no finalist. Calls on an idle device differ by a few percent, far less than this
HOPELESS = 4.0  # times the best: two such calls are enough
FEWEST_SCREENED = 5  # calls: all five are above a limit that the median is not above once in 32
MOST_SCREENED = 15
SCREEN_SECONDS = 2.0  # after which FEWEST_SCREENED are enough
FEWEST_ROUNDS = 6  # of fewer calls, no two have the median between them with 95%
MOST_ROUNDS = 2000  # the interval is then 4% of the spread of calls, and what is left is not noise of calls
DRIFT = 0.01  # of the median: less is no reason to measure again, since all contenders share it


@dataclass(frozen=True)
class Interval:
    """A median of calls in ms, and between what it lies."""

    median: float
    low: float
    high: float
    calls: int

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Screened:
    """What a few calls say; `stopped`: they are so slow that no more were made."""

    ms: float
    calls: int
    stopped: bool


def interval(times: list[float]) -> Interval:
    """Of fewer than FEWEST_ROUNDS calls, all that was seen: then the confidence is less."""
    ordered, rank = sorted(times), _rank(len(times))
    return Interval(median(ordered), ordered[rank], ordered[-1 - rank], len(times))


@lru_cache
def _rank(calls: int) -> int:
    """The rank r, from 0, such that r-th least and greatest of so many calls are the interval.

    The median is below the r-th least when at most r calls are below it: as likely as at most r heads.
    """
    heads, ways, rank = 1, 1, -1
    while 2 * ways * ODDS <= 2**calls:
        rank += 1
        heads = heads * (calls - rank) // (rank + 1)
        ways += heads
    return max(0, rank)


def screen(sample: Callable[[], float], best_ms: float | None, clock=time.monotonic) -> Screened:
    """A first look: few calls, fewer of what is far from the best."""
    times: list[float] = []
    end = clock() + SCREEN_SECONDS
    while len(times) < (FEWEST_SCREENED if clock() >= end else MOST_SCREENED):
        times.append(sample())
        if best_ms and _lost(times, best_ms):
            return Screened(median(times), len(times), True)
    return Screened(median(times), len(times), False)


def _lost(times: list[float], best_ms: float) -> bool:
    if len(times) < FEWEST_SCREENED:
        return len(times) > 1 and min(times) > HOPELESS * best_ms
    return interval(times).low > SLOWER * best_ms


def race(samplers: dict[str, Callable[[], float]], seconds: float, seed: int, clock=time.monotonic) -> dict[str, list]:
    """The times of each, called in turn for so many seconds, each round in another order."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    order, shuffle, end = sorted(samplers), random.Random(seed).shuffle, clock() + seconds
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and clock() >= end:
            break
        shuffle(order)
        for name in order:
            times[name].append(samplers[name]())
    return times


def finals(samplers: dict[str, Callable[[], float]], seconds: float, seed: int) -> dict[str, Interval]:
    """The interval of each, from calls in turn."""
    return {name: interval(times) for name, times in race(samplers, seconds, seed).items()}


def drift(times: list[float]) -> str:
    """In words, how calls drifted from the first half of a race to the second; "" where they did not."""
    half = len(times) // 2
    first, second, whole = median(times[:half]), median(times[half:]), interval(times)
    if abs(first - second) <= max(whole.high - whole.low, DRIFT * whole.median):
        return ""
    return f"the median of the first half is {first:.4g} ms, of the second {second:.4g} ms"


def winner(intervals: dict[str, Interval], default: str | None, effort: Callable[[str], object]) -> str:
    """The name of the one to use: of those that tie with the lowest median, the one of least effort.

    It must lie wholly below the default; else the default wins, which is the simplest of all. Equal efforts: the lower
    median, then the name.
    """
    best = min(intervals, key=lambda name: (intervals[name].median, name))
    if default not in intervals:
        beaten = list(intervals)
    elif not (beaten := [n for n, i in intervals.items() if i.high < intervals[default].low]) or best not in beaten:
        return default
    ties = [name for name in beaten if intervals[name].overlaps(intervals[best])]
    return min(ties, key=lambda name: (effort(name), intervals[name].median, name))
