"""Decoding on the CPU by a native loop: against the oracle, its bits, its functions, and where it cannot run."""

import ctypes
import logging
from itertools import cycle

import pytest
import torch
from foreign import CASES
from sequences import cut, ends_of, inputs, off, one, reference

import kdagen as kg
from kdagen.build import native
from kdagen.derive.canonical import canonical
from kdagen.derive.step import step_form
from kdagen.errors import ArgumentError
from kdagen.lower.native import native_source
from kdagen.reference import recurrence_reference
from kdagen.runtime import cpu_decode
from kdagen.runtime.cpu_native import Native
from kdagen.runtime.cpu_schedule import pinned
from kdagen.schedule import CpuSchedule
from kdagen.state import StateType
from kdagen.zoo.inputs import GATES

HV, K, V, SLOTS = 4, 24, 20, 9
STATES = [StateType(layout, dtype) for layout in ("KV", "VK") for dtype in ("float32", "bfloat16")]
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-3}
INDICES = [7, 2, 3]


def compiled(name, state: StateType = STATES[0]):
    return kg.compile(name, state_layout=state.layout, state_dtype=state.dtype)


def pool_of(state: StateType = STATES[0], slots: int = SLOTS, k: int = K, v: int = V):
    draw = torch.Generator().manual_seed(2)
    pool = torch.randn(slots, HV, k, v, generator=draw)
    return turned(pool, state).contiguous().to(getattr(torch, state.dtype))


def turned(states, state: StateType):
    """[.., K, V] for states of a layout, and back."""
    return states if state.layout == "KV" else states.mT


def is_native(op) -> bool:
    return op.last.endswith(cpu_decode.NATIVE)


def agree(name, gate: str, state: StateType, t: int = 3) -> None:
    """`t` tokens of three sequences, of two value heads a key head."""
    op, given = compiled(name, state), inputs(name, (3, t, HV, K, V), 2, torch.float32, gate)
    pool = pool_of(state)
    before = pool.clone()
    o_ref, right = recurrence_reference(kg.load(name), given, turned(pool[INDICES], state).double())
    o = op.decode(**given, state_pool=pool, state_indices=torch.tensor(INDICES))
    assert is_native(op) and off(o, o_ref) < TOLERANCE["float32"]
    assert off(turned(pool[INDICES], state), right) < TOLERANCE[state.dtype]
    others = [i for i in range(SLOTS) if i not in INDICES]
    assert torch.equal(pool[others], before[others])


# -- against the oracle


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", kg.zoo.names())
def test_the_zoo_under_all_gates(name, gate):
    agree(name, gate, STATES[0])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("state", STATES[1:], ids=str)
@pytest.mark.parametrize("name", kg.zoo.names())
def test_the_zoo_on_all_types_of_states(name, state, tokens):
    agree(name, "reset", state, tokens)


@pytest.mark.parametrize(("name", "state"), list(zip(CASES, cycle(STATES))), ids=str)
def test_recurrences_of_users_on_types_of_states_in_turn(name, state):
    for gate in ("softplus", "extreme"):
        agree(CASES[name][0], gate, state)


@pytest.mark.parametrize(("k", "v"), [(1, 1), (7, 5), (16, 33), (65, 3)])
@pytest.mark.parametrize("state", STATES, ids=str)
def test_odd_sizes(k, v, state):
    given, pool = inputs("kda", (2, 2, HV, k, v), dtype=torch.float32), pool_of(state, 2, k, v)
    o_ref, right = recurrence_reference(kg.load("kda"), given, turned(pool, state).double())
    o = compiled("kda", state).decode(**given, state_pool=pool)
    assert off(o, o_ref) < 1e-5 and off(turned(pool, state), right) < TOLERANCE[state.dtype]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("wide", [False, True])
def test_dtypes_of_arguments(dtype, tolerance, wide):
    given = inputs("kda_softplus", (3, 2, HV, K, V), 2, dtype)
    if wide:
        given |= {n: given[n].float() for n in ("g", "beta", "A_log", "dt_bias")}
    pool, op = pool_of(slots=3), compiled("kda_softplus")
    o_ref, right = recurrence_reference(kg.load("kda_softplus"), given, pool.double())
    o = op.decode(**given, state_pool=pool)
    assert is_native(op) and o.dtype == dtype and off(o, o_ref) < tolerance and off(pool, right) < 1e-5


def test_views_of_other_tensors_are_read_where_they_are():
    given = inputs("kda", (3, 2, HV, K, K), dtype=torch.float32)
    packed = torch.cat([given["q"], given["k"], given["v"]], -1)
    views = dict(zip("qkv", packed.split(K, -1)))
    views["g"] = given["g"].transpose(-1, -2).contiguous().transpose(-1, -2)
    views["beta"] = given["beta"][:, :1].expand(-1, 2, -1)
    given["beta"] = views["beta"].contiguous()
    pools = [pool_of(slots=3, v=K) for _ in range(2)]
    found, right = (compiled("kda").decode(**x, state_pool=p) for x, p in zip((views | {}, given), pools))
    o_ref = recurrence_reference(kg.load("kda"), given, pool_of(slots=3, v=K).double())[0]
    assert not views["g"].is_contiguous() and off(found, o_ref) < 1e-5
    assert torch.equal(found, right) and torch.equal(*pools)


# -- sequences, slots, tokens


@pytest.mark.parametrize("state", STATES, ids=str)
def test_ragged_batches_and_null_slots(state):
    lengths, indices = (2, 0, 1, 3, 1), torch.tensor([4, 5, 1, -1, 8], dtype=torch.int32)
    given, pool = inputs("kda_softplus", (1, sum(lengths) + 2, HV, K, V), 2, torch.float32), pool_of(state)
    before = pool.clone()
    o_ref, right = reference("kda_softplus", given, turned(pool[indices.long()], state).double(), lengths)
    op = compiled("kda_softplus", state)
    o = op.decode(**given, state_pool=pool, state_indices=indices, cu_seqlens=ends_of(lengths))
    mine = [0, 1, 2, 6]
    assert is_native(op) and off(o[:, mine], o_ref[:, mine]) < 1e-5 and not o[:, [3, 4, 5, 7, 8]].any()
    assert off(turned(pool[[4, 1, 8]], state), right[[0, 2, 4]]) < TOLERANCE[state.dtype]
    rest = [0, 2, 3, 5, 6, 7]
    assert torch.equal(pool[rest], before[rest])


@pytest.mark.parametrize("state", STATES, ids=str)
def test_speculation(state):
    """Start from the column of the last accepted token; the state after token t goes to column t."""
    given, pool = inputs("kda", (3, 3, HV, K, V), dtype=torch.float32), pool_of(state, 12)
    indices = torch.tensor([[0, 1, 2], [3, -1, 5], [-1, 7, 8]], dtype=torch.int32)
    before, op = pool.clone(), compiled("kda", state)
    o = op.decode(**given, state_pool=pool, state_indices=indices, num_accepted_tokens=torch.tensor([2, 3, 1]))
    touched = set()
    for n, start in enumerate([1, 5]):
        now = turned(before[start : start + 1], state).double()
        for t in range(3):
            o_ref, now = recurrence_reference(kg.load("kda"), cut("kda", one("kda", given, n), t, t + 1), now)
            assert off(o[n : n + 1, t : t + 1], o_ref) < 1e-5
            if (slot := int(indices[n, t])) >= 0:
                touched.add(slot)
                assert off(turned(pool[slot : slot + 1], state), now) < TOLERANCE[state.dtype]
    rest = [i for i in range(12) if i not in touched]
    assert is_native(op) and touched == {0, 1, 2, 3, 5} and not o[2].any() and torch.equal(pool[rest], before[rest])


def test_recurrent_from_a_state_and_from_none():
    given, first, op = inputs("kda", (2, 5, HV, K, V), dtype=torch.float32), pool_of(slots=2), compiled("kda")
    for state in (first, None):
        o_ref, right = recurrence_reference(kg.load("kda"), given, None if state is None else state.double())
        o, final = op.recurrent(**given, initial_state=state, output_final_state=True)
        assert is_native(op) and off(o, o_ref) < 1e-5 and off(final, right) < 1e-5
    assert torch.equal(first, pool_of(slots=2))


def test_finite_states_whose_sum_overflows_are_taken():
    given = inputs("retnet", (1, 1, HV, K, V), dtype=torch.float32)
    pool = torch.full((1, HV, K, V), 3e38)
    given["q"] = torch.zeros_like(given["q"]).index_fill_(-1, torch.tensor([0]), 0.5)
    right = recurrence_reference(kg.load("retnet"), given, pool.double())[1]
    assert not pool.sum().isfinite()
    compiled("retnet").decode(**given, state_pool=pool)
    assert off(pool, right) < 1e-5


# -- bits


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("name", ["kda_softplus", "rwkv7", "deltaproduct", "gla"])
def test_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(name, state):
    given, op = inputs(name, (5, 2, HV, K, V), dtype=torch.float32), compiled(name, state)
    indices, threads = torch.tensor([4, 5, 6, 1, 0]), torch.get_num_threads()
    pool = pool_of(state)
    o = op.decode(**given, state_pool=pool, state_indices=indices)
    for n in range(5):
        alone = pool_of(state)
        mine = op.decode(**one(name, given, n), state_pool=alone, state_indices=indices[n : n + 1])
        assert torch.equal(mine, o[n : n + 1]) and torch.equal(alone[indices[n]], pool[indices[n]])
    try:
        torch.set_num_threads(3)
        for most in (0, 1, 2, 3):
            again = pool_of(state)
            with pinned(CpuSchedule(threads=most)):
                assert torch.equal(op.decode(**given, state_pool=again, state_indices=indices), o)
            assert torch.equal(again, pool) and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_the_threads_are_torch_s_or_the_schedule_s(monkeypatch):
    op, found = compiled("kda"), []
    given, pool = inputs("kda", (2, 1, HV, K, V), dtype=torch.float32), pool_of(slots=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(op.step.native, "run", lambda call, out, threads: found.append(threads))
    for most in (0, 1, 2, 8):
        with pinned(CpuSchedule(threads=most)):
            op.decode(**given, state_pool=pool)
    assert found == [3, 1, 2, 3]


# -- the text

TEXTS = {"native_kda.txt": ("kda", STATES[0]), "native_kda_softplus_vk_bf16.txt": ("kda_softplus", STATES[3])}


@pytest.mark.parametrize("file", TEXTS)
def test_the_text_is_readable_c(file, golden):
    name, state = TEXTS[file]
    golden(file, native_source(step_form(canonical(kg.load(name))), state).text)


def test_what_is_one_number_for_all_channels_is_made_before_the_loop():
    text = native_source(step_form(canonical(kg.load("kda_softplus"))), StateType()).text
    assert "const float n0 = -exp_((*p5)); EACH(i, c->K) p7[i] = exp_(n0*softplus_(p6[i] + p3[i]));" in text


# -- functions


@pytest.fixture(scope="module")
def functions():
    """f(name, x): a function of functions.c, over an array."""
    source = native_source(step_form(canonical(kg.load("kda"))), StateType()).text
    for name in ("exp_", "log_", "softplus_"):
        source += f"\nvoid all_{name}(int64_t n, float *x) {{ EACH(i, n) x[i] = {name}(x[i]); }}"
    library = ctypes.CDLL(str(native.library("functions", source)))

    def run(name: str, x):
        y = x.clone()
        getattr(library, f"all_{name}")(ctypes.c_int64(len(y)), ctypes.c_void_p(y.data_ptr()))
        return y

    return run


EDGES = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-40, 3.4e38, -3.4e38, 88.72, 88.73, -87.3, -103.9, -104.1, float("inf")]


@pytest.mark.parametrize(("name", "right", "low", "high"), [
    ("exp_", torch.exp, -104.0, 89.0),
    ("log_", torch.log, 0.0, 100.0),
    ("softplus_", lambda x: torch.nn.functional.softplus(x, threshold=1e9), -100.0, 100.0),
])  # fmt: skip
def test_functions_are_right_to_the_last_bits(functions, name, right, low, high):
    x = torch.cat([torch.linspace(low, high, 100_001), torch.linspace(-2, 2, 10_001)])
    found, expected = functions(name, x), right(x.double())
    known = expected.isfinite() & (expected.abs() > 1e-37) & (expected.abs() < 3.4e38)
    assert float(((found - expected) / expected)[known].abs().max()) < 3e-7
    edges = torch.tensor([*EDGES, -float("inf"), float("nan")])
    found, expected = functions(name, edges), right(edges.double()).float()
    if name == "softplus_":
        expected[edges == -float("inf")] = 0.0
    assert torch.allclose(found, expected, rtol=3e-7, atol=2e-45, equal_nan=True)
    assert torch.equal(found.isfinite(), expected.isfinite())


# -- where it cannot run


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An op that has not decoded yet, and a cache of its own."""
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    op = compiled("kda")
    monkeypatch.setitem(op.__dict__, "step", cpu_decode.Step(step_form(op._form()), op.state))
    return op


def decodes(op) -> None:
    given, pool = inputs("kda", (2, 2, HV, K, V), dtype=torch.float32), pool_of(slots=2)
    o_ref, right = recurrence_reference(kg.load("kda"), given, pool.double())
    o = op.decode(**given, state_pool=pool)
    assert off(o, o_ref) < 1e-5 and off(pool, right) < 1e-5


def program(path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


PROBLEMS = {
    "no compiler": "no C compiler found ($CC is '/nowhere/cc', which is not there)",
    "a compiler that fails": "/cc failed on kda.c: kda.c:1: error: it is Sunday",
    "a compiler that hangs": "/cc hung: it was stopped after 0.3 s",
    "a cache that cannot be": "cannot keep a compiled library",
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_torch_decodes_where_nothing_can_be_compiled_and_says_so_once(problem, fresh, monkeypatch, tmp_path, caplog):
    if problem == "no compiler":
        monkeypatch.setenv("CC", "/nowhere/cc")
    elif problem == "a compiler that fails":
        monkeypatch.setenv("CC", program(tmp_path / "cc", "echo 'kda.c:1: error: it is Sunday' >&2; exit 1"))
    elif problem == "a compiler that hangs":
        monkeypatch.setattr(native, "SECONDS", 0.3)
        monkeypatch.setenv("CC", program(tmp_path / "cc", "exec sleep 5"))
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING, "kdagen"):
        decodes(fresh), decodes(fresh)
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and said[0].startswith("kda decodes on torch, which takes several times as long: ")
    assert PROBLEMS[problem] in said[0] and fresh.last.endswith(cpu_decode.ON_TORCH)
    words = " ".join(fresh.explain().split())
    assert "on CPUs by torch's operations, several times slower than a native loop: " in words
    assert PROBLEMS[problem] in words


def test_a_compiler_without_openmp_makes_a_loop_of_one_thread(fresh, monkeypatch, tmp_path):
    real = native.find_cc(native.PURPOSE)[0]
    text = (
        f'for a in "$@"; do [ "$a" = -fopenmp ] && {{ echo "error: no OpenMP" >&2; exit 1; }}; done; exec {real} "$@"'
    )
    monkeypatch.setenv("CC", program(tmp_path / "cc", text))
    decodes(fresh)
    assert is_native(fresh) and "GOMP" not in fresh.step.native.path.read_bytes().decode("latin1")


def test_a_damaged_library_is_compiled_again(fresh, caplog):
    text = fresh.step.native.source.text
    path = native.library("kda", text)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING, "kdagen.build"):
        decodes(fresh)
    assert is_native(fresh) and fresh.step.native.path == path and path.read_bytes() == whole
    assert "is corrupt (kda.so changed): building it again" in caplog.text


def test_it_is_compiled_once_and_for_all_sizes_and_dtypes_of_arguments(fresh, monkeypatch):
    made = []
    original = native._compile
    monkeypatch.setattr(native, "_compile", lambda *given: made.append(1) or original(*given))
    assert "on CPUs a native loop, compiled by the C compiler at the first call" in " ".join(fresh.explain().split())
    for k, v, dtype in ((8, 16, torch.float32), (K, V, torch.bfloat16)):
        given, pool = inputs("kda", (2, 1, HV, k, v), dtype=dtype), pool_of(slots=2, k=k, v=v)
        fresh.decode(**given, state_pool=pool)
    again = cpu_decode.Step(step_form(fresh._form()), fresh.state)
    assert again.native.function and made == [1]
    assert f"on CPUs a native loop, compiled: {fresh.step.native.path}" in " ".join(fresh.explain().split())


def test_float64_stays_on_torch(fresh):
    given = inputs("kda", (2, 1, HV, K, V))
    fresh.decode(**given, state_pool=pool_of(slots=2).double())
    assert fresh.last == f"float64 tensors on cpu: {cpu_decode.ON_TORCH}" and fresh.step.native.path is None


def test_torch_decodes_where_asked_to(fresh):
    with cpu_decode.on_torch():
        decodes(fresh)
    assert fresh.last.endswith(cpu_decode.ON_TORCH)
    decodes(fresh)
    assert is_native(fresh)


# -- calls alike: checked once, but for what numbers they hold


def step(name="kda", gate="softplus", seed=0, pool=None, **changed):
    """A token of three sequences: the op, its arguments, a pool."""
    torch.manual_seed(seed)
    op, given = compiled(name), inputs(name, (3, 1, HV, K, V), 2, torch.float32, gate) | changed
    return op, given, pool_of(slots=3) if pool is None else pool


@pytest.fixture
def again(monkeypatch):
    """Which calls went by a table: True, or False where they were checked after all."""
    found, real = [], Native.again
    monkeypatch.setattr(Native, "again", lambda *given: found.append(real(*given)) or found[-1])
    return found


@pytest.mark.parametrize("name", ["kda", "rwkv7", "gdn2", "mamba2"])
def test_the_second_call_of_a_kind_goes_by_the_first_ones_table(name, again):
    op, given, pool = step(name)
    op.decode(**given, state_pool=pool.clone())
    another = {n: x * 0.5 for n, x in given.items()}
    o_ref, right = recurrence_reference(kg.load(name), another, pool.double())
    count = len(again)
    o = op.decode(**another, state_pool=pool)
    assert again[count:] == [True] and is_native(op)
    assert off(o, o_ref) < 1e-5 and off(pool, right) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_whether_a_call_was_first(threads, again, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    op, given, _ = step()
    pools = [pool_of(slots=3) for _ in range(3)]
    found = [op.decode(**given, state_pool=pool) for pool in pools]
    assert again[-2:] == [True, True]
    assert all(torch.equal(found[0], o) for o in found) and all(torch.equal(pools[0], p) for p in pools)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta"])
def test_numbers_are_looked_at_in_every_call(name, bad, again):
    op, given, pool = step()
    op.decode(**given, state_pool=pool)
    before, given[name] = pool.clone(), given[name].clone()
    given[name][1, 0, -1] = bad
    with pytest.raises(ArgumentError, match=f"kda: {name}\\["):
        op.decode(**given, state_pool=pool)
    assert again[-1] is False and torch.equal(pool, before)


def test_a_state_that_is_not_finite_is_refused_in_a_later_call_too(again):
    op, given, pool = step()
    op.decode(**given, state_pool=pool)
    pool[2, 1, 3, 4] = float("inf")
    before = pool.clone()
    with pytest.raises(ArgumentError, match=r"state_pool\[2\]"):
        op.decode(**given, state_pool=pool)
    assert again[-1] is False and torch.equal(pool, before)


def test_a_gate_of_minus_infinity_is_checked_and_decodes(again):
    op, given, pool = step()
    op.decode(**given, state_pool=pool.clone())
    given["g"][1] = -float("inf")
    o_ref, right = recurrence_reference(kg.load("kda"), given, pool.double())
    o = op.decode(**given, state_pool=pool)
    assert again[-1] is False and off(o, o_ref) < 1e-5 and off(pool, right) < 1e-5


def test_other_sizes_strides_and_dtypes_are_other_kinds(again):
    op, given, pool = step()
    op.decode(**given, state_pool=pool)
    count = len(again)
    others = [
        {n: x[:2] for n, x in given.items()},
        given | {"g": given["g"].transpose(-1, -2).contiguous().transpose(-1, -2)},
        {n: x.bfloat16() for n, x in given.items()},
    ]
    for other in others:
        op.decode(**other, state_pool=pool)
    op.decode(**given, state_pool=pool_of(slots=5))
    with pinned(CpuSchedule(threads=1)):
        op.decode(**given, state_pool=pool)
    op.decode(**given, state_pool=pool, state_indices=torch.tensor([2, 0, 1]))
    assert len(again) == count


def test_kinds_that_are_remembered_are_few(monkeypatch):
    monkeypatch.setattr(cpu_decode, "KINDS", 2)
    op, given, _ = step()
    op.decoding.alike.known.clear()
    for slots in range(3, 8):
        op.decode(**given, state_pool=pool_of(slots=slots))
        assert 1 <= len(op.decoding.alike.known) <= 2
