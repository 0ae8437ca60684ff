"""Sequences split over ranks, as kernels of a GPU compute them: built programs, executed, one rank after another."""

import packages
import pytest
import ranks
import simulated_gpu
import torch

from kdagen import zoo
from kdagen.pipeline import compile_op, compile_training
from kdagen.runtime.package import BuiltOp
from kdagen.runtime.rank_part import Part
from kdagen.state import StateType
from kdagen.tolerance import TOLERANCE, gradient_tolerance, reference_gradients, relative_error

TOKENS = (17, 0, 20)


class OnGpu:
    """An op whose CPU tensors are on a GPU as far as it knows."""

    def __init__(self, op):
        self.signature, self.state, self.form = op.signature, op.state, op.form
        self.torch_op, self.training_op, self.backward_op = op._cuda, op.training._cuda, op.training._cuda_backward


@pytest.mark.parametrize("name, state", [("kda", StateType()), ("gla", StateType("VK"))])
def test_programs_over_ranks_are_within_tolerance(name, state, tmp_path, monkeypatch):
    simulated_gpu.install(monkeypatch)
    monkeypatch.setattr(Part, "on_cpu", False)
    recurrence = zoo.get(name)
    schedule = {"chunk_size": 16}
    packages.write(tmp_path / "ops", compile_op(recurrence, 64, schedule=schedule, state=state), tmp_path)
    folder = packages.write(
        tmp_path / "ops", compile_training(recurrence, 64, schedule=schedule, state=state), tmp_path
    )
    op = BuiltOp(folder.parent, state).load()
    drawn = zoo.sample(op.form, (1, sum(TOKENS), 1, 64, 64))
    given = {n: x.to(torch.bfloat16) for n, x in drawn.items()}
    torch.manual_seed(0)
    d_out, first, d_final = torch.randn(1, sum(TOKENS), 1, 64).bfloat16(), *torch.randn(2, 1, 1, 64, 64)
    o, final, *gradients = ranks.over_ranks(OnGpu(op), TOKENS, given, first, d_out, d_final)
    turned = (lambda x: x.mT) if state.layout == "VK" else (lambda x: x)
    cotangents = d_out.double(), turned(d_final).double()
    expected_o, expected_final, expected = reference_gradients(recurrence, given, turned(first).double(), *cotangents)
    assert relative_error(o, expected_o) <= TOLERANCE["bfloat16"]
    assert relative_error(turned(final), expected_final) <= TOLERANCE["bfloat16"]
    most = gradient_tolerance(op.form, "bfloat16")
    for n, x in zip([*given, "initial_state"], gradients, strict=True):
        x = turned(x) if n == "initial_state" else x
        assert relative_error(x, expected[n]) <= most[n], n
