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
    assert list(statistics) == ["toy_index", "toy_prepare", "toy_scan"]


def test_ragged_sequences_lie_in_a_row_and_the_rest_is_zero():
    ends, tensors = [0, 0, 5, 38, 38, 39], inputs(B=1, T=48, H=2)
    state = torch.arange(5.0)[:, None, None, None].expand(5, 2, 16, 64)
    o, final, _ = simulate(toy(), tensors, state, cu_seqlens=torch.tensor(ends), check_races=True)
    for s, (a, b) in enumerate(zip(ends, ends[1:], strict=False)):
        if a == b:
            assert torch.equal(final[s], state[s])
            continue
        want, want_final = expected({n: x[:, a:b] for n, x in tensors.items()}, state[s : s + 1])
        assert relative(o[:, a:b], want) < 3e-3 and relative(final[s], want_final[0]) < 3e-3
    assert not o[:, 39:].any()


def test_states_on_the_way():
    tensors = inputs(B=2, T=70, H=1)
    _, final, states, _ = simulate(toy(), tensors, states_every=32)
    assert states.shape == (4, 1, 16, 64)
    for slot, (b, t) in enumerate([(0, 32), (0, 64), (1, 32), (1, 64)]):
        first = {n: x[b : b + 1, :t] for n, x in tensors.items()}
        assert torch.equal(states[slot], simulate(toy(), first)[1][0])
    assert torch.equal(simulate(toy(), tensors)[1], final)


def test_heads_of_values_share_a_head_of_keys():
    """g has the heads of values: HV = 3 H."""
    x, g = inputs(B=1, T=20, H=2)["x"], inputs(B=1, T=20, H=6)["g"]
    o, _, _ = simulate(toy(), {"x": x, "g": g})
    assert relative(o, expected({"x": x.repeat_interleave(3, 2), "g": g})[0]) < 3e-3


def test_the_workspace_passes_through_memory_once_each_way():
    """The scan reads the chunks that there are, prepare fills every slot: T // chunk_size + N."""
    tensors = inputs(B=1, T=32, H=2)
    _, _, statistics = simulate(toy(), tensors)
    chunk = 2 * 16 * 64 * 2
    assert statistics["toy_prepare"].traffic["w"].written == 3 * chunk
    assert statistics["toy_scan"].traffic["w"].read == 2 * chunk
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
    racing = PREPARE.replace("w[h, n, i", "w[h, 0, i")
    assert racing != PREPARE
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
        "forward": ["toy_index", "toy_scan"],
        "backward": ["toy_index", "toy_reverse", "toy_gradients"],
    }


def test_a_cotangent_that_is_not_given_is_zero():
    tensors, _, _ = training_inputs()
    *_, gradients, d_state, _ = simulate_training(toy_training.toy(), tensors)
    assert not any(x.any() for x in (*gradients.values(), d_state))


def test_what_the_backward_does_not_write_stays_nan():
    """What is added up, which the runtime has set to zero, stays zero."""
    given, (tensors, d_out, d_final) = toy_training.GRADIENTS, training_inputs()
    for name, silent in {
        "a": given.replace("d_a_out[h, n] = total[0]", "total[0] = 0"),
        "g": given.replace("d_g_out[chunk_rows[n, 0] + i, h] = ", "s[i] = "),
    }.items():
        gradients = simulate_training(toy_training.toy(silent), tensors, None, d_out, d_final)[2]
        assert not gradients["a"].any() if name == "a" else gradients["g"].isnan().all()
        assert not gradients["x"].isnan().any()


def test_workspaces_that_are_not_kept_are_forgotten():
    tensors, d_out, d_final = training_inputs()
    op = dataclasses.replace(toy_training.toy(), kept=())
    assert simulate_training(op, tensors, None, d_out, d_final)[2]["g"].isnan().all()
