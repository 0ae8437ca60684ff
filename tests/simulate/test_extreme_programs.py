"""Extreme gates give no NaN and no infinity in the generated programs of training, executed as they are."""

from functools import cache

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdagen import zoo
from kdagen.pipeline import compile_training
from kdagen.simulate.run import simulate_training
from kdagen.simulate.verify import draw, draw_cotangents


@cache
def program(name: str):
    return compile_training(zoo.get(name), 64, schedule={"segment": 2})


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(zoo.names()),
    gate=st.sampled_from(["extreme", "reset"]),
    shape=st.tuples(st.just(1), st.integers(1, 70), st.just(1)),
    seed=st.integers(0, 2**31),
    with_states=st.booleans(),
)
def test_results_and_gradients_are_finite(name, gate, shape, seed, with_states):
    source = program(name)
    tensors, state = draw(source, shape, gate, seed)
    d_out, d_final = draw_cotangents(source, shape, seed)
    states = (state, d_final) if with_states else (None, None)
    o, final, gradients, d_initial, _ = simulate_training(source, tensors, states[0], d_out, states[1])
    results = {"o": o, "final_state": final, "d_initial_state": d_initial, **gradients}
    assert not [what for what, x in results.items() if not torch.isfinite(x).all()]
