"""op.decode on a pool of states and op.recurrent, on the CPU: against the oracle, and against a call of the op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import cut, ends_of, inputs, off, one, per_token, reference

import kdagen as kg
from kdagen.errors import GradientError
from kdagen.reference import recurrence_reference

HV, K, V = 4, 16, 8
SLOTS = 9


def pool_of(slots: int = SLOTS, dtype=torch.float64, layout: str = "KV", v: int = V):
    dims = (K, v) if layout == "KV" else (v, K)
    return torch.randn(slots, HV, *dims, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def after(name: str, tokens: dict, state):
    """The oracle's output and state."""
    return recurrence_reference(kg.load(name), tokens, state)


# -- against the oracle


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", kg.zoo.names())
def test_one_token_of_each_sequence(name, groups):
    tokens, pool, indices = inputs(name, (3, 1, HV, K, V), groups), pool_of(), torch.tensor([7, 2, 3])
    o_ref, right = after(name, tokens, pool[indices])
    before = pool.clone()
    o = kg.compile(name).decode(**tokens, state_pool=pool, state_indices=indices)
    assert off(o, o_ref) < 1e-12 and off(pool[indices], right) < 1e-12
    others = [i for i in range(SLOTS) if i not in indices.tolist()]
    assert torch.equal(pool[others], before[others])


@pytest.mark.parametrize("gate", ["mild", "softplus", "bounded", "extreme", "reset"])
@pytest.mark.parametrize("name", kg.zoo.names())
def test_token_by_token(name, gate):
    tokens, state = inputs(name, (2, 11, HV, K, V), 2, gate=gate), pool_of(2)
    o_ref, right = after(name, tokens, state)
    o, final = kg.compile(name).recurrent(**tokens, initial_state=state, output_final_state=True)
    assert off(o, o_ref) < 1e-12 and off(final, right) < 1e-12 and torch.equal(state, pool_of(2))
    assert kg.compile(name).recurrent(**tokens)[1] is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_dtypes(dtype, tolerance):
    tokens, pool = inputs("kda_softplus", (3, 4, HV, K, V), dtype=dtype), pool_of(3, torch.float32)
    o_ref, right = after("kda_softplus", tokens, pool)
    o = kg.compile("kda_softplus").decode(**tokens, state_pool=pool)
    assert o.dtype == dtype and off(o, o_ref) < tolerance and off(pool, right) < tolerance


@pytest.mark.parametrize("layout", ["KV", "VK"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_types_of_states(layout, kind):
    op = kg.compile("kda", state_layout=layout, state_dtype=kind)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float64
    turn = (lambda x: x) if layout == "KV" else (lambda x: x.mT)
    tokens, pool, indices = inputs("kda", (3, 2, HV, K, V)), pool_of(SLOTS, dtype, layout), torch.tensor([4, 3, 8])
    o_ref, right = after("kda", tokens, turn(pool[indices]).double())
    o = op.decode(**tokens, state_pool=pool, state_indices=indices)
    assert off(o, o_ref) < 1e-12 and off(turn(pool[indices]), right) < (1e-12 if kind == "float32" else 3e-3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ragged_batches(dtype):
    lengths = (2, 0, 1, 1, 5, 1)
    tokens = inputs("kda_softplus", (1, sum(lengths) + 3, HV, K, V), 2)
    pool, indices = pool_of(), torch.tensor([1, 0, 3, 4, 8, 2], dtype=dtype)
    before, cu = pool.clone(), ends_of(lengths, dtype)
    o_ref, right = reference("kda_softplus", tokens, pool[indices.long()], lengths)
    o = kg.compile("kda_softplus").decode(**tokens, state_pool=pool, state_indices=indices, cu_seqlens=cu)
    assert off(o[:, : sum(lengths)], o_ref) < 1e-12 and off(pool[indices.long()], right) < 1e-12
    assert not o[:, sum(lengths) :].any() and torch.equal(pool[0], before[0])  # an empty sequence's slot


# -- null slots, speculation


@pytest.mark.parametrize("null_below", [0, 1, 3])
def test_null_slots(null_below):
    tokens, pool = inputs("kda", (4, 1, HV, K, V)), pool_of()
    indices, before = torch.tensor([5, null_below - 1, -7, 6]), pool.clone()
    o = kg.compile("kda").decode(**tokens, state_pool=pool, state_indices=indices, null_below=null_below)
    o_ref, right = after("kda", tokens, before[[5, 0, 0, 6]])
    assert not o[1:3].any() and torch.equal(pool[:5], before[:5]) and torch.equal(pool[7:], before[7:])
    assert off(o[[0, 3]], o_ref[[0, 3]]) < 1e-12 and off(pool[[5, 6]], right[[0, 3]]) < 1e-12


def test_slots_in_order_may_be_null_too():
    tokens, pool = inputs("kda", (3, 1, HV, K, V)), pool_of()
    before = pool.clone()
    o = kg.compile("kda").decode(**tokens, state_pool=pool, null_below=2)
    assert not o[:2].any() and o[2].any() and torch.equal(pool[:2], before[:2])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("kind", ["KV", "VK"])
def test_speculation(kind, ragged):
    """Start from the column of the last accepted token; the state after token t goes to column t."""
    tokens = inputs("kda", (4, 3, HV, K, V))
    pool = pool_of(14, layout=kind)
    indices = torch.tensor([[0, 1, 2], [3, -1, 5], [6, 7, 8], [-1, 12, 13]], dtype=torch.int32)
    accepted, before = torch.tensor([1, 3, 2, 1], dtype=torch.int32), pool.clone()
    given, more = tokens, {}
    if ragged:
        given = {n: x.flatten(0, 1).unsqueeze(0) if n in per_token("kda") else x for n, x in tokens.items()}
        more = {"cu_seqlens": ends_of([3, 3, 3, 3])}
    op = kg.compile("kda", state_layout=kind)
    o = op.decode(**given, state_pool=pool, state_indices=indices, num_accepted_tokens=accepted, **more)
    o, touched = o.reshape(4, 3, HV, V), set()
    turn = (lambda x: x) if kind == "KV" else (lambda x: x.mT)
    for n, start in enumerate([0, 5, 7]):
        mine, state = one("kda", tokens, n), turn(before[start : start + 1])
        for t in range(3):
            o_ref, state = after("kda", cut("kda", mine, t, t + 1), state)
            assert off(o[n : n + 1, t : t + 1], o_ref) < 1e-12
            if (slot := int(indices[n, t])) >= 0:
                touched.add(slot)
                assert off(turn(pool[slot : slot + 1]), state) < 1e-12
    rest = [i for i in range(14) if i not in touched]
    assert not o[3].any() and torch.equal(pool[rest], before[rest])


def test_speculation_starts_from_the_first_column_unless_told():
    tokens, pool, indices = inputs("kda", (2, 1, HV, K, V)), pool_of(), torch.tensor([[4, 5], [1, 2]])
    right = after("kda", tokens, pool[[4, 1]])[1]
    kg.compile("kda").decode(**tokens, state_pool=pool, state_indices=indices)
    assert off(pool[[4, 1]], right) < 1e-12


# -- decoding goes on where a call ended


@st.composite
def pieces(draw) -> tuple:
    """A recurrence, the lengths of pieces, and what runs each."""
    name = draw(st.sampled_from(kg.zoo.names()))
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    how = [draw(st.sampled_from(["op", "recurrent", "decode", "decode"])) for _ in lengths]
    return name, lengths, how


@settings(max_examples=60, deadline=None)
@given(pieces(), st.sampled_from([torch.float64, torch.float32]), st.sampled_from([1, 2]), st.integers(0, 1 << 16))
def test_any_split_into_prefill_and_decode_equals_one_call(split, dtype, groups, seed):
    name, lengths, how = split
    op, slot = kg.compile(name), 3
    tokens = inputs(name, (1, sum(lengths), HV, K, V), groups, dtype, ("mild", "softplus", "reset")[seed % 3], seed)
    pool = torch.zeros(SLOTS, HV, K, V, dtype=dtype)
    o, final = op(**tokens, output_final_state=True)
    found, end = [], 0
    for length, which in zip(lengths, how):
        start, end = end, end + length
        part = cut(name, tokens, start, end)
        if which == "decode":
            found.append(op.decode(**part, state_pool=pool, state_indices=torch.tensor([slot])))
        else:
            run = op if which == "op" else op.recurrent
            out, state = run(**part, initial_state=pool[slot : slot + 1], output_final_state=True)
            pool[slot : slot + 1] = state
            found.append(out)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    assert off(torch.cat(found, 1), o.double()) < tolerance and off(pool[slot : slot + 1], final.double()) < tolerance


# -- guarantees


@pytest.mark.parametrize("name", ["kda", "kda_softplus", "rwkv7", "deltaproduct", "gla"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("v", [8, 5])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(name, dtype, v):
    tokens, op = inputs(name, (5, 2, HV, K, v), dtype=dtype), kg.compile(name)
    start = pool_of(SLOTS, torch.promote_types(dtype, torch.float32), v=v)
    indices = torch.tensor([4, 5, 6, 1, 0])
    for t in (1, 2):
        part = cut(name, tokens, 0, t)
        pool = start.clone()
        o = op.decode(**part, state_pool=pool, state_indices=indices)
        again = start.clone()
        assert torch.equal(op.decode(**part, state_pool=again, state_indices=indices), o) and torch.equal(again, pool)
        for n in range(5):
            alone = start.clone()
            mine = op.decode(**one(name, part, n), state_pool=alone, state_indices=indices[n : n + 1])
            assert torch.equal(mine, o[n : n + 1]) and torch.equal(alone[indices[n]], pool[indices[n]])


@pytest.mark.parametrize("layout", ["KV", "VK"])
def test_nothing_is_written_beside_the_pool_s_slots(layout):
    tokens = inputs("kda", (3, 1, HV, K, V), dtype=torch.float32)
    size = SLOTS * HV * K * V
    memory = torch.full((size + 2048,), 7.0)
    pool = memory[1024 : 1024 + size].view(SLOTS, HV, *((K, V) if layout == "KV" else (V, K)))
    pool.zero_()
    op = kg.compile("kda", state_layout=layout)
    op.decode(**tokens, state_pool=pool, state_indices=torch.tensor([0, SLOTS - 1, 4]))
    assert bool((memory[:1024] == 7).all() & (memory[1024 + size :] == 7).all()) and pool[[0, 4, 8]].any()
    assert not pool[[1, 2, 3, 5, 6, 7]].any()


# -- as a torch op


@pytest.mark.parametrize("form", ["plain", "indexed", "speculative", "ragged"])
def test_opcheck(form):
    tokens, pool = inputs("kda_softplus", (2, 2, HV, K, V), 2, torch.float32), pool_of(SLOTS, torch.float32)
    options = {
        "plain": (),
        "indexed": (torch.tensor([3, -1]),),
        "speculative": (torch.tensor([[3, 4], [1, 0]]), torch.tensor([2, 1])),
        "ragged": (torch.tensor([3, 1]), None, torch.tensor([0, 1, 2]), 1, True),
    }[form]
    if form == "ragged":
        tokens = one("kda_softplus", tokens, 0)
    checks = torch.library.opcheck(kg.compile("kda_softplus").decode_op, (*tokens.values(), pool, *options))
    assert set(checks.values()) == {"SUCCESS"} and len(checks) == 4


def test_torch_compile_of_decoding_for_any_batch():
    op = kg.compile("kda_softplus")

    def step(pool, indices, **tokens):
        return 2 * op.decode(**tokens, state_pool=pool, state_indices=indices)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 3, 2):
        tokens, indices = inputs("kda_softplus", (batch, 1, HV, K, V), 2, torch.float32), torch.arange(batch).flip(0)
        pools = pool_of(SLOTS, torch.float32), pool_of(SLOTS, torch.float32)
        found, right = compiled(pools[0], indices, **tokens), step(pools[1], indices, **tokens)
        assert torch.equal(found, right) and torch.equal(*pools)


def test_vmap_over_tokens_and_pools():
    op = kg.compile("kda")
    pools, tokens = torch.stack([pool_of(2), pool_of(2) + 1]), inputs("kda", (4, 1, HV, K, V))
    expected = [p.clone() for p in pools]
    right = [op.decode(*(x[2 * i : 2 * i + 2] for x in tokens.values()), state_pool=p) for i, p in enumerate(expected)]
    mapped = torch.func.vmap(lambda pool, *x: op.decode(*x, state_pool=pool))
    found = mapped(pools, *(x.unflatten(0, (2, 2)) for x in tokens.values()))
    assert torch.equal(found, torch.stack(right)) and torch.equal(pools, torch.stack(expected))


@pytest.mark.parametrize("which", ["decode", "recurrent"])
def test_decoding_is_for_inference(which):
    tokens = {n: x.requires_grad_() for n, x in inputs("kda", (2, 1, HV, K, V)).items()}
    options = {"state_pool": pool_of()} if which == "decode" else {}
    with pytest.raises(GradientError, match=f"kda: {which} is for inference and has no gradient"):
        getattr(kg.compile("kda"), which)(**tokens, **options)
    with torch.no_grad():
        getattr(kg.compile("kda"), which)(**tokens, **options)
