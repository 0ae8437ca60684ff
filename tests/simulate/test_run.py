"""simulate() runs an op's kernels in order on torch tensors."""

import dataclasses

import pytest
import torch
import toy_training
from toy import PREPARE, SCAN, toy

from kdagen.errors import SimulationError
from kdagen.simulate.run import simulate, simulate_training, traffic_per_token_head
from kdagen.simulate.torch_arrays import from_numpy, to_numpy


def inputs(B=2, T=37, H=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, H, 64, generator=generator).bfloat16()
    return {"x": x, "g": -torch.rand(B, T, H, generator=generator)}


def expected(tensors, initial_state=None):
    """The toy's running sum over chunks, position by position within the chunk."""
    x, g = tensors["x"].double(), tensors["g"].double()
    B, T, H, K = x.shape
    w = torch.zeros(B, -(-T // 16) * 16, H, K, dtype=torch.float64)
    w[:, :T] = x * g.exp()[..., None]
    sums = w.view(B, -1, 16, H, K).cumsum(1)
    if initial_state is not None:
        sums = sums + initial_state.double().permute(0, 2, 1, 3)[:, None]
    return sums.reshape(B, -1, H, K)[:, :T], sums[:, -1].permute(0, 2, 1, 3)


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("T", [16, 37])
def test_an_op_of_two_kernels(given, T):
    tensors = inputs(T=T)
    state = torch.ones(2, 3, 16, 64) if given else None
    o, final, statistics = simulate(toy(), tensors, state)
    want, want_final = expected(tensors, state)
    assert relative(o, want) < 3e-3
    assert relative(final, want_final) < 3e-3
    assert list(statistics) == ["toy_prepare", "toy_scan"]


def test_the_workspace_passes_through_memory_once_each_way():
    tensors = inputs(B=1, T=32, H=2)
    _, _, statistics = simulate(toy(), tensors)
    workspace = 2 * 16 * 2 * 64 * 2
    assert statistics["toy_prepare"].traffic["w"].written == workspace
    assert statistics["toy_scan"].traffic["w"].read == workspace
    per_token = traffic_per_token_head(statistics, 32, 2)
    assert per_token == sum(s.bytes_moved for s in statistics.values()) / 64


def test_schedules_are_checked_when_asked():
    op, tensors = toy(), inputs(T=48)
    assert torch.equal(simulate(op, tensors, check_schedules=True)[0], simulate(op, tensors)[0])
    prologue = SCAN.replace("STAGES", "2").replace("for n in T.Pip", "T.copy(s, ws)\n            for n in T.Pip")
    simulate(toy(scan=prologue), tensors)
    with pytest.raises(SimulationError, match="toy_scan: 2 roles, 0 of 3 seeds hold\n  seed 0, 1, 2: fragment 's'"):
        simulate(toy(scan=prologue), tensors, check_schedules=True, seeds=range(3))


def test_what_no_kernel_writes_stays_nan():
    unwritten = SCAN.replace("STAGES", "2").replace("T.copy(s, final_state[b, h, 0:16, 0:64])", "T.clear(s)")
    _, final, _ = simulate(toy(scan=unwritten), inputs())
    assert final.isnan().all()


def test_blocks_that_race_are_refused_when_asked():
    racing = PREPARE.replace("T.if_then_else(t < TIME", "T.if_then_else(t + n < TIME").replace("w[b, n, i", "w[b, 0, i")
    simulate(toy(prepare=racing), inputs())
    with pytest.raises(SimulationError, match="race in 'w'"):
        simulate(toy(prepare=racing), inputs(), check_races=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arrays_share_the_memory_of_tensors(dtype):
    tensor = torch.arange(8).to(dtype)
    to_numpy(tensor)[0] = 3
    assert tensor[0] == 3
    assert torch.equal(from_numpy(to_numpy(tensor)), tensor)


def training_inputs(T=37):
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(2, T, 3, 64, generator=generator).bfloat16()
    d_final = torch.randn(2, 3, 64, 64, generator=generator)
    return {**inputs(T=T), "a": torch.rand(3, generator=generator)}, d_out, d_final


def test_both_passes_of_an_op_in_training():
    tensors, d_out, d_final = training_inputs()
    _, final, gradients, d_state, statistics = simulate_training(toy_training.toy(), tensors, None, d_out, d_final)
    leaves = [tensors[name].double().requires_grad_() for name in "xga"]
    x, g, a = leaves
    expected = torch.autograd.grad(x * g.exp()[..., None] * a[:, None], leaves, d_out.double())
    assert list(gradients) == ["x", "g", "a"]
    for found, wanted in zip(gradients.values(), expected):
        assert found.shape == wanted.shape and relative(found, wanted) < 5e-3
    assert torch.equal(d_state, d_final) and torch.equal(final, torch.zeros_like(final))
    assert {which: list(kernels) for which, kernels in statistics.items()} == {
        "forward": ["toy_scan"],
        "backward": ["toy_reverse", "toy_gradients"],
    }


def test_a_cotangent_that_is_not_given_is_zero():
    tensors, _, _ = training_inputs()
    *_, gradients, d_state, _ = simulate_training(toy_training.toy(), tensors)
    assert not any(x.any() for x in (*gradients.values(), d_state))


def test_what_the_backward_does_not_write_stays_nan():
    silent = toy_training.GRADIENTS.replace("d_a_out[b, h, n] = total[0]", "total[0] = 0")
    tensors, d_out, d_final = training_inputs()
    gradients = simulate_training(toy_training.toy(silent), tensors, None, d_out, d_final)[2]
    assert gradients["a"].isnan().all() and not gradients["x"].isnan().any()


def test_workspaces_that_are_not_kept_are_forgotten():
    tensors, d_out, d_final = training_inputs()
    op = dataclasses.replace(toy_training.toy(), kept=())
    assert simulate_training(op, tensors, None, d_out, d_final)[2]["g"].isnan().all()
