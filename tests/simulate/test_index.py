"""The index kernel alone: which tokens lie in which slots, for any sequences, and for offsets that are no offsets."""

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdagen.build import adapter
from kdagen.codegen.tilelang import render
from kdagen.ir.tile import verify
from kdagen.lower.rows import carried, lower_index, most_tokens, of_chunk, of_segment, of_sequence, segments
from kdagen.runtime.capacities import NEVER, capacities
from kdagen.simulate.program import Simulator
from kdagen.simulate.run import GARBAGE

KINDS = [(16, 0), (16, 1), (32, 2), (64, 8)]  # tokens a chunk, chunks a segment; 0 for inference
INT32 = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.sampled_from([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1, 2**31 - 16, 2**30, 2**27]),
    st.integers(-100, 300),
)


@cache
def kernel(chunk, segment, split=0):
    return verify(lower_index("some", chunk, segment, split))


@cache
def program(*kind):
    source = render(kernel(*kind))
    return Simulator(adapter.trace(source.text, source.name, f"<{source.name} {kind}>"), check_races=False)


def run(chunk, segment, cu_seqlens, tokens, check_races=False):
    """(chunk_rows, segments or None, elements written out of bounds)."""
    sizes = capacities(tokens, len(cu_seqlens) - 1, chunk, {"segment": segment} if segment else {})
    tables = [np.full((sizes[n], 2), GARBAGE, np.int32) for n in ("NC", "NG") if n in sizes]
    simulator = program(chunk, segment)
    simulator.check_races = check_races
    simulator(np.array(cu_seqlens, np.int32), *tables)
    return tables[0], tables[1] if segment else None, simulator.statistics.writes_out_of_bounds


def slots(cu_seqlens, chunk, segment):
    """({slot of a chunk: (first row, rows)}, {slot of a segment: (first slot, chunks)}), counted out one by one."""
    chunks, segments = {}, {}
    for s, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
        first, own = start // chunk + s, range(start, end, chunk)
        for i, row in enumerate(own):
            assert first + i not in chunks
            chunks[first + i] = row, min(chunk, end - row)
        for i in range(0, len(own), segment or len(own) or 1):
            slot = start // (chunk * (segment or 1)) + s + i // (segment or 1)
            assert not segment or slot not in segments
            segments[slot] = first + i, min(segment, len(own) - i)
    return chunks, segments


def check(cu_seqlens, padding, chunk, segment):
    found, segments, outside = run(chunk, segment, cu_seqlens, cu_seqlens[-1] + padding, check_races=True)
    expected, expected_segments = slots(cu_seqlens, chunk, segment)
    assert not outside
    assert {i: tuple(row) for i, row in enumerate(found.tolist()) if row[1]} == expected
    if segment:
        assert {i: tuple(row) for i, row in enumerate(segments.tolist()) if row[1]} == expected_segments


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 200), st.just(16)), min_size=1, max_size=12),
    padding=st.integers(0, 70),
    kind=st.sampled_from(KINDS),
)
def test_slots_are_those_counted_out_one_by_one(lengths, padding, kind):
    check([0, *itertools.accumulate(lengths)], padding, *kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[0] * 300, [9000], [1] * 200, [0] * 150 + [5000] + [0] * 150, [2**20]])
def test_more_slots_than_threads(lengths, kind):
    check([0, *itertools.accumulate(lengths)], 100, *kind)


@settings(max_examples=150, deadline=None)
@given(cu_seqlens=st.lists(INT32, min_size=2, max_size=8), tokens=st.integers(0, 300), kind=st.sampled_from(KINDS))
def test_whatever_offsets_say_nothing_outside_the_tables_is_written(cu_seqlens, tokens, kind):
    assert not run(*kind, cu_seqlens, tokens)[2]


class Integers:
    """T.max and so on, of integers that overflow or do not."""

    max, min = staticmethod(max), staticmethod(min)

    @staticmethod
    def if_then_else(condition, yes, no):
        return yes if condition else no

    @staticmethod
    def truncdiv(a, b):
        return type(a)(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


class Anywhere:
    """A table with one and the same entry at each index."""

    def __init__(self, entry):
        self.entry = entry

    def __getitem__(self, _):
        return self.entry


def exactly(lets, **given):
    """What is bound from `given`, one after the other."""
    for name, text in lets:
        given[name] = int(eval(text, {"T": Integers}, dict(given)))
    return given


def names(lets, **given):
    """What is bound from `given`, one after the other; the same in integers of 32 bits as in exact ones."""
    exact = dict(given)
    narrow = {n: narrowed(x) for n, x in given.items()}
    with np.errstate(over="raise"):
        for name, text in lets:
            exact[name], narrow[name] = (eval(text, {"T": Integers}, dict(env)) for env in (exact, narrow))
            assert int(narrow[name]) == exact[name], f"{name} = {text} overflows"
    return exact


def split_index(chunk, split, cu_seqlens, tokens, check_races=False):
    """(sequence of each segment slot, elements written out of bounds) where sequences are split."""
    sizes = capacities(tokens, len(cu_seqlens) - 1, chunk, {"split": split})
    found = [np.full(shape, GARBAGE, np.int32) for shape in ((sizes["NC"], 2), (sizes["NG"],))]
    simulator = program(chunk, 0, split)
    simulator.check_races = check_races
    simulator(np.array(cu_seqlens, np.int32), *found)
    return found[1], simulator.statistics.writes_out_of_bounds


@pytest.mark.parametrize("lengths", [[5, 0, 100, 1, 33, 64], [0] * 300, [9000], [1] * 200, [0] * 50 + [5000, 0]])
@pytest.mark.parametrize("split", [1, 3])
def test_segments_know_their_sequence(split, lengths):
    """Each chunk of each sequence is in the segments of just one block."""
    ends, taken = [0, *itertools.accumulate(lengths)], []
    owners, outside = split_index(16, split, ends, ends[-1] + 40, check_races=True)
    slots_, lets = slots(ends, 16, 0)[0], segments(16, split).lets
    for segment, owner in enumerate(owners):
        assert 0 <= owner < len(lengths)
        given_ = dict(cu_seqlens=ends, sequence_of=owners, segment=segment, N1=len(ends), tokens=ends[-1] + 40)
        env = exactly(lets, **given_)
        taken += [env["first"] + env["skipped"] + n for n in range(env["chunks"])]
        followed = exactly(segments(16, split, followed=True).lets, **given_)["chunks"]
        assert followed == (split if env["left"] > split else 0)
    assert not outside and sorted(taken) == sorted(slots_)


@settings(max_examples=100, deadline=None)
@given(cu_seqlens=st.lists(INT32, min_size=2, max_size=8), tokens=st.integers(0, 300))
def test_whatever_offsets_say_no_segment_outside_the_table_is_written(cu_seqlens, tokens):
    assert not split_index(16, 2, cu_seqlens, tokens)[1]


def narrowed(x):
    """In 32 bits."""
    if isinstance(x, Anywhere):
        return Anywhere(np.int32(x.entry))
    return np.asarray(x, np.int32) if isinstance(x, list) else np.int32(x)


BIG = st.integers(1, 2**31 - 65)  # tokens


@settings(max_examples=300, deadline=None)
@given(a=INT32, z=INT32, tokens=st.one_of(BIG, st.integers(1, 300)), b=st.integers(0, 3), kind=st.sampled_from(KINDS))
def test_bounds_that_blocks_form_do_not_overflow_and_lie_within(a, z, tokens, b, kind):
    """Of every kernel, in 32 bits: no row before or after the tokens, no slot of none, no loop longer than these."""
    chunk, segment = kind
    sizes = capacities(tokens, 4, chunk, {"segment": segment or 1})
    offsets = [0] * b + [a, z] + [0] * (3 - b)
    given_ = dict(cu_seqlens=offsets, b=b, N1=5, N=4, NC=sizes["NC"])
    index = names(kernel(chunk, segment).lets, **given_)
    assert 0 <= index["steps"] <= -(-sizes["NC"] // 128)
    scan = names(
        [*of_sequence(chunk), ("returned", f"T.truncdiv(start // {chunk}, every)")],
        **given_,
        tokens=tokens,
        every=NEVER,
    )
    blind = names([*most_tokens(chunk), *of_sequence(chunk)], **given_)
    for found in (scan, blind):
        assert min(found["start"], found["length"]) >= 0 and found["start"] + found["length"] <= found["tokens"]
        assert found["chunks"] == 0 or 0 <= found["first"] <= found["first"] + found["chunks"] <= sizes["NC"]
        last = found["start"] // (chunk * (segment or 1)) + b + -(-found["chunks"] // (segment or 1))
        assert found["chunks"] == 0 or last <= sizes["NG"]
    assert scan["tokens"] == tokens <= blind["tokens"] < tokens + chunk


@settings(max_examples=300, deadline=None)
@given(
    a=INT32,
    z=INT32,
    tokens=st.one_of(BIG, st.integers(1, 300)),
    b=st.integers(0, 3),
    owner=st.one_of(INT32, st.integers(0, 3)),
    split=st.sampled_from([1, 3, 8, 2**16]),
    chunk=st.sampled_from([16, 64]),
    share=st.floats(0, 1),
)
def test_bounds_of_segments_do_not_overflow_and_lie_within(a, z, tokens, b, owner, split, chunk, share):
    """Of blocks that take a segment, whoever's it is said to be, and of those that carry a state over them."""
    sizes = capacities(tokens, 4, chunk, {"split": split})
    offsets = dict(cu_seqlens=[0] * b + [a, z] + [0] * (3 - b), N1=5, NC=sizes["NC"], NG=sizes["NG"])
    segment = int(share * (sizes["NG"] - 1))
    env = dict(offsets, segment=segment, sequence_of=Anywhere(owner))
    for followed in (False, True):
        found = names([*most_tokens(chunk, "(N1 - 1)"), *segments(chunk, split, followed).lets], **env)
        assert 0 <= found["b"] < 4 and 0 <= found["chunks"] <= split
        slot = found["first"] + found["skipped"]
        assert found["chunks"] == 0 or 0 <= slot <= slot + found["chunks"] <= sizes["NC"]
        assert found["chunks"] == 0 or found["skipped"] * chunk < found["length"]
    for pieces in (1, 4):
        found = names(carried(chunk, split, pieces).lets, **offsets, b=b)
        assert 0 <= found["first"] <= found["last"] < sizes["NG"]
        assert found["chunks"] == (found["last"] - found["first"]) * pieces


@settings(max_examples=200, deadline=None)
@given(row=INT32, rows=INT32, tokens=BIG, kind=st.sampled_from(KINDS))
def test_no_entry_of_a_table_leads_outside(row, rows, tokens, kind):
    chunk, segment = kind[0], kind[1] or 1
    slots = capacities(tokens, 4, chunk, {})["NC"]
    table = np.array([[row, rows]], np.int32)
    (first, at), (last, count) = of_chunk()
    env = {"T": Integers, "tokens": tokens, "n": 0, "chunk_rows": table.astype(object)}
    env[first] = eval(at, env)
    assert 0 <= env[first] <= tokens and env[first] + eval(count, env) <= tokens
    env = {"T": Integers, "NC": slots, "segment": 0, "segments": table.astype(object)}
    (first, at), (last, count) = of_segment(segment)
    env[first] = eval(at, env)
    chunks = eval(count, env)
    assert env[first] >= 0 and chunks <= segment and env[first] + chunks <= slots
