"""Ragged batches, grouped heads, and states: layouts, dtypes, on the way. Forward and backward on the CPU."""

import pytest
import torch
from sequences import cut, ends_of, inputs, off, one, per_token, reference

import kdagen as kg
from kdagen.errors import GradientError
from kdagen.reference import recurrence_reference
from kdagen.runtime import cpu

HV, K, V = 4, 8, 6
LENGTHS = (5, 0, 1, 70, 0, 130, 3)
GATE_FORMS = ("kda_softplus", "kda_bounded", "kda", "mamba2", "gla")


def states(n, seed=0, dtype=torch.float64):
    return torch.randn(n, HV, K, V, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def ragged(name, groups=1, dtype=torch.float64, gate="mild", padding=0):
    return inputs(name, (1, sum(LENGTHS) + padding, HV, K, V), groups, dtype, gate)


def leaves(given: dict) -> dict:
    return {n: x.clone().requires_grad_() for n, x in given.items()}


def gradients(op, given: dict, state, **options) -> dict:
    """Those of a loss that weighs each entry of both results."""
    given, state = leaves(given), state.clone().requires_grad_()
    o, final = op(**given, initial_state=state, output_final_state=True, **options)
    d_o, d_final = (torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in (o, final))
    found = torch.autograd.grad((o, final), [*given.values(), state], (d_o, d_final))
    return dict(zip((*given, "initial_state"), found))


# -- grouped heads


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("name", kg.zoo.names())
def test_grouped_heads_forward_and_backward(name, groups):
    given, state = inputs(name, (2, 37, HV, K, V), groups), states(2)
    o, final = kg.compile(name)(**given, initial_state=state, output_final_state=True)
    o_ref, final_ref = recurrence_reference(kg.load(name), given, state)
    assert off(o, o_ref) < 1e-12 and off(final, final_ref) < 1e-12
    call = lambda initial_state, output_final_state, **x: recurrence_reference(kg.load(name), x, initial_state)  # noqa: E731
    right = gradients(call, given, state)
    for n, x in gradients(kg.compile(name), given, state).items():
        assert x.shape == (given | {"initial_state": state})[n].shape
        assert (x - right[n]).norm() <= 1e-10 * right[n].norm(), n


def test_value_head_j_has_key_head_j_times_h_over_hv():
    given = inputs("kda", (1, 20, HV, K, V), 2)
    wide = given | {n: given[n].repeat_interleave(2, 2) for n in ("q", "k")}
    op = kg.compile("kda")
    assert torch.equal(op(**given)[0], op(**wide)[0])


# -- ragged batches


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", kg.zoo.names())
def test_a_ragged_batch_equals_the_oracle_on_each_sequence(name, dtype):
    given, state, cu = ragged(name, 2), states(len(LENGTHS)), ends_of(LENGTHS, dtype)
    o, final = kg.compile(name)(**given, initial_state=state, output_final_state=True, cu_seqlens=cu)
    o_ref, final_ref = reference(name, given, state, LENGTHS)
    assert off(o, o_ref) < 1e-12 and off(final, final_ref) < 1e-12


@pytest.mark.parametrize("gate", ["softplus", "reset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [*GATE_FORMS, "deltaproduct", "rwkv7"])
def test_sequences_have_the_bits_that_they_have_alone(name, dtype, gate):
    given, state = ragged(name, 1, dtype, gate), states(len(LENGTHS), 1, torch.promote_types(dtype, torch.float32))
    op = kg.compile(name)
    o, final = op(**given, initial_state=state, output_final_state=True, cu_seqlens=ends_of(LENGTHS))
    end = 0
    for n, length in enumerate(LENGTHS):
        start, end = end, end + length
        alone = op(**cut(name, given, start, end), initial_state=state[n : n + 1], output_final_state=True)
        assert torch.equal(o[:, start:end], alone[0]) and torch.equal(final[n : n + 1], alone[1])
        if not length:
            assert torch.equal(final[n], state[n])


@pytest.mark.parametrize("name", [*GATE_FORMS, "gated_deltanet", "deltaproduct", "linear_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_has_the_bits_of_its_sequences(name, dtype):
    for seed, shape in enumerate([(5, 64, 3, 24, 4), (2, 5, 4, 16, 128), (3, 70, 1, 16, 16)]):
        given, op = inputs(name, shape, 1, dtype, seed=seed), kg.compile(name)
        o, final = op(**given, output_final_state=True)
        for n in range(shape[0]):
            alone = op(**one(name, given, n), output_final_state=True)
            assert torch.equal(o[n : n + 1], alone[0]) and torch.equal(final[n : n + 1], alone[1])


@pytest.mark.parametrize("keep", ["inputs", "states"])
@pytest.mark.parametrize("name", ["kda_softplus", "gated_deltanet", "deltaproduct", "rwkv7"])
def test_gradients_of_a_ragged_batch_are_those_of_its_sequences(name, keep):
    op, given, state = kg.compile(name, keep=keep), ragged(name, 2), states(len(LENGTHS))
    cu, given, state = ends_of(LENGTHS), leaves(given), state.requires_grad_()
    o, final = op(**given, initial_state=state, output_final_state=True, cu_seqlens=cu)
    d_o, d_final = (torch.randn(x.shape, dtype=x.dtype) for x in (o, final))
    found = torch.autograd.grad((o, final), [*given.values(), state], (d_o, d_final))
    end, total = 0, [torch.zeros_like(x) for x in (*given.values(), state)]
    for n, length in enumerate(LENGTHS):
        start, end = end, end + length
        results = op(**cut(name, given, start, end), initial_state=state[n : n + 1], output_final_state=True)
        cotangents = d_o[:, start:end], d_final[n : n + 1]
        for sums, x in zip(total, torch.autograd.grad(results, [*given.values(), state], cotangents), strict=True):
            sums += x
    for n, x, right in zip((*given, "initial_state"), found, total, strict=True):
        exact = n in per_token(name) or n == "initial_state"
        assert torch.equal(x, right) if exact else off(x, right) < 1e-12, n


def test_padding_gives_zeros_and_may_hold_anything():
    given, state = ragged("kda_softplus", padding=9), states(len(LENGTHS))
    for n in per_token("kda_softplus"):
        given[n][:, sum(LENGTHS) :] = float("nan")
    op, cu = kg.compile("kda_softplus"), ends_of(LENGTHS)
    o, final = op(**given, initial_state=state, output_final_state=True, cu_seqlens=cu)
    right = op(
        **cut("kda_softplus", given, 0, sum(LENGTHS)), initial_state=state, output_final_state=True, cu_seqlens=cu
    )
    assert torch.equal(o[:, : sum(LENGTHS)], right[0]) and torch.equal(final, right[1])
    assert not o[:, sum(LENGTHS) :].any()
    for n, x in gradients(op, given, state, cu_seqlens=cu).items():
        assert not x[:, sum(LENGTHS) :].any() if n in per_token("kda_softplus") else x.isfinite().all()


@pytest.mark.parametrize("cu", [[0], [0, 0, 0]])
def test_a_ragged_batch_without_sequences_or_tokens_of_them(cu):
    given, cu = inputs("kda", (1, 7, HV, K, V)), torch.tensor(cu)
    o, final = kg.compile("kda")(**given, output_final_state=True, cu_seqlens=cu)
    assert not o.any() and tuple(final.shape) == (len(cu) - 1, HV, K, V) and not final.any()


# -- types of states


@pytest.mark.parametrize("layout", ["KV", "VK"])
@pytest.mark.parametrize(("kind", "dtype"), [("float32", torch.float64), ("bfloat16", torch.bfloat16)])
def test_layout_and_dtype_of_states_and_of_their_cotangents(layout, kind, dtype):
    given, state = inputs("kda", (2, 70, HV, K, V)), states(2).bfloat16()
    op = kg.compile("kda", state_layout=layout, state_dtype=kind)
    turn = (lambda x: x) if layout == "KV" else (lambda x: x.mT)
    start = turn(state).to(dtype).contiguous().requires_grad_()
    given = leaves(given)
    o, final = op(**given, initial_state=start, output_final_state=True)
    right = recurrence_reference(kg.load("kda"), given, state.double())
    assert final.dtype == dtype and final.is_contiguous() and final.kdagen_layout == layout
    assert off(o, right[0]) < 1e-12 and off(turn(final), right[1]) < (1e-12 if dtype == torch.float64 else 3e-3)
    d_final = torch.linspace(-1, 1, final.numel()).view(final.shape).to(dtype)
    (d_start,) = torch.autograd.grad(final, start, d_final)
    leaf = state.double().requires_grad_()
    end = recurrence_reference(kg.load("kda"), given, leaf)[1]
    (right,) = torch.autograd.grad(end, leaf, turn(d_final).double())
    assert d_start.dtype == dtype and off(turn(d_start), right) < (1e-12 if dtype == torch.float64 else 3e-3)


@pytest.mark.parametrize("every", [1, 5, 16, 64, 128, 1000])
@pytest.mark.parametrize("layout", ["KV", "VK"])
def test_states_on_the_way(every, layout):
    given, state = inputs("kda", (2, 130, HV, K, V)), states(2)
    op = kg.compile("kda", state_layout=layout)
    turn = (lambda x: x) if layout == "KV" else (lambda x: x.mT)
    start = turn(state).contiguous()
    o, final, found = op(**given, initial_state=start, output_final_state=True, states_every=every)
    assert off(o, recurrence_reference(kg.load("kda"), given, state)[0]) < 1e-12
    assert found.shape[:2] == (2, 130 // every) and found.is_contiguous()
    for i in range(130 // every):
        right = recurrence_reference(kg.load("kda"), cut("kda", given, 0, (i + 1) * every), state)[1]
        assert off(turn(found[:, i]), right) < 1e-12
    assert torch.equal(final, found[:, -1]) if 130 % every == 0 else final.isfinite().all()


@pytest.mark.parametrize("every", [1, 7, 64])
def test_states_on_the_way_of_a_ragged_batch(every):
    given, state, cu = ragged("kda"), states(len(LENGTHS)), ends_of(LENGTHS)
    o, _, found = kg.compile("kda")(**given, initial_state=state, cu_seqlens=cu, states_every=every)
    assert off(o, reference("kda", given, state, LENGTHS)[0]) < 1e-12
    assert tuple(found.shape) == (1, sum(LENGTHS) // every, HV, K, V)
    used = set()
    for n, start in enumerate(cu[:-1].tolist()):
        for i in range(LENGTHS[n] // every):
            tokens = cut("kda", given, start, start + (i + 1) * every)
            right = recurrence_reference(kg.load("kda"), tokens, state[n : n + 1])[1]
            assert off(found[:, start // every + i], right) < 1e-12
            used.add(start // every + i)
    assert all(not found[:, i].any() for i in range(found.shape[1]) if i not in used)


def test_states_on_the_way_are_for_inference():
    given = leaves(inputs("kda", (1, 20, HV, K, V)))
    with pytest.raises(GradientError, match="states_every=4 is for inference and has no gradient"):
        kg.compile("kda")(**given, states_every=4)


# -- guarantees


@pytest.mark.parametrize("name", ["kda_softplus", "gated_deltanet", "gla", "rwkv7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_and_other_sequences_change_no_bit(name, dtype):
    """Nor does NaN in other sequences: checks of values, which would refuse it, come before what runs here."""
    op, given = kg.compile(name), ragged(name, 1, dtype)
    ends, state = ends_of(LENGTHS).tolist(), states(len(LENGTHS), 0, torch.float32)
    o, final = cpu.run(op.program, given, state, dtype, ends)[:2]
    middle = ends[3] + 40  # a token of the fourth sequence
    other = inputs(name, (1, sum(LENGTHS), HV, K, V), 1, dtype, "extreme", seed=1)
    for value in (0.0, float("nan")):
        changed = {n: x.clone() for n, x in given.items()}
        for n in per_token(name):
            changed[n][:, middle:] = other[n][:, middle:]
            changed[n][:, : ends[3]] = changed[n][:, ends[4] :] = value
        o_changed, final_changed = cpu.run(op.program, changed, state, dtype, ends)[:2]
        assert torch.equal(o[:, ends[3] : middle], o_changed[:, ends[3] : middle])
        assert torch.equal(final[1], final_changed[1])  # of an empty sequence


def test_replays_are_identical_and_inputs_stay_as_they_were():
    op, state, cu = kg.compile("kda_softplus"), states(len(LENGTHS), 0, torch.float32), ends_of(LENGTHS)
    given = ragged("kda_softplus", 2, torch.float32)
    before = {n: x.clone() for n, x in given.items()}
    first = gradients(op, given, state, cu_seqlens=cu)
    for _ in range(3):
        assert all(torch.equal(x, first[n]) for n, x in gradients(op, given, state, cu_seqlens=cu).items())
    assert all(torch.equal(x, before[n]) for n, x in given.items())


# -- as torch ops


@pytest.mark.parametrize("keep", ["inputs", "states"])
def test_opcheck(keep):
    op, given, cu = kg.compile("kda_softplus", keep=keep), ragged("kda_softplus", 2, torch.float32), ends_of(LENGTHS)
    state, given = states(len(LENGTHS), 0, torch.float32), [x.requires_grad_() for x in given.values()]
    with torch.no_grad():
        o, end, kept = op.training_op(*given, state, True, cu)
    fixed = [x.detach() for x in given]
    for torch_op, arguments in (
        (op.torch_op, (*fixed, state, True, cu, 7)),
        (op.torch_op, (*given, state.requires_grad_(), True, cu)),
        (op.training_op, (*given, state, True, cu)),
        (op.backward_op, (*fixed, state.detach(), cu, kept, o, end)),
        (op.recurrent_op, (*fixed, state.detach(), True, cu)),
    ):
        checks = torch.library.opcheck(torch_op, arguments)
        assert set(checks.values()) == {"SUCCESS"} and len(checks) == 4


def test_torch_compile_of_training_on_ragged_batches_of_any_length():
    op = kg.compile("kda_softplus")
    given = leaves(ragged("kda_softplus", 2, torch.float32))

    def loss(cu, **tensors):
        o, state = op(**tensors, output_final_state=True, cu_seqlens=cu)
        return o.square().sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in (LENGTHS, (70, 20), (3, 0, 100)):
        part = leaves(cut("kda_softplus", {n: x.detach() for n, x in given.items()}, 0, sum(lengths)))
        results = [torch.autograd.grad(f(ends_of(lengths), **part), list(part.values())) for f in (compiled, loss)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
