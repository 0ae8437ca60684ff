"""The generated programs of training, both passes executed as they are with the GPU's rounding, against autograd."""

import pytest
import torch
from foreign import CASES

from kdagen import zoo
from kdagen.pipeline import compile_training
from kdagen.simulate.run import simulate_training
from kdagen.simulate.verify import STATES, draw, draw_cotangents, verify_training

TWO_SEGMENTS = {"segment": 2}  # of chunks; T = 75 is three chunks of 32 tokens


def check(recurrence, gate="mild", shape=(1, 75, 1), head_dim=64, dtype="bfloat16", **schedule):
    """Every result and gradient of an op in training within its tolerance."""
    source = compile_training(recurrence, head_dim, dtype, schedule=TWO_SEGMENTS | schedule)
    verdict = verify_training(source, recurrence, shape, gate)
    assert {"d_initial_state", *(f"d_{a}" for a in source.arguments)} <= verdict.errors.keys()
    assert verdict.ok, verdict.errors
    return verdict


@pytest.mark.parametrize("name", zoo.names())
def test_gradients_of_the_zoo(name):
    check(zoo.get(name))


@pytest.mark.parametrize("name", [name for name in zoo.names() if name != "retnet"])
def test_gradients_with_full_resets(name):
    """Left out is a decay that is an argument itself and 0 for a whole head: its derivative is taken as 0 there."""
    check(zoo.get(name), "reset", shape=(1, 75, 2))


@pytest.mark.parametrize("gate", ["softplus", "bounded", "extreme"])
@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "kda_softplus"])
def test_gradients_under_every_class_of_gates(name, gate):
    check(zoo.get(name), gate)


@pytest.mark.parametrize("name", [name for name in CASES if name != "write_by_distance"])
def test_gradients_of_recurrences_outside_the_zoo(name):
    """Left out is one whose tanh is saturated on these inputs: the slope there is below fp32's rounding of 1."""
    check(CASES[name][0], shape=(1, 40, 1))


@pytest.mark.parametrize("keep", ["inputs", "states", "all"])
@pytest.mark.parametrize("name", ["kda", "mamba2"])
def test_gradients_whatever_is_kept(name, keep):
    check(zoo.get(name), keep=keep)


@pytest.mark.parametrize("dims", [128, (64, 128), (128, 64)])
def test_gradients_at_other_head_dims(dims):
    check(zoo.get("kda"), head_dim=dims, shape=(2, 40, 2))


@pytest.mark.parametrize("tokens", [1, 32, 64, 65])
def test_gradients_of_short_sequences_and_of_whole_segments(tokens):
    check(zoo.get("kda"), shape=(1, tokens, 1))


TABLES = ("cu_seqlens", "chunk_rows", "segments")  # where tokens lie: 8 bytes a slot, not modelled where they are read


def moved(verdict, kernel):
    """(bytes but for states and tables, bytes of tables that are read)."""
    traffic = verdict.statistics[kernel].traffic
    tables = sum(traffic[name].read for name in TABLES if name in traffic)
    own = sum(t.read + t.written for name, t in traffic.items() if name not in STATES) - tables
    return own, tables


@pytest.mark.parametrize("keep", ["inputs", "states", "all"])
def test_modelled_traffic_is_what_the_program_moves(keep):
    """Of 128 tokens more: states before the first and after the last token do not grow, nor does the spare slot."""
    source = compile_training(zoo.get("gated_deltanet"), 64, schedule=TWO_SEGMENTS | {"keep": keep})
    short, long = (verify_training(source, zoo.get("gated_deltanet"), (1, tokens, 1)) for tokens in (128, 256))
    modelled = {k.name: k.bytes_a_token for k in source.kernels}
    for kernel in long.statistics:
        grown, tables = (b - a for a, b in zip(moved(short, kernel), moved(long, kernel), strict=True))
        assert grown / 128 == modelled[kernel.split()[1]]
        assert tables <= 8 * (128 // 32 + 128 // 64)


def test_gradients_in_float16():
    check(zoo.get("kda"), dtype="float16")


@pytest.fixture(scope="module")
def softplus():
    """A program with parameters of the head, and inputs for it."""
    source = compile_training(zoo.get("kda_softplus"), 64, schedule=TWO_SEGMENTS)
    shape = (2, 75, 2)
    return source, (*draw(source, shape), *draw_cotangents(source, shape))


def test_no_block_touches_what_another_writes(softplus):
    source, given = softplus
    simulate_training(source, *given, check_races=True)


def test_gradients_are_the_same_bits_from_run_to_run_and_in_any_order_of_warps(softplus):
    source, given = softplus
    first, again = (simulate_training(source, *given, check_schedules=c, seeds=range(2)) for c in (False, True))
    assert torch.equal(first[3], again[3])
    assert all(torch.equal(x, again[2][name]) for name, x in first[2].items())


def test_later_cotangents_alone_reach_earlier_tokens(softplus):
    """The gradient of token t depends on the cotangents of tokens t and after, bit by bit on no other."""
    source, (tensors, state, d_out, d_final) = softplus
    changed = d_out.clone()
    changed[:, :40] += 1
    before, after = (simulate_training(source, tensors, state, d, d_final)[2] for d in (d_out, changed))
    assert all(torch.equal(before[name][:, 64:], after[name][:, 64:]) for name in ("q", "k", "v", "g", "beta"))
    assert not any(torch.equal(before[name][:, :40], after[name][:, :40]) for name in ("q", "k", "v", "g", "beta"))
