"""Recurrences in no zoo: each is derived, and its canonical form must equal the oracle token by token."""

import pytest
import torch
from foreign import CASES

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.reference import canonical_reference, recurrence_reference
from kdagen.zoo.inputs import GATES


@pytest.mark.parametrize("name", CASES)
def test_canonical_equals_the_oracle(name):
    found, solving, streams = CASES[name]
    form = canonical(found)
    assert (len(form.solving), len(form.streams)) == (solving, streams)
    for seed, gate in enumerate(GATES):
        tensors = kg.zoo.sample(form, (2, 12, 2, 6, 5), gate, seed)
        state = torch.randn(2, 2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = recurrence_reference(found, tensors, state)
        for got, want in zip(canonical_reference(form, tensors, state), expected, strict=True):
            assert torch.isfinite(want).all()
            assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("name, pair", [("write_by_distance", ("target", "v")), ("decay_by_difference", ("a", "b"))])
def test_squares_of_small_differences_keep_their_sign_in_float32(name, pair):
    found = CASES[name][0]
    tensors = {n: x.float() for n, x in kg.zoo.sample(canonical(found), (1, 20, 1, 16, 32), "mild", 0).items()}
    near, to = pair
    tensors[to] = 50 + tensors[to]
    tensors[near] = tensors[to] + 1e-4 * torch.randn(tensors[to].shape, generator=torch.Generator().manual_seed(0))
    expected = recurrence_reference(found, tensors)[0]
    assert (kg.compile(found)(**tensors)[0] - expected).norm() <= 1e-4 * expected.norm()
