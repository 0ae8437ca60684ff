"""Each message about ragged batches, states, slots and values; and that nothing is written before it."""

import re

import pytest
import torch

import kdagen as kg
from kdagen.errors import ArgumentError

T, H, HV, K, V, S = 10, 2, 4, 8, 6, 5
SHAPES = {"q": (1, T, H, K), "k": (1, T, H, K), "v": (1, T, HV, V), "g": (1, T, HV, K), "beta": (1, T, HV)}
NAN, INF = float("nan"), float("inf")


def raises(message: str):
    return pytest.raises(ArgumentError, match="^" + re.escape(message) + "$")


def arguments(batch: int = 1, **changes) -> dict:
    shapes = {n: (batch, *s[1:]) for n, s in SHAPES.items()}
    return {n: torch.full(s, -0.1 if n == "g" else 0.1) for n, s in shapes.items()} | changes


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def pool(*shape):
    return torch.full(shape or (S, HV, K, V), 0.5)


# -- cu_seqlens and states of a call

CALLS = {
    "rank": (
        {"cu_seqlens": ints([0, 4])},
        "cu_seqlens has shape [1, 2], expected [N + 1]: 0, then where each of N sequences ends",
    ),
    "no entry": (
        {"cu_seqlens": ints()},
        "cu_seqlens has shape [0], expected [N + 1]: 0, then where each of N sequences ends",
    ),
    "dtype": (
        {"cu_seqlens": torch.tensor([0.0, 4.0])},
        "cu_seqlens is float32, expected int32 or int64: call cu_seqlens.to(torch.int32)",
    ),
    "device": (
        {"cu_seqlens": ints(0, 4).to("meta")},
        "cu_seqlens is on meta, v on cpu; expected one device: call cu_seqlens.to('cpu')",
    ),
    "a list": ({"cu_seqlens": [0, 4]}, "cu_seqlens is a list, expected a tensor"),
    "start": (
        {"cu_seqlens": ints(1, 4)},
        "cu_seqlens begins with 1, expected 0: the first sequence's first token",
    ),
    "order": (
        {"cu_seqlens": ints(0, 7, 4)},
        "cu_seqlens[2] = 4 comes after 7: sequences overlap; expected numbers that do not fall, such as "
        "torch.cat([zero, lengths.cumsum(0)])",
    ),
    "end": (
        {"cu_seqlens": ints(0, 4, 11)},
        "cu_seqlens ends at 11, but there are 10 tokens: expected at most as many",
    ),
    "states of a ragged batch": (
        {"cu_seqlens": ints(0, 4, 10), "initial_state": pool(3, HV, K, V)},
        "initial_state has shape [3, 4, 8, 6], expected [N, HV, K, V] = [2, 4, 8, 6]: "
        "N = 2 is set by cu_seqlens (of N + 1 numbers)",
    ),
    "layout": (
        {"initial_state": pool(1, HV, V, K)},
        "initial_state has shape [1, 4, 6, 8], which is a state of layout VK; expected [.., K, V] = [.., 8, 6]: "
        "pass initial_state.mT.contiguous(), or compile with state_layout='VK'",
    ),
    "no number": (
        {"states_every": 2.5},
        "states_every = 2.5, expected a number of tokens, or None for no states",
    ),
    "zero": ({"states_every": 0}, "states_every = 0, expected a number of tokens, or None for no states"),
    "NaN": (
        {"v": torch.full(SHAPES["v"], NAN)},
        "v[0, 0, 0, 0] is nan, expected finite numbers: look at what made v, or replace it by torch.nan_to_num(v)",
    ),
    "-inf": (
        {"beta": torch.full(SHAPES["beta"], -INF)},
        "beta[0, 0, 0] is -inf, expected finite numbers: look at what made beta, or replace it by "
        "torch.nan_to_num(beta)",
    ),
    "gate": (
        {"g": torch.full(SHAPES["g"], INF)},
        "g[0, 0, 0, 0] is inf, expected numbers below infinity (-inf resets the state): look at what made g, or "
        "replace it by torch.nan_to_num(g)",
    ),
    "state": (
        {"initial_state": pool(1, HV, K, V) * INF},
        "initial_state[0, 0, 0, 0] is inf, expected finite numbers: look at what made initial_state, or replace it by "
        "torch.nan_to_num(initial_state)",
    ),
    "sparse": (
        {"beta": torch.zeros(SHAPES["beta"]).to_sparse()},
        "beta has layout sparse_coo, expected a dense tensor: call beta.to_dense()",
    ),
}


@pytest.mark.parametrize("which", ["op", "recurrent"])
@pytest.mark.parametrize("case", CALLS)
def test_calls(case, which):
    changes, message = CALLS[case]
    if which == "recurrent" and "states_every" in changes:
        return test_states_every_is_no_option_of_recurrent()
    op = kg.compile("kda")
    with raises(f"kda: {message}"):
        (op if which == "op" else op.recurrent)(**(arguments() | changes))


def test_states_every_is_no_option_of_recurrent():
    takes = "kda takes q, k, v, g, beta (initial_state, output_final_state, cu_seqlens, check)"
    with raises(f"{takes}: unknown states_every"):
        kg.compile("kda").recurrent(**arguments(), states_every=2)


def test_a_ragged_batch_of_several_rows():
    message = (
        "kda: B = 2 beside cu_seqlens, expected B = 1: put all sequences behind each other, such as "
        "q.flatten(0, 1).unsqueeze(0)"
    )
    with raises(message):
        kg.compile("kda")(**arguments(2), cu_seqlens=ints(0, 4))


def test_a_state_of_an_op_of_another_layout():
    given = arguments(v=torch.full((1, T, HV, K), 0.1))
    _, state = kg.compile("kda", state_layout="VK")(**given, output_final_state=True)
    message = (
        "kda: initial_state was returned by an op of state_layout='VK', this one has 'KV': pass "
        "initial_state.mT.contiguous(), or compile with state_layout='VK'"
    )
    with raises(message):
        kg.compile("kda")(**given, initial_state=state)
    kg.compile("kda")(**given, initial_state=state.mT.contiguous())


def test_states_on_the_way_given_to_the_torch_op():
    with raises("kda: states_every = -1, expected a number of tokens, or None for no states"):
        kg.compile("kda").torch_op(*arguments().values(), None, False, None, -1)


def test_resets_and_large_numbers_are_legal():
    given = arguments(g=torch.full(SHAPES["g"], -INF), v=torch.full(SHAPES["v"], 3e38))
    o, _ = kg.compile("kda")(**given | {"q": torch.zeros(SHAPES["q"])})
    assert tuple(o.shape) == SHAPES["v"]


# -- decoding

INDICES = ints(3, 1)
DECODE = {
    "no pool": ({"state_pool": None}, "state_pool is a NoneType, expected a tensor"),
    "strides": (
        {"state_pool": pool(S, HV, V, K).mT},
        "state_pool has strides [192, 48, 1, 8], expected a contiguous tensor, for it is updated in place: keep one "
        "such tensor, and say which slots to use by state_indices",
    ),
    "layout": (
        {"state_pool": pool(S, HV, V, K)},
        "state_pool has shape [5, 4, 6, 8], which is a state of layout VK; expected [.., K, V] = [.., 8, 6]: "
        "pass state_pool.mT.contiguous(), or compile with state_layout='VK'",
    ),
    "heads": (
        {"state_pool": pool(S, H, K, V)},
        "state_pool has shape [5, 2, 8, 6], expected [S, HV, K, V] = [5, 4, 8, 6]: HV = 4 is set by v",
    ),
    "dtype": (
        {"state_pool": pool().double()},
        "state_pool is float64, expected float32: call state_pool.to(torch.float32)",
    ),
    "too few slots": (
        {"state_pool": pool(1, HV, K, V), "state_indices": None},
        "state_pool has 1 slots for 2 sequences, expected at least as many, or state_indices [N] that say which slot "
        "is whose",
    ),
    "indices": (
        {"state_indices": ints(1, 2, 3)},
        "state_indices has shape [3], expected [N] = [2]: N = 2 is set by q (N = B without cu_seqlens)",
    ),
    "indices' rank": (
        {"state_indices": ints([[1]])},
        "state_indices has shape [1, 1, 1] of 3 dimensions, expected 1, [N]",
    ),
    "no columns": (
        {"state_indices": torch.zeros(2, 0, dtype=torch.int64)},
        "state_indices has shape [2, 0], expected [N, W], W columns of at least one slot",
    ),
    "indices' dtype": (
        {"state_indices": torch.tensor([1.0, 2.0])},
        "state_indices is float32, expected int32 or int64: call state_indices.to(torch.int32)",
    ),
    "columns": (
        {"state_indices": ints([0, 1], [2, 3])},
        "10 tokens a sequence and state_indices of 2 columns, expected one column for each token: the state after "
        "token t goes to the slot in column t",
    ),
    "out of the pool": (
        {"state_indices": ints(1, 5)},
        "state_indices of sequence 1 hold 5, but state_pool has 5 slots: expected indices below 5, or below 0 for no "
        "slot",
    ),
    "twice": (
        {"state_indices": ints(3, 3)},
        "state_indices of sequence 1 hold slot 3, which sequence 0 has: expected each slot once, for its new state to "
        "be one",
    ),
    "accepted": (
        {"num_accepted_tokens": ints(1, 2)},
        "num_accepted_tokens[1] = 2, expected 1..1: the column of state_indices that sequence 1 starts from, counted "
        "from 1",
    ),
    "accepted's shape": (
        {"num_accepted_tokens": ints(1, 1, 1)},
        "num_accepted_tokens has shape [3], expected [N] = [2]: N = 2 is set by q (N = B without cu_seqlens)",
    ),
    "null_below": ({"null_below": 0.5}, "null_below = 0.5, expected a number of slots, such as 0 or 1"),
    "not finite": (
        {"state_pool": torch.cat([pool(3, HV, K, V), pool(1, HV, K, V) * NAN, pool(1, HV, K, V)])},
        "state_pool[3][0, 0, 0] is nan, expected finite numbers: look at what made state_pool[3], or replace it by "
        "torch.nan_to_num(state_pool[3])",
    ),
    "argument": (
        {"k": torch.full((2, T, H, K), NAN)},
        "k[0, 0, 0, 0] is nan, expected finite numbers: look at what made k, or replace it by torch.nan_to_num(k)",
    ),
}


@pytest.mark.parametrize("case", DECODE)
def test_decoding(case):
    changes, message = DECODE[case]
    given = {**arguments(2), "state_pool": pool(), "state_indices": INDICES} | changes
    before = None if given["state_pool"] is None else given["state_pool"].clone()
    with raises(f"kda: {message}"):
        kg.compile("kda").decode(**given)
    assert before is None or torch.equal(given["state_pool"].nan_to_num(), before.nan_to_num())


def test_a_state_that_is_not_finite_keeps_others_from_being_written():
    states = pool()
    states[4, 0, 0, 0] = INF
    before = states.clone()
    with raises(
        "kda: state_pool[4][0, 0, 0] is inf, expected finite numbers: look at what made state_pool[4], or replace it "
        "by torch.nan_to_num(state_pool[4])"
    ):
        kg.compile("kda").decode(**arguments(2), state_pool=states, state_indices=ints(0, 4))
    assert torch.equal(states, before)


def test_more_tokens_than_columns_in_a_ragged_batch():
    message = (
        "kda: sequence 1 has 3 tokens and state_indices 2 columns, expected one column for each token: the state after "
        "token t goes to the slot in column t"
    )
    with raises(message):
        kg.compile("kda").decode(
            **arguments(), state_pool=pool(), state_indices=ints([0, 1], [2, 3]), cu_seqlens=ints(0, 1, 4)
        )


def test_decoding_takes():
    options = "state_pool, state_indices, num_accepted_tokens, cu_seqlens, null_below, check"
    with raises(f"kda takes q, k, v, g, beta ({options}): unknown initial_state"):
        kg.compile("kda").decode(**arguments(), state_pool=pool(), initial_state=pool())


# -- on a GPU only if asked for: CPU tensors stand for those on one


@pytest.mark.parametrize("which", ["op", "training", "recurrent", "decode"])
def test_values_are_checked_on_a_gpu_if_asked_for(which, monkeypatch):
    op, reached = kg.compile("kda"), []
    monkeypatch.setattr(op, "fitting", lambda *_: reached.append(1) or pytest.skip.Exception)
    run = {
        "op": op._cuda,
        "training": op.training.forward.cuda,
        "recurrent": op.decoding.recurrent.cuda,
        "decode": op.decoding.decode.cuda,
    }[which]
    given = [*arguments(v=torch.full(SHAPES["v"], NAN)).values(), *([pool()] if which == "decode" else [])]
    with raises(
        "kda: v[0, 0, 0, 0] is nan, expected finite numbers: look at what made v, or replace it by torch.nan_to_num(v)"
    ):
        run(*given, check=True)
    assert not reached
    with pytest.raises(Exception):  # noqa: B017  it went on to the kernels
        run(*given)
    assert reached


def test_a_pool_is_checked_on_a_gpu_if_asked_for():
    states = pool() * NAN
    with raises(
        "kda: state_pool[0][0, 0, 0] is nan, expected finite numbers: look at what made state_pool[0], or replace it "
        "by torch.nan_to_num(state_pool[0])"
    ):
        kg.compile("kda").decoding.decode.cuda(*arguments().values(), states, check=True)


@pytest.mark.parametrize(("choice", "message"), [
    ({"state_layout": "HKV"}, "state_layout = 'HKV': expected 'KV' ([N, HV, K, V]) or 'VK' ([N, HV, V, K])"),
    ({"state_dtype": "float16"}, "state_dtype = 'float16': expected one of float32, bfloat16"),
])  # fmt: skip
def test_types_of_states(choice, message):
    with raises(message):
        kg.compile("kda", **choice)
