"""Synthetic tasks that tell mixers apart: palindrome, associative recall, stacks (Kimi Linear report, section 5.1).

A batch is a function of (seed, step): tokens [B, T], and for each the token that should follow, or IGNORED where it
cannot be known. Loss and accuracy are over the others. Every step has fresh sequences, so training accuracy is that on
sequences never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from kdagen.errors import ArgumentError

IGNORED = -100  # of torch's cross entropy


@dataclass(frozen=True)
class Task:
    """What all tasks have: sequences of `length` tokens over `symbols` symbols (of each kind)."""

    length: int = 64
    symbols: int = 16
    seed: int = 0

    shortest = 2

    def __post_init__(self):
        if self.length < self.shortest or self.symbols < 2:
            raise ArgumentError(
                f"{self.name} of length {self.length} over {self.symbols} symbols: expected a length from "
                f"{self.shortest} up and 2 symbols at least"
            )

    @property
    def name(self) -> str:
        """As the command line has it."""
        return type(self).__name__.lower()

    def sequence(self, draw) -> tuple:
        """Tokens of one sequence, one more than `length`, and of each whether it can be known from those before."""
        raise NotImplementedError

    def batch(self, step: int, size: int) -> tuple:
        """Tokens and targets of a step, [size, length] each."""
        import torch

        draw = numpy.random.default_rng([self.seed, step])
        tokens, known = map(numpy.array, zip(*(self.sequence(draw) for _ in range(size))))
        targets = numpy.where(known, tokens, IGNORED)
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy())


class Palindrome(Task):
    """Symbols, a separator, and the symbols backwards, which are to be told: a b c | c b a."""

    @property
    def vocabulary(self) -> int:
        """The symbols and the separator."""
        return self.symbols + 1

    def sequence(self, draw) -> tuple:
        count = self.length // 2
        said = draw.integers(0, self.symbols, count + self.length % 2)
        tokens = [*said, self.symbols, *said[::-1][:count]]
        return tokens, numpy.arange(len(tokens)) > len(said)


class MQAR(Task):
    """Pairs of a key and its value, the keys all different; then each key again, in another order, and its value.

    a 1 b 2 c 3, then b 2 c 3 a 1, where the values are to be told. Keys and values have symbols of their own.
    """

    shortest = 4

    def __post_init__(self):
        super().__post_init__()
        if self.length % 4 or self.length // 4 > self.symbols:
            raise ArgumentError(
                f"mqar of length {self.length} has {self.length / 4:g} pairs for {self.symbols} keys: expected a "
                f"multiple of 4 and at least as many symbols as pairs, such as symbols = {-(-self.length // 4)}"
            )

    @property
    def vocabulary(self) -> int:
        """Keys, then values."""
        return 2 * self.symbols

    def sequence(self, draw) -> tuple:
        count = self.length // 4
        keys, values = draw.permutation(self.symbols)[:count], draw.integers(0, self.symbols, count) + self.symbols
        order = numpy.concatenate([numpy.arange(count), draw.permutation(count)])
        tokens = numpy.stack([keys[order], values[order]], 1).flatten()
        known = (numpy.arange(len(tokens)) >= 2 * count) & (numpy.arange(len(tokens)) % 2 == 1)
        return [*tokens, 0], [*known, False]


@dataclass(frozen=True)
class Stack(Task):
    """Operations on several stacks, three tokens each: push, stack, element; or pop, stack, and the element to tell.

    Half of the operations are pops, of a random stack that holds something.
    """

    stacks: int = 64

    shortest = 6

    def __post_init__(self):
        super().__post_init__()
        if self.stacks < 1:
            raise ArgumentError(f"stack has {self.stacks} stacks: expected 1 or more")

    @property
    def vocabulary(self) -> int:
        """Elements, names of stacks, pop, push."""
        return self.symbols + self.stacks + 2

    def sequence(self, draw) -> tuple:
        pop, push = self.vocabulary - 2, self.vocabulary - 1
        held: dict[int, list] = {}  # of the stacks that hold something
        tokens, known = [], []
        for chance, which, element in zip(*self._choices(draw)):
            if pops := chance < 0.5 and bool(held):
                stack = sorted(held)[which % len(held)]
                element = held[stack].pop()
                if not held[stack]:
                    del held[stack]
            else:
                stack = which % self.stacks
                held.setdefault(stack, []).append(element)
            tokens += [pop if pops else push, self.symbols + stack, element]
            known += [False, False, pops]
        return tokens[: self.length + 1], known[: self.length + 1]

    def _choices(self, draw) -> tuple:
        count = -(-(self.length + 1) // 3)
        return (
            draw.random(count).tolist(),
            draw.integers(0, 1 << 30, count).tolist(),
            draw.integers(0, self.symbols, count).tolist(),
        )


TASKS = {"palindrome": Palindrome, "mqar": MQAR, "stack": Stack}
