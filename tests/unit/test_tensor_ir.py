"""The tensor IR's interpreter against the per-token oracle in float64."""

import pytest
import torch
from foreign import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.derive.chunk import chunk_form
from kdagen.ir.tensor_interpret import Interpreter, interpret
from kdagen.ir.tensor_values import Arena, carried
from kdagen.ir.triangular_inverse import inverse
from kdagen.reference import recurrence_reference
from kdagen.zoo.inputs import GATES

B, H, K, V = 2, 2, 16, 8
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 200)
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def derived(recurrence):
    form = canonical(recurrence)
    return form, chunk_form(form)


def until(form, tensors, t):
    """The first t tokens."""
    return {a.name: tensors[a.name][:, :t] if a.per_token else tensors[a.name] for a in form.arguments}


def a_state(seed=0):
    return torch.randn(B, H, K, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def off(got, want):
    """Relative error of the worst sequence and head; NaN counts as infinite."""
    got, want = got.double(), want.double()
    error = (got - want).norm() / want.norm().clamp_min(1e-30)
    return float(error.nan_to_num(float("inf")))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", zoo.names())
def test_zoo_equals_the_oracle(name, gate):
    form, program = derived(zoo.get(name))
    tensors, state = zoo.sample(form, (B, LENGTHS[-1], H, K, V), gate), a_state()
    expected, _ = recurrence_reference(zoo.get(name), tensors, state)
    for dtype, bound in BOUNDS.items():
        for i, t in enumerate(LENGTHS):
            o, _ = interpret(program, until(form, tensors, t), state, (16, 32, 64)[i % 3], dtype)
            assert o.dtype == dtype
            assert off(o, expected[:, :t]) <= bound, f"T = {t}, {dtype}"


@pytest.mark.parametrize("t", [1, 40])
@pytest.mark.parametrize("name", zoo.names())
def test_final_state_equals_the_oracle(name, t):
    form, program = derived(zoo.get(name))
    tensors = zoo.sample(form, (B, t, H, K, V))
    for state in (None, a_state()):
        _, expected = recurrence_reference(zoo.get(name), tensors, state)
        for dtype, bound in BOUNDS.items():
            assert off(interpret(program, tensors, state, 16, dtype)[1], expected) <= bound


@pytest.mark.parametrize("name", CASES)
def test_recurrences_of_users_equal_the_oracle(name):
    form, program = derived(CASES[name][0])
    for seed, gate in enumerate(GATES):
        tensors = zoo.sample(form, (B, 37, H, K, V), gate, seed)
        expected = recurrence_reference(CASES[name][0], tensors, a_state(seed))
        for got, want in zip(interpret(program, tensors, a_state(seed), 16), expected, strict=True):
            assert off(got, want) <= 1e-10


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["kda", "gated_deltanet", "rwkv7", "deltaproduct"]),
    st.integers(1, 140), st.sampled_from([1, 2, 8, 16, 64]), st.sampled_from(list(GATES)), st.integers(0, 1 << 16),
)  # fmt: skip
def test_any_length_chunk_and_gate(name, t, chunk_size, gate, seed):
    form, program = derived(zoo.get(name))
    tensors = zoo.sample(form, (1, t, 1, 5, 3), gate, seed)
    expected = recurrence_reference(zoo.get(name), tensors)
    for got, want in zip(interpret(program, tensors, None, chunk_size), expected, strict=True):
        assert off(got, want) <= 1e-10


@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "dplr", "gla"])
@pytest.mark.parametrize("gate", [float("-inf"), -1e4, -100.0, 0.0])
def test_gates_at_the_edge(name, gate):
    form, program = derived(zoo.get(name))
    tensors = zoo.sample(form, (B, 70, H, K, V))
    tensors["g"] = torch.full_like(tensors["g"], gate)
    tensors["g"][:, 33:] = -0.1
    if name == "dplr":
        tensors["a"] = tensors["a"] * 0.1
    expected = recurrence_reference(zoo.get(name), tensors, a_state())
    for dtype, bound in BOUNDS.items():
        for got, want in zip(interpret(program, tensors, a_state(), 32, dtype), expected, strict=True):
            assert off(got, want) <= bound


@pytest.mark.parametrize("name", zoo.names())
def test_later_tokens_leave_earlier_outputs_bit_for_bit(name):
    form, program = derived(zoo.get(name))
    tensors = {n: x.float() for n, x in zoo.sample(form, (B, 100, H, K, V), "softplus").items()}
    other = {n: x.float() for n, x in zoo.sample(form, (B, 100, H, K, V), "reset", seed=7).items()}
    o, _ = interpret(program, tensors, None, 32)
    for t in (1, 16, 33, 64, 99):
        changed = {
            a.name: torch.cat([tensors[a.name][:, :t], other[a.name][:, t:]], 1) if a.per_token else tensors[a.name]
            for a in form.arguments
        }
        assert torch.equal(interpret(program, changed, None, 32)[0][:, :t], o[:, :t])


@pytest.mark.parametrize("name", zoo.names())
def test_a_prefix_gives_the_same_bits_however_long_the_sequence(name):
    form, program = derived(zoo.get(name))
    tensors = {n: x.float() for n, x in zoo.sample(form, (B, 200, H, K, V)).items()}
    o, _ = interpret(program, tensors, None, 32)
    for t in (1, 31, 32, 33, 64, 150):
        assert torch.equal(interpret(program, until(form, tensors, t), None, 32)[0], o[:, :t])


def test_spans_of_a_long_sequence_join_seamlessly(monkeypatch):
    import kdagen.ir.tensor_interpret as module

    form, program = derived(zoo.get("kda"))
    tensors = zoo.sample(form, (B, 150, H, K, V))
    whole = interpret(program, tensors, a_state(), 16)
    monkeypatch.setattr(module, "SPAN_ELEMENTS", B * H * 32 * K)
    for got, want in zip(interpret(program, tensors, a_state(), 16), whole, strict=True):
        assert torch.equal(got, want)


def test_scratch_does_not_grow_with_the_sequence():
    form, program = derived(zoo.get("kda"))
    sizes = []
    for t in (1024, 4096):
        run = Interpreter(program, zoo.sample(form, (1, t, 8, 64, 64)), 16)
        run.scan(run.new("B", "HV", "K", "V").zero_(), run.new("B", "T", "HV", "V"))
        sizes.append(sum(x.numel() for x in run.arena.kept.values()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name, left", [("kda", {"Z", "X", "Q"}), ("dplr", {"Z", "X", "X_n", "Q"}), ("retnet", set())])
def test_decayed_operands_are_what_the_tree_leaves_behind(name, left):
    assert set(carried(derived(zoo.get(name))[1].prepare)) == left


def test_grouped_heads_serve_consecutive_value_heads():
    form, program = derived(zoo.get("kda"))
    tensors = zoo.sample(form, (B, 20, 4, K, V))
    grouped = {n: x[:, :, :2] if n in ("q", "k") else x for n, x in tensors.items()}
    expected = recurrence_reference(zoo.get("kda"), grouped)
    for got, want in zip(interpret(program, grouped, None, 16), expected, strict=True):
        assert off(got, want) <= 1e-10


def test_strided_inputs_and_inputs_left_as_they_were():
    form, program = derived(zoo.get("kda"))
    tensors = zoo.sample(form, (B, 40, H, K, V))
    strided = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in tensors.items()}
    state = a_state()
    before = {n: x.clone() for n, x in strided.items()} | {"state": state.clone()}
    o, final = interpret(program, strided, state, 16)
    assert torch.equal(o, interpret(program, tensors, state, 16)[0])
    assert all(torch.equal(x, before[n]) for n, x in (strided | {"state": state}).items())
    assert final.data_ptr() != state.data_ptr()


@pytest.mark.parametrize("n", [1, 5, 16, 32, 48, 64, 128])
def test_triangular_inverse(n):
    a = torch.randn(3, 2, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).tril(-1) / 4
    arena = Arena(a.new_empty(0))
    got = inverse(a, torch.zeros_like(a), arena)
    eye = torch.eye(n, dtype=a.dtype)
    assert off(got @ (eye - a), eye.expand_as(a)) <= 1e-12
    assert torch.equal(got, got.tril())
