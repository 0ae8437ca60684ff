"""Generated programs of the recurrences behind kdagen.fla, executed as they are with the GPU's rounding."""

import pytest

from kdagen.fla.delta import deltanet
from kdagen.fla.dplr import dplr
from kdagen.fla.linear import linear
from kdagen.pipeline import compile_op, compile_training
from kdagen.simulate.verify import verify, verify_training

SCALE = 64**-0.5
RECURRENCES = {
    "deltanet": deltanet(1, True, SCALE),
    "gated_deltanet": deltanet(None, True, SCALE, "given"),
    "gated_deltanet with its gate": deltanet(2, True, SCALE, "gate"),
    "linear_attention": linear(SCALE),
    "gla": linear(SCALE, "gk"),
    "simple_gla": linear(SCALE, "g"),
    "retention": linear(SCALE, "gamma"),
    "dplr": dplr(SCALE),
    "dplr, bounded": dplr(SCALE, -1.0),
}


@pytest.mark.parametrize("name", RECURRENCES)
def test_inference(name):
    recurrence = RECURRENCES[name]
    verdict = verify(compile_op(recurrence, 64, gate_dtype="float32"), recurrence, (1, 50, 2))
    assert verdict.ok, verdict.errors


@pytest.mark.parametrize("name", ["gated_deltanet with its gate", "retention", "dplr, bounded"])
def test_training(name):
    recurrence = RECURRENCES[name]
    verdict = verify_training(compile_training(recurrence, 64, gate_dtype="float32"), recurrence, (1, 50, 4))
    assert verdict.ok, verdict.errors
