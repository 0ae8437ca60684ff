"""Built kernels on a GPU against the float64 recurrence: every entry of the zoo, every class of gates, odd shapes."""

import pytest
from built_ops import draw, errors, launch, tolerance, variants

from kdagen import zoo
from kdagen.zoo.inputs import GATES

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1, 1), (3, 16, 5), (1, 31, 2), (2, 33, 1), (1, 257, 3), (5, 64, 7)]  # B, T, H


def check(name: str, shape, gate: str, with_state: bool, group: int = 1) -> None:
    """All kernels at hand of an op, on the same inputs."""
    for kernels in variants(name):
        tensors, state = draw(kernels, shape, gate, group=group)
        given = state if with_state else None
        wrong = errors(name, kernels, launch(kernels, tensors, given), tensors, given)
        assert all(w <= tolerance(kernels) for w in wrong), f"{kernels.folder}: output, state off by {wrong}"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", zoo.names())
def test_every_class_of_gates(name, gate):
    check(name, (2, 131, 3), gate, with_state=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", zoo.names())
def test_every_length_batch_and_head_count(name, shape):
    check(name, shape, "mild", with_state=shape[1] % 2 == 0)


@pytest.mark.parametrize("name", zoo.names())
def test_groups_of_value_heads(name):
    check(name, (2, 75, 6), "mild", with_state=True, group=3)


def test_more_heads_than_multiprocessors():
    check("kda", (3, 50, 97), "mild", with_state=True)


def test_a_long_sequence():
    check("kda", (1, 4099, 1), "softplus", with_state=False)
