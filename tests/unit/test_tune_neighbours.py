"""Neighbours: each other value of each field, by what is nearest to the centre among those there are."""

from kdagen.autotune.neighbours import neighbours


def test_a_value_is_reached_by_changing_as_little_as_possible():
    others = {"same": {"a": 1, "b": 1}, "one": {"a": 2, "b": 1}, "two": {"a": 2, "b": 2}, "far": {"a": 3, "b": 2}}
    assert neighbours({"a": 1, "b": 1}, others, lambda k: (k,)) == {("a", 2): "one", ("b", 2): "far", ("a", 3): "far"}


def test_of_those_equally_near_the_first_by_rank_whatever_their_order():
    others = {i: {"a": 2, "b": i} for i in range(2, 6)}
    for order in (others, dict(reversed(others.items()))):
        assert neighbours({"a": 1, "b": 1}, order, lambda k: (-k,))["a", 2] == 5


def test_what_is_the_same_is_no_neighbour():
    assert neighbours({"a": 1}, {"x": {"a": 1}}, lambda k: (k,)) == {}
