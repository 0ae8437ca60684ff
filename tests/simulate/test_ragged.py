"""Ragged batches, grouped heads, types of states and states on the way, in executed programs, against float64."""

from functools import cache

import pytest
import torch
from ragged import LENGTHS, Batch, check_forward

from kdagen import zoo
from kdagen.pipeline import compile_op, compile_training
from kdagen.simulate import run
from kdagen.simulate.run import simulate_training
from kdagen.state import DEFAULT, StateType
from kdagen.tolerance import TOLERANCE, gradient_tolerance, relative_error

SPLIT = {"output": "split"}


@cache
def inference(name, arch="sm90", state=DEFAULT, **schedule):
    return compile_op(zoo.get(name), 64, arch=arch, schedule=schedule, state=state)


@cache
def training(name, arch="sm90", state=DEFAULT, **schedule):
    return compile_training(zoo.get(name), 64, arch=arch, schedule={"segment": 2} | schedule, state=state)


def orders(arch):
    """Random orders of warps to check; on sm80 all warps of a block have one role."""
    return range(0 if arch == "sm80" else 1)


FORWARD = [  # name, arch, heads of values for each of keys, chunks from state to state, type of states, schedule
    ("kda", "sm90", 2, 1, StateType("VK"), {}),
    ("kda", "sm80", 3, 2, StateType("KV", "bfloat16"), {}),
    ("kda_softplus", "sm90", 2, 1, DEFAULT, {}),
    ("kda_bounded", "sm100", 3, 1, StateType("VK", "bfloat16"), {}),
    ("dplr", "sm100", 2, 1, DEFAULT, {}),
    ("deltaproduct", "sm90", 2, 1, StateType("VK", "bfloat16"), {}),
    ("rwkv7", "sm80", 1, 1, StateType("VK"), {}),
    ("gated_deltanet", "sm90", 3, 1, StateType("VK"), SPLIT),
    ("mamba2", "sm100", 2, 1, StateType("KV", "bfloat16"), {}),
    ("mamba2", "sm80", 3, 1, StateType("VK"), SPLIT),
    ("comba", "sm90", 2, 1, DEFAULT, {}),
    ("linear_attention", "sm90", 3, 2, StateType("KV", "bfloat16"), SPLIT),
]


@pytest.mark.parametrize(("name", "arch", "group", "chunks", "state", "schedule"), FORWARD)
def test_sequences_in_a_row(name, arch, group, chunks, state, schedule):
    source = inference(name, arch, state, chunk_size=16, **schedule)
    check_forward(source, name, group=group, every=16 * chunks, seeds=orders(arch))


def test_sequences_with_full_resets():
    check_forward(inference("kda"), "kda", group=2, gate="reset")


@pytest.mark.parametrize("lengths", [(0, 0, 0, 19, 0), (0,) * 8 + (1,) * 40 + (0,) * 8, (0, 0, 0)])
def test_more_sequences_than_chunks(lengths):
    check_forward(inference("gated_deltanet"), "gated_deltanet", lengths, padding=3, group=2)


def test_one_build_serves_all_lengths():
    """50 batches of other lengths, one program: its text is traced once."""
    source = compile_op(zoo.get("gla"), 64, schedule={"v_tile": 64})
    before, digest = run._prim_func.cache_info().misses, [hash(kernel.text) for kernel in source.kernels]
    generator = torch.Generator().manual_seed(3)
    for n in range(50):
        lengths = torch.randint(0, 2 * n % 37 + 2, (n % 5 + 1,), generator=generator).tolist()
        check_forward(source, "gla", lengths, padding=1 + n % 3, group=1 + n % 2)
    assert run._prim_func.cache_info().misses - before <= len(source.kernels)
    assert digest == [hash(kernel.text) for kernel in source.kernels]


def check_training(source, name, lengths=LENGTHS, padding=4, seeds=(), **choices):
    """Gradients of all arguments and of the initial states, those of padding zero to the bit."""
    batch = Batch(source, zoo.get(name), lengths, padding, **choices)
    given = batch.tensors, batch.state, batch.d_out, batch.d_final
    checks = {"check_schedules": bool(seeds), "check_races": True, "seeds": seeds}
    o, final, gradients, d_state, statistics = simulate_training(source, *given, cu_seqlens=batch.cu_seqlens, **checks)
    expected, expected_final = batch.expected()
    assert relative_error(o, expected) < TOLERANCE[source.dtype]
    assert relative_error(batch.plain(final), expected_final) < TOLERANCE[source.dtype]
    most, found = gradient_tolerance(batch.form, source.dtype), gradients | {"initial_state": batch.plain(d_state)}
    for argument, wanted in batch.gradients().items():
        assert found[argument].shape == wanted.shape
        assert relative_error(found[argument], wanted) < most[argument], argument
    assert not any(gradients[argument][:, batch.ends[-1] :].any() for argument in batch.per_token)
    empty = sorted(set(range(batch.sequences)) - {s for s, _ in batch.filled})
    assert torch.equal(d_state[empty], batch.d_final[empty])
    assert not any(s.writes_out_of_bounds for which in statistics.values() for s in which.values())


BACKWARD = [
    ("kda", "sm90", 2, StateType("VK"), {"keep": "states"}),
    ("kda", "sm80", 3, StateType("KV", "bfloat16"), {"keep": "all"}),
    ("kda_softplus", "sm90", 2, DEFAULT, {"keep": "inputs"}),
    ("dplr", "sm100", 2, DEFAULT, {"keep": "states"}),
    ("gated_deltanet", "sm100", 3, StateType("VK", "bfloat16"), {"keep": "inputs"}),
    ("deltaproduct", "sm90", 1, StateType("KV", "bfloat16"), {"keep": "states"}),
    ("mamba2", "sm80", 2, StateType("VK", "bfloat16"), {"keep": "all"}),
]


@pytest.mark.parametrize(("name", "arch", "group", "state", "schedule"), BACKWARD)
def test_gradients_of_sequences_in_a_row(name, arch, group, state, schedule):
    source = training(name, arch, state, chunk_size=16, **schedule)
    check_training(source, name, (5, 0, 49, 1, 17), group=group, seeds=orders(arch))


@pytest.mark.parametrize("lengths", [(0, 0, 35, 0), (0,) * 3 + (1,) * 20 + (0,) * 3])
def test_gradients_of_more_sequences_than_chunks(lengths):
    check_training(training("gated_deltanet"), "gated_deltanet", lengths, padding=3, group=2)


def test_gradients_of_nothing_but_padding():
    source = training("gla")
    batch = Batch(source, zoo.get("gla"), (0, 0), 9)
    given = batch.tensors, batch.state, batch.d_out, batch.d_final
    o, final, gradients, d_state, _ = simulate_training(source, *given, cu_seqlens=batch.cu_seqlens)
    assert not any(x.any() for x in (o, *gradients.values()))
    assert torch.equal(final, batch.state) and torch.equal(d_state, batch.d_final)
