"""Generating: greedy and drawn, ragged prompts, stop tokens, going on from a cache."""

import pytest
import torch
from small_models import model, tokens

PROMPTS = [tokens(n, seed=n).tolist() for n in (3, 40, 17)]


@pytest.fixture(scope="module")
def small():
    return model()


@torch.no_grad()
def greedy(small, prompt: list, count: int) -> list:
    """Token by token without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(small(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("chunk", [2048, 7])
def test_ragged_prompts_are_as_each_alone(small, chunk):
    found = small.generate(PROMPTS, 8, chunk=chunk)
    assert found == [greedy(small, prompt, 8) for prompt in PROMPTS]


def test_stop_tokens(small):
    whole = small.generate(PROMPTS, 8)
    stop = whole[1][2]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    seen = []
    assert small.generate(PROMPTS, 8, stop=[stop], on_tokens=seen.append) == expected
    assert [[new[n] for new in seen if new[n] is not None] for n in range(3)] == expected
    assert small.generate(PROMPTS[1:2], 8, stop=[stop]) == [expected[1]]  # ends when all have ended
    assert small.generate(PROMPTS, 0) == [[], [], []]


def test_drawing(small):
    draw = lambda seed, **options: small.generate(PROMPTS, 12, temperature=1.0, seed=seed, **options)  # noqa: E731
    assert draw(3) == draw(3) != draw(4)
    assert draw(3, top_p=1e-6) == small.generate(PROMPTS, 12)  # the likeliest token alone


def test_how_often_tokens_are_drawn():
    from kdagen.models.generation import chosen

    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draw = torch.Generator().manual_seed(0)
    count = lambda **options: torch.bincount(  # noqa: E731
        chosen(p.log().expand(20000, 4), generator=draw, **options), minlength=4
    )
    assert ((count(temperature=1.0, top_p=1.0) / 20000 - p).abs() < 0.02).all()
    expected = torch.tensor([0.5, 0.3, 0.0, 0.0]) / 0.8
    assert ((count(temperature=1.0, top_p=0.75) / 20000 - expected).abs() < 0.02).all()
    cold = p**2 / (p**2).sum()
    assert ((count(temperature=0.5, top_p=1.0) / 20000 - cold).abs() < 0.02).all()


def test_going_on_from_a_cache(small):
    expected = small.generate(PROMPTS, 10)
    cache = small.new_cache(3)
    first = small.generate(PROMPTS, 4, cache=cache)
    rest = small.generate([row[-1:] for row in first], 6, cache=cache)
    assert [a + b for a, b in zip(first, rest)] == expected


def test_a_cache_of_sequences_that_have_ended(small):
    """It holds each up to its end, and nothing of what the others went on with."""
    whole = small.generate(PROMPTS, 9)
    counts, cache = (2, 9, 4), small.new_cache(3)
    found = small.generate(PROMPTS, 9, cache=cache, stop=lambda n, row: len(row) == counts[n])
    assert found == [row[:count] for row, count in zip(whole, counts)]
    assert cache.lengths == [len(p) + count - 1 for p, count in zip(PROMPTS, counts)]
    rest = small.generate([row[-1:] for row in found], 3, cache=cache)
    assert rest == [row[:3] for row in small.generate([p + row for p, row in zip(PROMPTS, found)], 3)]


def test_what_is_said_of_prompts(small):
    seen = []
    small.generate(PROMPTS, 1, chunk=7, on_prompt=seen.append)
    assert seen == [3 + 7 + 7, 14, 10, 7, 7, 5] and sum(seen) == sum(map(len, PROMPTS))
