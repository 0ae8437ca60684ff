"""Statistics of timings, on noise that is made up: seeded, skewed as that of calls is, drifting where it is said to."""

import random
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kdagen.autotune import timing
from kdagen.autotune.timing import Interval, drift, finals, interval, race, screen, winner


def noisy(ms: float, seed, spread=0.03):
    """A sampler: mostly close above a floor, now and then far above it."""
    rng = random.Random(str(seed))
    return lambda: ms * (1 + abs(rng.gauss(0, spread)) + (rng.random() < 0.05) * rng.random())


def calls(sampler, count: int) -> list[float]:
    return [sampler() for _ in range(count)]


class Clock:
    """Time that passes as samplers say."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def timed(self, ms_at):
        """A sampler whose calls take `ms_at(seconds)`."""

        def sample() -> float:
            ms = ms_at(self.now)
            self.now += ms / 1000
            return ms

        return sample


# -- intervals --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=200))
@settings(max_examples=50, deadline=None)
def test_an_interval_holds_its_median_and_is_of_what_was_seen(times):
    found = interval(times)
    assert found.low <= found.median <= found.high and {found.low, found.high} <= set(times)
    assert found.calls == len(times)


@pytest.mark.parametrize("count", [6, 7, 20, 99, 100, 1000, timing.MOST_ROUNDS])
def test_the_interval_is_the_narrowest_with_its_confidence(count):
    """P(median is outside) = 2 P(at most `rank` of `count` coins are heads)."""
    rank = timing._rank(count)
    outside, wider = (2 * sum(comb(count, i) for i in range(r + 1)) for r in (rank, rank + 1))
    assert 20 * outside <= 2**count < 20 * wider


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    rng = random.Random(0)
    true = 2**0.5  # of 1 / (1 - u)^(1/2)
    samples = ([1 / (1 - rng.random()) ** 0.5 for _ in range(30)] for _ in range(2000))
    held = sum(i.low <= true <= i.high for i in map(interval, samples)) / 2000
    assert 0.94 < held < 0.985


def test_more_calls_narrow_the_interval():
    widths = [i.high - i.low for i in (interval(calls(noisy(1.0, 3), n)) for n in (10, 100, 1000))]
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


# -- screening --------------------------------------------------------------------------------------------------------


def test_screening_without_a_best_makes_all_its_calls():
    assert screen(noisy(1.0, 0), None).calls == timing.MOST_SCREENED


@pytest.mark.parametrize(
    "factor, most",
    [(10, 2), (2, timing.FEWEST_SCREENED), (1.5, timing.FEWEST_SCREENED)],
)
def test_screening_stops_the_sooner_the_slower(factor, most):
    found = screen(noisy(factor, 1), 1.0)
    assert found.stopped and found.calls == most and found.ms >= factor


def test_screening_keeps_what_may_yet_win():
    stopped = [screen(noisy(ms, seed), 1.0).stopped for ms in (0.9, 1.0, 1.1) for seed in range(300)]
    assert not any(stopped)


def test_screening_of_long_calls_makes_few():
    clock = Clock()
    assert screen(clock.timed(lambda now: 700.0), None, clock).calls == timing.FEWEST_SCREENED


# -- finals -----------------------------------------------------------------------------------------------------------


def test_a_race_calls_each_once_a_round_in_changing_order():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "abcd"}
    times = race(samplers, seconds=0.0, seed=1)
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert {len(t) for t in times.values()} == {len(rounds)} == {timing.FEWEST_ROUNDS}
    assert all(sorted(r) == list("abcd") for r in rounds) and len(set(map(tuple, rounds))) > 1


def test_a_race_is_a_function_of_its_seed():
    def run(seed):
        order = []
        race({name: lambda name=name: order.append(name) or 1.0 for name in "abcd"}, 0.0, seed)
        return order

    assert run(1) == run(1) != run(2)


def test_a_race_lasts_as_long_as_said_but_for_its_last_round():
    clock = Clock()
    times = race({"a": clock.timed(lambda now: 30.0), "b": clock.timed(lambda now: 20.0)}, 2.0, 0, clock)
    assert len(times["a"]) == 40 and clock.now == pytest.approx(2.0)


def test_a_race_ends_where_more_calls_tell_nothing_more():
    assert {i.calls for i in finals({"a": lambda: 1.0, "b": lambda: 1.0}, 60, 0).values()} == {timing.MOST_ROUNDS}


def test_a_race_is_fair_where_one_after_the_other_is_not():
    """A device that slows by a fifth as it heats up: who is called first would win by that much."""
    sequential, together = Clock(), Clock()
    slowing = lambda clock, ms: clock.timed(lambda now: ms * (1 + min(now, 4.0) / 20))  # noqa: E731
    first = interval(calls(slowing(sequential, 1.03), 2000))
    second = interval(calls(slowing(sequential, 1.0), 2000))
    assert first.high < second.low  # the slower one seems to be the faster
    times = race({"slower": slowing(together, 1.03), "faster": slowing(together, 1.0)}, 4.0, 0, together)
    ratios = [a / b for a, b in zip(times["slower"], times["faster"])]
    assert 1.02 < interval(ratios).low <= interval(ratios).high < 1.04
    assert interval(times["faster"]).median < interval(times["slower"]).median


def test_drift_is_told_from_noise():
    steady = [drift(calls(noisy(1.0, seed), 200)) for seed in range(200)]
    assert sum(map(bool, steady)) < 20
    step = [drift(calls(noisy(1.0, seed), 100) + calls(noisy(1.1, -seed), 100)) for seed in range(50)]
    assert all(step) and "the median of the first half is 1.0" in step[0] and "of the second 1.1" in step[0]


def test_drift_that_moves_no_ranking_is_none():
    assert not drift([1.0] * 100 + [1.005] * 100)


# -- winners ----------------------------------------------------------------------------------------------------------


def between(low, high, median=None) -> Interval:
    return Interval(median or (low + high) / 2, low, high, 100)


EFFORT = {"default": 0, "simple": 1, "odd": 3}.get


@pytest.mark.parametrize(
    "intervals, expected",
    [
        ({"default": between(1.0, 1.1)}, "default"),
        ({"default": between(1.0, 1.1), "odd": between(0.8, 0.9)}, "odd"),
        ({"default": between(1.0, 1.1), "odd": between(0.8, 1.0)}, "default"),  # touches
        ({"default": between(1.0, 1.1), "odd": between(1.2, 1.3)}, "default"),
        ({"default": between(1.0, 1.1), "odd": between(0.8, 0.9), "simple": between(0.85, 0.95)}, "simple"),
        ({"default": between(1.0, 1.1), "odd": between(0.8, 0.9), "simple": between(0.91, 0.95)}, "odd"),
        # One that ties with the best, and with the default too, does not take the win from the best.
        ({"default": between(1.0, 1.1), "odd": between(0.8, 0.95), "simple": between(0.9, 1.05)}, "odd"),
        ({"odd": between(0.8, 0.9), "simple": between(0.85, 0.95)}, "simple"),  # the default is broken
        ({"default": between(1.0, 1.1), "odd": between(0.8, 0.9), "other": between(0.8, 0.9)}, "odd"),  # by name
    ],
)
def test_the_winner_is_the_simplest_that_is_sure_to_beat_the_default(intervals, expected):
    effort = lambda name: EFFORT(name, 3)  # noqa: E731
    assert winner(intervals, "default", effort) == expected
    assert winner(dict(reversed(intervals.items())), "default", effort) == expected


def test_noise_seldom_beats_the_default():
    """Six contenders that are all the same: one that is not the default wins less than once in 20."""
    false = 0
    for seed in range(400):
        samplers = {name: noisy(1.0, f"{seed} {name}") for name in ("default", *"abcde")}
        intervals = {name: interval(calls(sampler, 60)) for name, sampler in samplers.items()}
        false += winner(intervals, "default", lambda name: name != "default") != "default"
    assert false < 20


def test_a_gain_of_a_twentieth_is_found():
    found = 0
    for seed in range(100):
        samplers = {name: noisy(1.0, f"{seed} {name}") for name in ("default", *"abcd")} | {"best": noisy(0.95, seed)}
        intervals = {name: interval(calls(sampler, 60)) for name, sampler in samplers.items()}
        found += winner(intervals, "default", lambda name: name != "default") == "best"
    assert found > 95
