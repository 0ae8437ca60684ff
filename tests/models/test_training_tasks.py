"""The synthetic tasks against plain definitions of what they ask, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdagen.models.training.tasks import IGNORED, MQAR, TASKS, Palindrome, Stack


def rows(task, step: int = 0, size: int = 8):
    """Each sequence as tokens, the last target included, and its targets."""
    ids, targets = task.batch(step, size)
    assert ids.shape == targets.shape == (size, task.length) and ids.dtype == targets.dtype == torch.int64
    assert int(ids.min()) >= 0 and int(ids.max()) < task.vocabulary and int(targets.max()) < task.vocabulary
    return [(a.tolist(), b.tolist()) for a, b in zip(ids, targets)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(length=st.integers(2, 40), symbols=st.integers(2, 30), step=st.integers(0, 1 << 40))
def test_palindrome(length, symbols, step):
    for ids, targets in rows(Palindrome(length, symbols), step):
        at = ids.index(symbols)
        said, told = ids[:at], targets[at:]
        assert told == said[::-1][: len(told)] and len(told) == length // 2
        assert targets[:at] == [IGNORED] * at
        assert ids[at + 1 :] == told[:-1], "each answer is read before the next is asked for"
        assert symbols not in said and len(told) >= len(said) - 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pairs=st.integers(1, 12), spare=st.integers(0, 9), step=st.integers(0, 1 << 40))
def test_mqar(pairs, spare, step):
    symbols = max(2, pairs + spare)
    for ids, targets in rows(MQAR(4 * pairs, symbols), step):
        memory = dict(zip(ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]))
        assert len(memory) == pairs and max(memory) < symbols <= min(memory.values())
        asked = ids[2 * pairs :: 2]
        assert sorted(asked) == sorted(memory)
        assert targets[2 * pairs :: 2] == [memory[key] for key in asked]
        assert ids[2 * pairs + 1 :: 2] == targets[2 * pairs :: 2]
        assert targets[: 2 * pairs] == [IGNORED] * 2 * pairs and set(targets[1::2]) == {IGNORED}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(length=st.integers(6, 90), symbols=st.integers(2, 20), stacks=st.integers(1, 64), step=st.integers(0, 1 << 40))
def test_stack(length, symbols, stacks, step):
    """Executed: what is popped is what was pushed last onto that stack, and no stack is popped empty."""
    pop, push = symbols + stacks, symbols + stacks + 1
    for ids, targets in rows(Stack(length, symbols, stacks=stacks), step):
        held = [[] for _ in range(stacks)]
        for at in range(0, length, 3):
            operation, *rest = ids[at : at + 3]
            assert operation in (pop, push) and targets[at] == IGNORED
            if not rest:
                continue
            stack = held[rest[0] - symbols]
            if operation == push:
                assert targets[at + 1 : at + 3] == [IGNORED] * len(rest)
                stack += rest[1:]
                continue
            assert targets[at + 1] == stack.pop() and set(targets[at + 2 : at + 3]) <= {IGNORED}
            assert rest[1:] in ([], [targets[at + 1]])
        assert all(0 <= x < symbols for stack in held for x in stack)


def test_half_of_the_operations_pop():
    ids, targets = Stack(600, 16, stacks=64).batch(0, 16)
    pops = (ids[:, ::3] == 16 + 64).float().mean()
    assert 0.4 < pops < 0.5
    assert (targets != IGNORED).sum() == (ids[:, :-1:3] == 16 + 64).sum()


@pytest.mark.parametrize("name", TASKS)
def test_batches_come_from_seed_and_step(name):
    task = TASKS[name]
    first = task(24, 16).batch(5, 4)
    assert all(map(torch.equal, task(24, 16).batch(5, 4), first))
    assert not torch.equal(task(24, 16).batch(6, 4)[0], first[0])
    assert not torch.equal(task(24, 16, seed=1).batch(5, 4)[0], first[0])
    assert len({tuple(row.tolist()) for row in first[0]}) == 4
