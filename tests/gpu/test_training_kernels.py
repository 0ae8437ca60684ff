"""Kernels that train, on a GPU: results and gradients against float64 autograd through the recurrence.

Every entry of the zoo, every class of gates, chunks and segments that end early; whatever the forward keeps.
"""

import pytest
from built_ops import by_policy, draw, draw_cotangents, trained, training_errors

from kdagen import zoo
from kdagen.zoo.inputs import GATES

pytestmark = pytest.mark.gpu
POLICIES = ("inputs", "states", "all")
# Left out is a decay that is an argument itself and 0 for a whole head: its derivative is taken as 0 there.
GATED = [(name, gate) for name in zoo.names() for gate in GATES if (name, gate) != ("retnet", "reset")]
LENGTHS = {  # tokens, from those of a chunk and of a segment
    "one token": lambda chunk, segment: 1,
    "part of a chunk": lambda chunk, segment: chunk - 1,
    "a chunk and a token": lambda chunk, segment: chunk + 1,
    "a whole segment": lambda chunk, segment: segment,
    "segments and a part": lambda chunk, segment: 2 * segment + chunk + 3,
}


def tokens(kernels, length: str) -> int:
    chunk = kernels.plan["chunk_size"]
    return LENGTHS[length](chunk, chunk * kernels.plan["schedule"]["segment"])


def check(name: str, kernels, shape, gate: str = "mild", with_states: bool = True, with_d_out: bool = True) -> None:
    """Every result and gradient within its tolerance."""
    tensors, state = draw(kernels, shape, gate)
    d_out, d_final = draw_cotangents(kernels, shape)
    states = (state, d_final) if with_states else (None, None)
    wrong = training_errors(name, kernels, tensors, states[0], d_out if with_d_out else None, states[1])
    assert set(wrong) > {f"d_{argument}" for argument in kernels.plan["arguments"]}
    assert all(error <= most for error, most in wrong.values()), f"{kernels.folder}: error and tolerance: {wrong}"


@pytest.mark.parametrize("name,gate", GATED)
def test_every_class_of_gates(name, gate):
    for kernels in trained(name):
        check(name, kernels, (2, 75, 2), gate)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", zoo.names())
def test_every_length(name, length):
    for kernels in trained(name):
        check(name, kernels, (1, tokens(kernels, length), 3))


@pytest.mark.parametrize("name", zoo.names())
def test_without_states(name):
    for kernels in trained(name):
        check(name, kernels, (2, tokens(kernels, "a chunk and a token"), 1), with_states=False)


@pytest.mark.parametrize("name", zoo.names())
def test_a_loss_of_the_final_state_alone(name):
    """The output's cotangent is missing, so what only reads the state has a gradient of zero."""
    for kernels in trained(name):
        check(name, kernels, (2, 75, 1), with_d_out=False)


@pytest.mark.parametrize("keep", POLICIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_policy(keep, length):
    kernels = by_policy("kda")[keep]
    check("kda", kernels, (2, tokens(kernels, length), 2), "softplus", with_states=length != "a whole segment")


def test_more_heads_than_multiprocessors():
    check("kda", by_policy("kda")["states"], (2, 50, 97))
