"""The decode kernels, executed with the GPU's rounding, against the float64 recurrence; and what they touch."""

from functools import cache

import pytest
import torch
from foreign import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.errors import ArgumentError
from kdagen.pipeline import compile_decode, compile_op
from kdagen.reference import recurrence_reference
from kdagen.simulate.decode import simulate_decode
from kdagen.simulate.run import simulate
from kdagen.state import StateType

GATES = ("mild", "softplus", "bounded", "extreme", "reset")
STATES = [StateType(layout, dtype) for layout in ("KV", "VK") for dtype in ("float32", "bfloat16")]
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}
STATE_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}  # sums are fp32, so only storage rounds


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


class Pool:
    """A decode op with sample inputs of (B, T, H), and a pool of states that hold no zeros."""

    def __init__(
        self, recurrence, shape=(2, 3, 2), gate="mild", head_dim=(64, 64), state=STATES[0], slots=0, **choices
    ):
        self.recurrence, self.state = recurrence, state
        self.op = compile_decode(recurrence, head_dim, state=state, **choices)
        specs = {p.name: p for p in self.op.kernels[0].params}
        dims = (self.op.dims["K"], self.op.dims["V"])
        inputs = zoo.sample(canonical(recurrence), (*shape, *dims), gate, 0)
        self.inputs = {name: x.to(TORCH[specs[name].dtype]) for name, x in inputs.items() if name in specs}
        generator = torch.Generator().manual_seed(1)
        self.states = 0.1 * torch.randn(slots or shape[0], shape[2], *dims, generator=generator)
        self.states = self.states.to(TORCH[state.dtype])

    def decode(self, *args, **options):
        """Output, the states afterwards as [S, HV, K, V], and statistics; nothing is read or written out of bounds."""
        pool = self.turned(self.states).contiguous().clone()
        o, statistics = simulate_decode(self.op, self.inputs, pool, *args, check_races=True, **options)
        assert statistics.reads_out_of_bounds == statistics.writes_out_of_bounds == 0
        return o, self.turned(pool), statistics

    def turned(self, states):
        return states if self.state.layout == "KV" else states.mT

    def reference(self, slot, tokens=slice(None), sequence=0):
        """Output [T, H, V] and state [H, K, V] of tokens of a sequence that starts from a slot."""
        per_token = {a.name for a in canonical(self.recurrence).arguments if a.per_token}
        inputs = {n: x[sequence : sequence + 1, tokens] if n in per_token else x for n, x in self.inputs.items()}
        o, final = recurrence_reference(self.recurrence, inputs, self.states[slot : slot + 1])
        return o[0], final[0]

    def close(self, o, states, o_ref, states_ref):
        assert relative(o, o_ref) < TOLERANCE[self.op.dtype]
        assert relative(states, states_ref) < STATE_TOLERANCE[self.state.dtype]

    def check(self):
        """All sequences, each from its own slot."""
        o, states, _ = self.decode()
        expected = recurrence_reference(self.recurrence, self.inputs, self.states)
        self.close(o, states, *expected)
        return self


@pytest.mark.parametrize("state", STATES, ids=lambda s: f"{s.layout}-{s.dtype}")
@pytest.mark.parametrize("name", zoo.names())
def test_zoo_in_every_type_of_state(name, state):
    Pool(zoo.get(name), head_dim=(128, 128), gate="softplus", shape=(1, 3, 2), state=state).check()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", zoo.names())
def test_zoo_in_every_class_of_gates(name, gate):
    Pool(zoo.get(name), (2, 6, 1), gate).check()


@pytest.mark.parametrize("state, gate", [(STATES[0], "mild"), (STATES[3], "reset")], ids=["KV-mild", "VK-reset"])
@pytest.mark.parametrize("name", CASES)
def test_recurrences_outside_the_zoo(name, state, gate):
    Pool(CASES[name][0], (1, 4, 1), gate, state=state).check()


@pytest.mark.parametrize("state", STATES, ids=lambda s: f"{s.layout}-{s.dtype}")
@pytest.mark.parametrize("head_dim", [(64, 64), (64, 128), (128, 64), (256, 128), (128, 256), (256, 256)])
@pytest.mark.parametrize("name", ["kda_softplus", "gdn2"])
def test_head_dims(name, head_dim, state):
    Pool(zoo.get(name), (1, 2, 1), head_dim=head_dim, state=state).check()


@pytest.mark.parametrize("schedule", [{"v_tile": 16, "threads": 32}, {"v_tile": 64}, {"v_tile": 64, "threads": 256}])
@pytest.mark.parametrize("state", [STATES[0], STATES[3]], ids=lambda s: s.layout)
def test_schedules(state, schedule):
    Pool(zoo.get("kda"), (1, 2, 1), state=state, schedule=schedule).check()


@pytest.mark.parametrize("choices", [{"dtype": "float16"}, {"gate_dtype": "float32"}, {"arch": "sm80"}])
def test_dtypes_and_targets(choices):
    Pool(zoo.get("kda"), gate="bounded", **choices).check()


@pytest.mark.parametrize("name", zoo.names())
def test_grouped_heads_share_keys(name):
    pool = Pool(zoo.get(name), (2, 2, 6))
    heads = {a.name: canonical(pool.recurrence).heads(a) for a in canonical(pool.recurrence).arguments}
    pool.inputs = {n: x[:, :, ::3] if heads[n] == "H" else x for n, x in pool.inputs.items()}
    pool.check()


def test_ragged_tokens_and_empty_sequences():
    pool = Pool(zoo.get("kda"), (1, 9, 2), slots=4)
    cu = torch.tensor([0, 3, 3, 4, 7])  # tokens 7 and 8 are padding
    o, states, _ = pool.decode(cu_seqlens=cu)
    for n in (0, 2, 3):
        here = slice(cu[n], cu[n + 1])
        pool.close(o[0, here], states[n], *pool.reference(n, here))
    assert torch.equal(states[1], pool.states[1]) and not o[0, 7:].any()


@pytest.mark.parametrize("state", STATES, ids=lambda s: f"{s.layout}-{s.dtype}")
def test_states_are_found_by_index_and_null_slots_left_alone(state):
    pool = Pool(zoo.get("kda"), (5, 2, 2), slots=7, state=state)
    o, states, _ = pool.decode(torch.tensor([6, 0, 3, -1, 99]), null_below=1)
    for n, slot in ((0, 6), (2, 3)):
        pool.close(o[n], states[slot], *pool.reference(slot, sequence=n))
    assert not o[[1, 3, 4]].any()
    untouched = [0, 1, 2, 4, 5]
    assert torch.equal(states[untouched], pool.states[untouched])


def test_a_negative_index_is_null_even_below_a_negative_bound():
    pool = Pool(zoo.get("gla"), (2, 1, 1), slots=3)
    o, states, _ = pool.decode(torch.tensor([-1, 2]), null_below=-5)
    assert not o[0].any() and torch.equal(states[:2], pool.states[:2])


def test_states_go_to_another_pool_and_the_first_is_kept():
    pool = Pool(zoo.get("kda"), (2, 2, 1), slots=3)
    new = torch.full_like(pool.states, 7.0)
    before = pool.states.clone()
    o, _ = simulate_decode(pool.op, pool.inputs, pool.states, torch.tensor([2, 0]), new_state_pool=new)
    assert torch.equal(pool.states, before) and (new[1] == 7.0).all()
    pool.close(o[0], new[2], *pool.reference(2, sequence=0))
    pool.close(o[1], new[0], *pool.reference(0, sequence=1))


@pytest.mark.parametrize("state", STATES, ids=lambda s: f"{s.layout}-{s.dtype}")
def test_speculative_tokens_leave_a_state_each(state):
    pool = Pool(zoo.get("kda"), (4, 3, 2), slots=16, state=state)
    indices = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 8], [9, 10, 11, 12], [13, 14, 0, 15]])
    accepted = torch.tensor([1, 4, 2, 3])  # sequence 3 starts from a null slot
    o, states, _ = pool.decode(indices, accepted, null_below=1)
    for n in range(3):
        start = indices[n, accepted[n] - 1]
        o_ref, _ = pool.reference(start, sequence=n)
        assert relative(o[n], o_ref) < TOLERANCE["bfloat16"]
        for t in range(3):
            if indices[n, t]:
                _, state_ref = pool.reference(start, slice(0, t + 1), n)
                assert relative(states[indices[n, t]], state_ref) < STATE_TOLERANCE[state.dtype]
    assert not o[3].any()
    untouched = [0, 4, 7, 8, 12, 13, 14, 15]
    assert torch.equal(states[untouched], pool.states[untouched])


def test_tokens_beyond_the_columns_are_not_stored():
    pool = Pool(zoo.get("kda"), (1, 4, 1), slots=3)
    o, states, _ = pool.decode(torch.tensor([[0, 2]]))
    for t in range(2):
        assert relative(states[2 * t], pool.reference(0, slice(0, t + 1))[1]) < STATE_TOLERANCE["float32"]
    assert relative(o[0], pool.reference(0)[0]) < TOLERANCE["bfloat16"]
    assert torch.equal(states[1], pool.states[1])


@cache
def gla() -> Pool:
    return Pool(zoo.get("gla"), (1, 5, 1), slots=3)


wild = st.one_of(st.integers(-3, 9), st.sampled_from([-(2**31), 2**31 - 1]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(wild, min_size=3, max_size=3), st.lists(wild, min_size=4, max_size=4), st.tuples(wild, wild), wild)
def test_bad_values_write_nothing_outside(cu, indices, accepted, null_below):
    """Guards beside the pool and the output keep their bits, and no access is out of bounds."""
    pool = gla()
    guarded = torch.full((5, 1, 64, 64), 3.0)
    guarded[1:4] = pool.states
    _, statistics = simulate_decode(
        pool.op, pool.inputs, guarded[1:4], torch.tensor(indices).view(2, 2), torch.tensor(accepted),
        torch.tensor(cu), null_below,
    )  # fmt: skip
    assert (guarded[0] == 3.0).all() and (guarded[4] == 3.0).all() and torch.isfinite(guarded).all()
    assert statistics.reads_out_of_bounds == statistics.writes_out_of_bounds == 0


@cache
def kernels(name, state):
    """The kernels for whole sequences, and those for tokens one after another."""
    return compile_op(zoo.get(name), 64, state=state), compile_decode(zoo.get(name), 64, state=state)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.sampled_from(["kda", "kda_softplus", "mamba2", "dplr", "deltaproduct"]),
    st.sampled_from([STATES[0], STATES[1], STATES[2]]),
    st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=2, max_size=4),
)
def test_a_sequence_in_pieces_by_chunks_and_by_tokens(name, state, pieces):
    """Whichever kernels take a piece, (tokens, decoded or not), they go on where the others stopped."""
    whole, step = kernels(name, state)
    pool = Pool(zoo.get(name), (1, sum(n for n, _ in pieces), 2), "softplus", state=state)
    states, outputs, start = pool.turned(pool.states.clone()).contiguous(), [], 0
    per_token = {a.name for a in canonical(pool.recurrence).arguments if a.per_token}
    for tokens, decoded in pieces:
        piece = slice(start, start := start + tokens)
        inputs = {n: x[:, piece].contiguous() if n in per_token else x for n, x in pool.inputs.items()}
        if decoded:
            outputs.append(simulate_decode(step, inputs, states)[0])
        else:
            o, states, _ = simulate(whole, inputs, states)
            outputs.append(o)
    o_ref, state_ref = recurrence_reference(pool.recurrence, pool.inputs, pool.states)
    stored = 1 if state.dtype == "float32" else 2  # a state in bfloat16 is rounded between pieces
    assert relative(torch.cat(outputs, 1), o_ref) < stored * TOLERANCE["bfloat16"]
    assert relative(pool.turned(states), state_ref) < stored * TOLERANCE["bfloat16"]


def test_a_sequence_alone_and_in_a_batch_gives_the_same_bits():
    pool = Pool(zoo.get("kda_softplus"), (3, 2, 2))
    o, states, _ = pool.decode()
    per_token = {a.name for a in canonical(pool.recurrence).arguments if a.per_token}
    for n in range(3):
        alone = {name: x[n : n + 1] if name in per_token else x for name, x in pool.inputs.items()}
        state = pool.states[n : n + 1].clone()
        assert torch.equal(simulate_decode(pool.op, alone, state)[0][0], o[n])
        assert torch.equal(state[0], states[n])


@pytest.mark.parametrize("state", STATES, ids=lambda s: f"{s.layout}-{s.dtype}")
def test_modelled_traffic_is_what_moves(state):
    pool = Pool(zoo.get("kda"), (3, 1, 2), head_dim=(128, 128), state=state)
    statistics = pool.decode()[2]
    words = 4 * 4 * 6  # of cu_seqlens, indices and counts, which every block reads
    assert pool.op.kernels[0].bytes_a_token <= statistics.bytes_moved / 6 <= pool.op.kernels[0].bytes_a_token + words
    if state.dtype == "float32":
        assert pool.op.kernels[0].bytes_a_token < 1.05 * 2 * 128 * 128 * 4


def test_a_kernel_for_whole_sequences_is_refused():
    with pytest.raises(ArgumentError, match="kda: has no kernel for decoding: expected what pipeline.compile_decode"):
        simulate_decode(compile_op(zoo.get("kda"), 64), {}, None)
