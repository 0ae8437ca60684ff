"""Extreme gates give no NaN and no infinity, in either direction: outputs, states and gradients of random calls."""

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdagen as kg
from kdagen.derive.canonical import canonical


@cache
def compiled(name: str):
    return kg.compile(name), canonical(kg.load(name))


CALLS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(kg.zoo.names()),
        "gate": st.sampled_from(["extreme", "reset"]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "shape": st.tuples(*(st.integers(1, n) for n in (2, 70, 3, 17, 9))),
        "seed": st.integers(0, 2**31),
        "with_state": st.booleans(),
    }
)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(CALLS)
def test_outputs_states_and_gradients_are_finite(call):
    op, form = compiled(call["name"])
    drawn = kg.zoo.sample(form, call["shape"], call["gate"], call["seed"])
    tensors = {n: x.to(call["dtype"]).requires_grad_() for n, x in drawn.items()}
    b, _, h, k, v = call["shape"]
    generator = torch.Generator().manual_seed(call["seed"])
    state = torch.randn(b, h, k, v, generator=generator).requires_grad_() if call["with_state"] else None
    o, end = op(**tensors, initial_state=state, output_final_state=True)
    leaves = [*tensors.values(), *([state] if call["with_state"] else [])]
    gradients = torch.autograd.grad((o.float() ** 2).sum() + (end**2).sum(), leaves)
    results = {"o": o, "final_state": end, **{f"d_{n}": x for n, x in zip((*tensors, "initial_state"), gradients)}}
    assert not [n for n, x in results.items() if not torch.isfinite(x).all()]
