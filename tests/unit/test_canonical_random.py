"""Recurrences made up at random: whatever the language accepts must equal the oracle in canonical form."""

import random

import pytest
import torch

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.reference import canonical_reference, recurrence_reference


def made_up(seed):
    """A recurrence of one to four steps, each a decay, a write, a delta step or an operator."""
    dice = random.Random(seed)

    @kg.recurrence(name=f"made_up_{seed}")
    def body(S, q, k: kg.Key[2], v: kg.Value[2], g, h: kg.Channel, beta: kg.Scalar[2]):
        keys, values, rates = [*k, q, k[0] * k[1]], list(v), [*beta, 0.5, 1 - beta[0]]
        decays = [kg.exp(g), kg.sigmoid(g), 0.9]
        states = [S]

        def read(state):
            return state.T @ dice.choice(keys)

        def step(S):
            x, p, rate = dice.choice(keys), dice.choice(values), dice.choice(rates)
            return dice.choice(
                [
                    lambda: dice.choice(decays) * S,
                    lambda: kg.diag(kg.exp(h)) @ S,
                    lambda: S + kg.outer(x, rate * p),
                    lambda: S + kg.outer(x, rate * (p - S.T @ x)),
                    lambda: S - rate * kg.outer(x, read(dice.choice(states))),
                    lambda: (kg.eye() - rate * kg.outer(x, dice.choice(keys))) @ S,
                    lambda: (kg.diag(kg.exp(h)) - kg.outer(rate * x, x)) @ S + kg.outer(x, p),
                ]
            )()

        for _ in range(dice.randint(1, 4)):
            states.append(step(states[-1]))
        output = read(states[-1]) + dice.choice(rates) * read(dice.choice(states)) + kg.dot(q, k[0]) * values[0]
        used = sum((kg.dot(x, q) for x in k), 1.0) * (g + beta[0] + beta[1]) * kg.dot(h, q)
        return states[-1], output + used * values[1]

    return body


@pytest.mark.parametrize("seed", range(60))
def test_made_up_recurrence_equals_the_oracle(seed):
    found = made_up(seed)
    form = canonical(found)
    tensors = kg.zoo.sample(form, (1, 6, 2, 4, 3), "reset" if seed % 3 == 0 else "bounded", seed)
    tensors = {n: t.clamp_min(-1e3) for n, t in tensors.items()}  # finite, since the output uses gates as they are
    state = torch.randn(1, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = recurrence_reference(found, tensors, state)
    for got, want in zip(canonical_reference(form, tensors, state), expected, strict=True):
        assert torch.isfinite(want).all()
        assert (got - want).norm() <= 1e-11 * want.norm()
