"""Sequences split in segments: executed programs against float64, and against the programs that do not split them."""

from functools import cache

import packages
import pytest
import simulated_gpu
import torch
from foreign import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import Batch, check_forward

from kdagen import zoo
from kdagen.derive.transition import transition
from kdagen.ir.tile_cost import bytes_a_token, chunk_flops
from kdagen.pipeline import compile_op, compile_stages
from kdagen.runtime.loader import load_op
from kdagen.simulate.run import simulate
from kdagen.simulate.verify import verify
from kdagen.state import DEFAULT, StateType
from kdagen.tolerance import TOLERANCE, relative_error

LENGTHS = (5, 0, 100, 1, 33, 48, 17)  # none, less than a segment, one or several and a part, exactly some
WIDE = StateType("VK", "bfloat16")


@cache
def built(name, arch="sm90", state=DEFAULT, head_dim=64, dtype="bfloat16", **schedule):
    schedule = {"chunk_size": 16, "split": 2} | schedule
    return compile_op(zoo.get(name), head_dim, dtype, arch=arch, schedule=schedule, state=state)


def families(source):
    return [kernel.family for kernel in source.kernels]


CHOICES = [  # name, arch, heads of values for each of keys, chunks from state to state, type of states, schedule
    ("kda", "sm90", 2, 1, StateType("VK"), {}),
    ("kda", "sm80", 3, 2, StateType("KV", "bfloat16"), {}),
    ("kda_softplus", "sm90", 2, 3, DEFAULT, {"split": 1}),
    ("kda_bounded", "sm100", 3, 1, WIDE, {"chunk_size": 32, "split": 1}),
    ("dplr", "sm100", 2, 1, DEFAULT, {}),
    ("deltaproduct", "sm90", 2, 1, WIDE, {"output": "split"}),
    ("rwkv7", "sm120", 1, 2, StateType("VK"), {"split": 1}),
    ("gated_deltanet", "sm90", 3, 1, StateType("VK"), {"output": "split", "split": 3}),
    ("mamba2", "sm100", 2, 1, StateType("KV", "bfloat16"), {}),
    ("retnet", "sm80", 3, 1, StateType("VK"), {"output": "split", "split": 1}),
    ("linear_attention", "sm90", 3, 2, StateType("KV", "bfloat16"), {"split": 1}),
    ("longhorn", "sm120", 1, 1, DEFAULT, {"split": 1}),
]


@pytest.mark.parametrize(("name", "arch", "group", "chunks", "state", "schedule"), CHOICES)
def test_sequences_in_a_row(name, arch, group, chunks, state, schedule):
    """With states on the way, in random orders of warps, no block touching what another one writes."""
    source = built(name, arch, state, **schedule)
    seeds = range(0 if arch == "sm80" else 1)
    check_forward(source, name, LENGTHS, every=source.chunk_size * chunks, group=group, seeds=seeds)


@pytest.mark.parametrize("name", zoo.names())
def test_the_zoo_with_full_resets(name):
    check_forward(built(name), name, (70, 33), gate="reset")


@pytest.mark.parametrize("gate", ["mild", "softplus", "bounded", "extreme"])
@pytest.mark.parametrize("name", ["kda", "gla"])
def test_gates(name, gate):
    check_forward(built(name), name, (70, 33), gate=gate)


@pytest.mark.parametrize("name", CASES)
def test_recurrences_outside_the_zoo(name):
    recurrence = CASES[name][0]
    source = compile_op(recurrence, 64, schedule={"split": 1})
    assert verify(source, recurrence, (1, 100, 1)).ok


@pytest.mark.parametrize("arch", ["sm90", "sm120"])
@pytest.mark.parametrize("head_dim", [(64, 128), (256, 64)])
def test_head_dims(head_dim, arch):
    """A transition of 256 x 256 goes through shared memory in pieces."""
    check_forward(built("kda", arch, head_dim=head_dim, split=1), "kda", (70, 0, 1), seeds=range(1))


def test_more_products_than_one_warp_group_takes():
    check_forward(built("kda", head_dim=128), "kda", (70, 33), seeds=range(1))
    check_forward(built("gla", head_dim=256), "gla", (70,), seeds=range(1))


def test_float16():
    check_forward(built("kda", dtype="float16", split=1), "kda", (100, 33))


@pytest.mark.parametrize("lengths", [(0, 0, 0, 35, 0), (0,) * 8 + (1,) * 40 + (0,) * 8, (0, 0, 0)])
def test_more_sequences_than_segments(lengths):
    check_forward(built("gated_deltanet"), "gated_deltanet", lengths, padding=3, group=2)


# -- what splitting changes


def run(source, name, lengths, slow=1.0, tensors=None, **choices):
    """(batch, output, final state) of these sequences; gates are made so much slower."""
    batch = Batch(source, zoo.get(name), lengths, **choices)
    if "g" in batch.tensors:
        batch.tensors["g"] *= slow
    return batch, *simulate(source, batch.tensors, batch.state, cu_seqlens=batch.cu_seqlens)[:2]


@pytest.mark.parametrize("slow", [1, 0.01])
@pytest.mark.parametrize("name", ["kda", "gla", "gated_deltanet"])
def test_many_segments_carry_a_state_that_lasts(name, slow):
    """64 segments of a chunk each: no further from float64 than where nothing is split."""
    errors = {}
    for split in (0, 1):
        batch, o, final = run(built(name, split=split), name, (64 * 16,), slow)
        expected, expected_final = batch.expected()
        errors[split] = relative_error(o, expected), relative_error(final, expected_final)
    assert all(split < 1.02 * whole + 1e-6 for whole, split in zip(errors[0], errors[1]))
    assert max(errors[1]) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("split", [4, 2**16])
@pytest.mark.parametrize("name", ["kda", "linear_attention", "rwkv7"])
def test_a_segment_longer_than_its_sequence_changes_no_bit(name, split):
    (_, *whole), (_, *parted) = (run(built(name, split=s), name, (64, 0, 17, 1)) for s in (0, split))
    assert all(torch.equal(a, b) for a, b in zip(whole, parted))


def test_a_sequence_alone_has_the_same_bits():
    source = built("kda")
    batch, o, final = run(source, "kda", LENGTHS, group=2)
    for s, rows in batch.filled:
        alone = simulate(source, batch.only(rows), batch.state[s : s + 1])
        assert torch.equal(alone[0], o[:, rows]) and torch.equal(alone[1][0], final[s])


def test_later_tokens_leave_earlier_outputs_bit_identical():
    source = built("kda")
    batch = Batch(source, zoo.get("kda"), (100,))
    before = simulate(source, batch.tensors, batch.state)[0]
    changed = {n: torch.cat([x[:, :40], 3 * x[:, 40:].flip(1)], 1) for n, x in batch.tensors.items()}
    changed["g"] = torch.cat([batch.tensors["g"][:, :40], torch.full_like(changed["g"][:, 40:], -torch.inf)], 1)
    after = simulate(source, changed, batch.state)[0]
    assert torch.equal(before[:, :40], after[:, :40]) and not torch.equal(before[:, 40:], after[:, 40:])


def test_a_full_reset_leaves_nothing_of_the_state_before():
    """Not even of one that is large: a transition behind a reset is zero to the bit."""
    source = built("kda", split=1)
    batch = Batch(source, zoo.get("kda"), (64,))
    batch.tensors["g"][:, 20] = -torch.inf
    few, many = (simulate(source, batch.tensors, scale * batch.state) for scale in (1, 1e20))
    assert torch.equal(few[0][:, 20:], many[0][:, 20:]) and torch.equal(few[1], many[1])


OFFSETS = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-50, 200))


@pytest.mark.parametrize("name", ["kda", "gla"])
@settings(max_examples=10, deadline=None)
@given(offsets=st.lists(OFFSETS, min_size=3, max_size=5))
def test_whatever_offsets_say_nothing_outside_is_written(name, offsets):
    source = built(name)
    batch = Batch(source, zoo.get(name), (60, *[20] * (len(offsets) - 2)))
    cu_seqlens = torch.tensor(offsets, dtype=torch.int64).int()
    *_, statistics = simulate(source, batch.tensors, batch.state, cu_seqlens=cu_seqlens)
    assert not any(s.writes_out_of_bounds for s in statistics.values())


# -- what is derived, and what it moves


@pytest.mark.parametrize("name", zoo.names())
def test_a_transition_has_products_where_the_recurrence_reads_its_state(name):
    stages = compile_stages(zoo.get(name), 64, schedule={"split": 2, "chunk_size": 16})
    program, found = stages.program, families(stages.source)
    reads = bool(stages.canonical.solving)
    assert bool(transition(program)) == reads
    made = ["transitions"] * (reads or stages.canonical.decay != 0)
    assert found == ["index", "prepare", "ends", *made, "carry", "scan"]
    (carry,) = (k for k in stages.source.kernels if k.family == "carry")
    assert carry.text.count("gemm(") == 3 * reads
    written = [b.name for k in stages.kernels if k.family == "transitions" for b in k.params if "V" in b.shape]
    assert not written


def test_transitions_read_no_values():
    (made,) = (k for k in built("dplr").kernels if k.family == "transitions")
    assert {p.role for p in made.params} == {"workspace", "cu_seqlens"}


def moved_and_computed(source, name, tokens):
    """Bytes but for states and tables, and FLOPs of products, by kernel."""
    left_out = ("cu_seqlens", "chunk_rows", "sequence_of", "initial_state", "final_state")
    verdict = verify(source, zoo.get(name), (1, tokens, 1))
    return {
        kernel: (sum(t.read + t.written for n, t in s.traffic.items() if n not in left_out), s.gemm_flops)
        for kernel, s in verdict.statistics.items()
    }


@pytest.mark.parametrize("name, head_dim", [("kda", 64), ("gla", 64), ("deltaproduct", 64), ("kda", (256, 64))])
def test_modelled_cost_is_what_the_program_does(name, head_dim):
    """Of 64 tokens more, two segments: what a sequence has once does not grow."""
    stages = compile_stages(zoo.get(name), head_dim, schedule={"split": 2, "chunk_size": 16})
    short, long = (moved_and_computed(stages.source, name, tokens) for tokens in (128, 192))
    for kernel in stages.kernels[1:]:
        grown = [(b - a) / 64 for a, b in zip(short[kernel.name], long[kernel.name])]
        assert grown == [bytes_a_token(kernel), chunk_flops(kernel) / kernel.chunk_size]


# -- a launch


def test_a_launch_makes_room_for_segments(tmp_path, monkeypatch):
    """The runtime's own launch, its kernels run as programs: the same bits as in simulation."""
    simulated_gpu.install(monkeypatch)
    source = built("kda")
    kernels = load_op(packages.write(tmp_path / "ops", source, tmp_path))
    batch, o, final = run(source, "kda", LENGTHS, padding=4)
    given = {**batch.tensors, "initial_state": batch.state, "cu_seqlens": batch.cu_seqlens}
    made = kernels.launch(given)
    assert torch.equal(made["o_out"], o) and torch.equal(made["final_state"], final)
    assert made["ends_w"].shape[1] == made["transitions_w"].shape[1] == batch.tokens // 32 + len(LENGTHS)
