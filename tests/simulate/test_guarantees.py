"""What executed programs promise to the bit: causality, independence of the batch, replays, no stray write."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import Batch

from kdagen import zoo
from kdagen.build import adapter
from kdagen.pipeline import compile_op, compile_training
from kdagen.simulate.program import Simulator
from kdagen.simulate.run import simulate, simulate_training
from kdagen.simulate.torch_arrays import to_numpy

LENGTHS = (7, 40, 0, 23, 1)
ONE_AND_SPLIT = [("kda", "fused"), ("kda_bounded", "fused"), ("gated_deltanet", "split"), ("deltaproduct", "fused")]


@cache
def inference(name, output="fused"):
    return compile_op(zoo.get(name), 64, schedule={"output": output, "chunk_size": 16})


@cache
def training(name, keep="states"):
    return compile_training(zoo.get(name), 64, schedule={"segment": 2, "chunk_size": 16, "keep": keep})


def forward(source, batch, tensors=None):
    o, final, states, _ = simulate(
        source, tensors or batch.tensors, batch.state, cu_seqlens=batch.cu_seqlens, states_every=16
    )
    return o, final, states


def both(source, batch, tensors=None, d_out=None):
    given = tensors or batch.tensors, batch.state, batch.d_out if d_out is None else d_out, batch.d_final
    o, final, gradients, d_state, _ = simulate_training(source, *given, cu_seqlens=batch.cu_seqlens)
    return o, final, gradients, d_state


def spoiled(batch, rows, values):
    """The arguments with `values` of each in some rows: a number, or a function of what there is."""
    tensors = {name: x.clone() for name, x in batch.tensors.items()}
    for name in batch.per_token:
        tensors[name][:, rows] = values(tensors[name][:, rows]) if callable(values) else values
    return tensors


@pytest.mark.parametrize(("name", "output"), ONE_AND_SPLIT)
def test_later_tokens_leave_earlier_outputs_as_they_are(name, output):
    """The second sequence has the tokens from 7 to 46, chunks of 16 that begin at 7; from `times` on it changes."""
    source = inference(name, output)
    batch = Batch(source, zoo.get(name), LENGTHS, heads=1, group=2)
    o, final, states = forward(source, batch)
    for t in (7, 8, 23, 30, 46):
        later = spoiled(batch, slice(t, 47), lambda x: x.flip(1) * 0.5 + x * 0.25)
        o2, final2, states2 = forward(source, batch, later)
        assert torch.equal(o[:, :t], o2[:, :t]) and torch.equal(o[:, 47:], o2[:, 47:])
        assert not torch.equal(o[:, t:47], o2[:, t:47])
        assert torch.equal(final[[0, 2, 3, 4]], final2[[0, 2, 3, 4]])
        kept = [slot for slot, end in ((0, 23), (1, 39)) if end <= t]  # states of the second sequence
        assert torch.equal(states[kept], states2[kept])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("name", "output"), ONE_AND_SPLIT)
def test_later_tokens_that_are_no_numbers_spoil_no_chunk_before_theirs(name, output, value):
    source = inference(name, output)
    batch = Batch(source, zoo.get(name), LENGTHS, heads=1, group=2)
    o, final, states = forward(source, batch)
    for chunk, t in ((7, 7), (23, 29)):
        o2, final2, states2 = forward(source, batch, spoiled(batch, slice(t, 47), value))
        assert torch.equal(o[:, :chunk], o2[:, :chunk]) and torch.equal(o[:, 47:], o2[:, 47:])
        assert torch.equal(final[[0, 2, 3, 4]], final2[[0, 2, 3, 4]])
        kept = [slot for slot, end in ((0, 23), (1, 39)) if end <= chunk]
        assert torch.equal(states[kept], states2[kept])


@pytest.mark.parametrize(("name", "output"), ONE_AND_SPLIT)
def test_a_sequence_alone_is_the_same_as_in_a_batch_whatever_lies_around_it(name, output):
    source = inference(name, output)
    batch = Batch(source, zoo.get(name), LENGTHS, 5, heads=1, group=2)
    o, final, states = forward(source, batch)
    for s, rows in batch.filled:
        tensors, one = batch.only(rows), slice(s, s + 1)
        o_alone, final_alone, states_alone, _ = simulate(source, tensors, batch.state[one], states_every=16)
        assert torch.equal(o[:, rows], o_alone) and torch.equal(final[one], final_alone)
        count = (rows.stop - rows.start) // 16
        assert torch.equal(states[rows.start // 16 :][:count], states_alone[:count])
        others = spoiled(batch, [t for t in range(batch.tokens) if not rows.start <= t < rows.stop], float("nan"))
        o_among, final_among, _ = forward(source, batch, others)
        assert torch.equal(o[:, rows], o_among[:, rows]) and torch.equal(final[one], final_among[one])


def test_a_sequence_is_the_same_at_any_offset_and_beside_others():
    source = inference("kda")
    batch = Batch(source, zoo.get("kda"), (37,), heads=1, group=2)
    alone = simulate(source, batch.tensors, batch.state)[:2]
    for before in (0, 1, 15, 16, 17, 50):
        around = Batch(source, zoo.get("kda"), (before, 37, 3), heads=1, group=2, seed=before)
        tensors = {n: x.clone() for n, x in around.tensors.items()}
        for name in batch.per_token:
            tensors[name][:, before : before + 37] = batch.tensors[name]
        state = torch.cat([around.state[:1], batch.state, around.state[2:]])
        o, final, _ = simulate(source, tensors, state, cu_seqlens=around.cu_seqlens)
        assert torch.equal(o[:, before : before + 37], alone[0]) and torch.equal(final[1:2], alone[1])
    stacked = {n: torch.cat([x, x.flip(1), x]) for n, x in batch.tensors.items()}
    o, final, _ = simulate(source, stacked, batch.state.repeat(3, 1, 1, 1))
    assert all(torch.equal(o[b : b + 1], alone[0]) and torch.equal(final[b : b + 1], alone[1]) for b in (0, 2))


@pytest.mark.parametrize(("name", "keep"), [("kda", "states"), ("gated_deltanet", "inputs"), ("dplr", "all")])
def test_gradients_of_a_sequence_alone_are_those_in_a_batch_whatever_lies_around_it(name, keep):
    source = training(name, keep)
    batch = Batch(source, zoo.get(name), (7, 35, 0, 2), 5, heads=1, group=2)
    _, _, gradients, d_state = both(source, batch)
    for s, rows in batch.filled:
        one, d_out = slice(s, s + 1), batch.d_out[:, rows]
        _, _, alone, d_alone, _ = simulate_training(
            source, batch.only(rows), batch.state[one], d_out, batch.d_final[one]
        )
        assert torch.equal(d_state[one], d_alone)
        assert all(torch.equal(gradients[n][:, rows], alone[n]) for n in batch.per_token)
        outside = [t for t in range(batch.tokens) if not rows.start <= t < rows.stop]
        d_out = batch.d_out.clone()
        d_out[:, outside] = float("nan")
        _, _, among, d_among = both(source, batch, spoiled(batch, outside, float("nan")), d_out)
        assert torch.equal(d_state[one], d_among[one])
        assert all(torch.equal(gradients[n][:, rows], among[n][:, rows]) for n in batch.per_token)


def test_the_same_bits_from_run_to_run():
    source = training("kda_softplus")
    batch = Batch(source, zoo.get("kda_softplus"), LENGTHS, 5, heads=1, group=2)
    (o, final, gradients, d_state), again = both(source, batch), both(source, batch)
    assert torch.equal(o, again[0]) and torch.equal(final, again[1]) and torch.equal(d_state, again[3])
    assert all(torch.equal(x, again[2][name]) for name, x in gradients.items())
    source = inference("kda")
    assert all(torch.equal(x, y) for x, y in zip(forward(source, batch_of_kda()), forward(source, batch_of_kda())))


def batch_of_kda():
    return Batch(inference("kda"), zoo.get("kda"), LENGTHS, 5, heads=1, group=2)


OFFSET = st.one_of(
    st.integers(-(2**31), 2**31 - 1), st.integers(-40, 120), st.sampled_from([-(2**31), 2**31 - 1, 2**31 - 16])
)


@settings(max_examples=12, deadline=None)
@given(
    cu_seqlens=st.lists(OFFSET, min_size=2, max_size=5),
    tokens=st.integers(1, 50),
    name=st.sampled_from(["kda", "gated_deltanet"]),
    output=st.sampled_from(["fused", "split"]),
)
def test_offsets_that_are_none_write_nothing_outside(cu_seqlens, tokens, name, output):
    for source, run in ((inference(name, output), forward_bounds), (training(name, "inputs"), training_bounds)):
        batch = Batch(source, zoo.get(name), [0] * (len(cu_seqlens) - 2) + [tokens], 0)
        batch.cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
        assert not any(s.writes_out_of_bounds for s in run(source, batch))


def forward_bounds(source, batch):
    *_, statistics = simulate(source, batch.tensors, batch.state, cu_seqlens=batch.cu_seqlens, states_every=16)
    return statistics.values()


def training_bounds(source, batch):
    given = batch.tensors, batch.state, batch.d_out, batch.d_final
    *_, statistics = simulate_training(source, *given, cu_seqlens=batch.cu_seqlens)
    return [s for which in statistics.values() for s in which.values()]


@cache
def simulator(kernel):
    return Simulator(adapter.trace(kernel.text, kernel.name, f"<guarded {kernel.name}>"))


TABLES = {"chunk_rows", "segments", "cu_seqlens"}
KERNELS = [("gated_deltanet", "split", k) for k in ("prepare", "scan", "output")]
KERNELS += [("gated_deltanet", None, k) for k in ("prepare", "scan", "replay", "reverse", "gradients")]


@settings(max_examples=8, deadline=None)
@given(numbers=st.lists(OFFSET, min_size=40, max_size=40))
@pytest.mark.parametrize(("name", "output", "which"), KERNELS)
def test_tables_that_are_none_write_nothing_outside(name, output, which, numbers):
    """Each kernel by itself with any numbers where the index kernel leaves its own; bytes around its tensors stay."""
    source = inference(name, output) if output else training(name, "inputs")
    (kernel,) = (k for k in source.kernels if k.name == f"{name}_{which}")
    sizes = {"T": 40, "N": 3, "N1": 4, "H": 1, "HV": 2, "NC": 5, "NG": 4, "NS": 2}
    arrays, guards = [], []
    for spec in kernel.params:
        if spec.role == "scalar":
            arrays.append(1)
            continue
        shape = [sizes.get(n, n) for n in spec.shape]
        dtype = getattr(torch, spec.dtype)
        guarded = torch.full((shape[0] + 2, *shape[1:]), 7, dtype=dtype)
        if spec.name in TABLES:
            guarded[1:-1] = torch.tensor(numbers[: np.prod(shape)], dtype=dtype).reshape(shape)
        arrays.append(to_numpy(guarded)[1:-1])
        guards.append(guarded)
    run = simulator(kernel)
    run(*arrays)
    assert not run.statistics.writes_out_of_bounds
    assert all((x[0] == 7).all() and (x[-1] == 7).all() for x in guards)
