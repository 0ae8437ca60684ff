"""Generated programs of KDA's gates and rates, executed as they are with the GPU's rounding."""

import pytest

from kdagen.pipeline import compile_op, compile_training
from kdagen.simulate.verify import verify, verify_training
from kdagen.zoo.kda import variant

CHOICES = {
    "softplus": variant("softplus", 2, True, 64**-0.5),
    "bounded": variant("bounded", 2, True, 64**-0.5, -5.0),
    "clamped": variant("clamped", 1, True, 64**-0.5, -5.0),
    "bounded by the caller": variant(None, None, True, 64**-0.5, -5.0),
    "as it is": variant(None, 1, True),
}


@pytest.mark.parametrize("gate", ["mild", "bounded"])
@pytest.mark.parametrize("choice", CHOICES)
def test_inference(choice, gate):
    recurrence = CHOICES[choice]
    verdict = verify(compile_op(recurrence, 64), recurrence, (1, 50, 2), gate)
    assert verdict.ok, verdict.errors


@pytest.mark.parametrize("choice", CHOICES)
def test_training(choice):
    recurrence = CHOICES[choice]
    verdict = verify_training(compile_training(recurrence, 64), recurrence, (1, 50, 4), "softplus")
    assert verdict.ok, verdict.errors
