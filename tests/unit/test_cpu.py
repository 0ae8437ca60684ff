"""The CPU backend: dtypes in and out."""

import pytest
import torch

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.derive.chunk import chunk_form
from kdagen.reference import recurrence_reference
from kdagen.runtime import cpu


@pytest.mark.parametrize(
    "dtype, state_dtype, bound",
    [
        (torch.float64, torch.float64, 1e-10),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 3e-3),
        (torch.float16, torch.float32, 4e-4),
    ],
)
def test_output_in_the_dtype_asked_for_and_the_state_in_full(dtype, state_dtype, bound):
    form = canonical(zoo.get("kda_softplus"))
    tensors = {n: x.to(dtype) for n, x in zoo.sample(form, (2, 70, 2, 16, 8)).items()}
    state = torch.randn(2, 2, 16, 8, dtype=state_dtype)
    expected = recurrence_reference(zoo.get("kda_softplus"), tensors, state)
    o, final, _ = cpu.run(chunk_form(form), tensors, state, dtype)
    assert (o.dtype, final.dtype) == (dtype, state_dtype)
    assert (o.double() - expected[0]).norm() <= bound * expected[0].norm()
    assert (final.double() - expected[1]).norm() <= min(bound, 1e-5) * expected[1].norm()


def test_gates_may_be_wider_than_values():
    form = canonical(zoo.get("kda"))
    tensors = zoo.sample(form, (1, 30, 2, 16, 8))
    mixed = {n: x.float() if n == "g" else x.bfloat16() for n, x in tensors.items()}
    expected, _ = recurrence_reference(zoo.get("kda"), mixed)
    o, *_ = cpu.run(chunk_form(form), mixed, out_dtype=torch.bfloat16)
    assert o.dtype == torch.bfloat16
    assert (o.double() - expected).norm() <= 3e-3 * expected.norm()


def test_nothing_is_recorded_for_autograd():
    form = canonical(zoo.get("gla"))
    tensors = {n: x.requires_grad_() for n, x in zoo.sample(form, (1, 5, 1, 4, 4)).items()}
    assert not cpu.run(chunk_form(form), tensors)[0].requires_grad


@pytest.mark.parametrize(
    "tokens, solving, expected",
    [(1, 1, 1), (2, 1, 2), (9, 1, 16), (64, 1, 64), (65, 0, 64), (4096, 2, 32), (4096, 3, 16)],
)
def test_chunks_fit_short_sequences_and_bound_the_solve(tokens, solving, expected):
    assert cpu.chunk_size(tokens, solving) == expected


@pytest.mark.parametrize("t", [1, 2, 3, 33])
def test_short_sequences_equal_the_oracle(t):
    form = canonical(zoo.get("deltaproduct"))
    tensors = zoo.sample(form, (2, t, 2, 16, 8), "reset")
    expected = recurrence_reference(zoo.get("deltaproduct"), tensors)
    for got, want in zip(cpu.run(chunk_form(form), tensors)[:2], expected, strict=True):
        assert (got - want).norm() <= 1e-10 * want.norm()
