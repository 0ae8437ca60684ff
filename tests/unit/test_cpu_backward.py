"""The CPU backward against torch.autograd through the per-token oracle in float64."""

import functools

import pytest
import sympy
import torch
from foreign import CASES
from hypothesis import given, settings
from hypothesis import strategies as st

import kdagen.ir.adjoint_interpret as adjoint_interpret
from kdagen import zoo
from kdagen.derive.adjoint import adjoint
from kdagen.derive.canonical import canonical
from kdagen.derive.chunk import chunk_form
from kdagen.ir.adjoint_interpret import AdjointInterpreter
from kdagen.ir.tensor_interpret import Interpreter
from kdagen.ir.tensor_verify import verify_adjoint
from kdagen.reference import evaluate, recurrence_reference
from kdagen.runtime import cpu
from kdagen.zoo.inputs import GATES

B, H, K, V = 2, 2, 8, 4
RECURRENCES = {name: zoo.get(name) for name in zoo.names()} | {name: found for name, (found, *_) in CASES.items()}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short(monkeypatch):
    """Chunks of at most 16 tokens, two to a span."""
    monkeypatch.setattr(cpu, "ROWS", 16)
    monkeypatch.setattr(adjoint_interpret, "SPAN_ELEMENTS", B * H * 32 * K)


@functools.cache
def derived(name):
    form = canonical(RECURRENCES[name])
    program = chunk_form(form)
    return form, program, verify_adjoint(cpu.adjoint_of(program))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def oracle(name, tensors, state, d_out, d_final):
    """Gradients by name, that of the initial state as "initial_state"."""
    form = derived(name)[0]
    leaves = {n: x.double().clone().requires_grad_() for n, x in tensors.items()}
    first = (normal(B, H, K, V) * 0 if state is None else state.double().clone()).requires_grad_()
    loss = sum(
        (x * d).sum()
        for x, d in zip(recurrence_reference(RECURRENCES[name], leaves, first), (d_out, d_final), strict=True)
        if d is not None
    )
    wanted = [*leaves.values(), first]
    found = torch.autograd.grad(loss, wanted, materialize_grads=True)
    return {n: settled(form, n, x, d) for n, x, d in zip((*leaves, "initial_state"), wanted, found, strict=True)}


def settled(form, name, x, d):
    """Where a decay is written without exp and is 0, no log has a finite derivative: it is taken as 0."""
    for log in form.decay.atoms(sympy.log):
        if {str(s) for s in log.free_symbols} == {name}:
            d = d.masked_fill(evaluate(log.args[0], dict.fromkeys(log.free_symbols, x)) == 0, 0)
    return d


def found(name, tensors, state, d_out, d_final, keep=True):
    _, program, back = derived(name)
    states = cpu.run_keeping(program, tensors, state)[2] if keep else None
    gradients, d_state = cpu.backward(back, tensors, state, d_out, d_final, states)
    return gradients | {"initial_state": d_state}


def off(got, want):
    """Relative error; NaN counts as infinite."""
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-12)
    return float(error.nan_to_num(float("inf")))


def compare(name, tensors, state, d_out, d_final, bound=1e-9, keep=True):
    want = oracle(name, tensors, state, d_out, d_final)
    for n, got in found(name, tensors, state, d_out, d_final, keep).items():
        assert got.shape == want[n].shape
        assert off(got, want[n]) <= bound, f"gradient of {n}"


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", RECURRENCES)
def test_every_recurrence_and_gate(name, gate, short):
    tensors = zoo.sample(derived(name)[0], (B, 53, H, K, V), gate)
    compare(name, tensors, normal(B, H, K, V), normal(B, 53, H, V, seed=1), normal(B, H, K, V, seed=2))


@pytest.mark.parametrize("state, final, out", [(0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 0)])
@pytest.mark.parametrize("name", RECURRENCES)
def test_with_and_without_states(name, state, final, out, short):
    tensors = zoo.sample(derived(name)[0], (B, 19, H, K, V))
    first, d_final = normal(B, H, K, V) if state else None, normal(B, H, K, V, seed=2) if final else None
    compare(name, tensors, first, normal(B, 19, H, V, seed=1) if out else None, d_final, keep=False)


@pytest.mark.parametrize("t", [1, 2, 3, 16, 17, 64, 65])
@pytest.mark.parametrize("name", ["kda_softplus", "gated_deltanet", "deltaproduct", "rwkv7", "bonus"])
def test_every_length(name, t):
    tensors = zoo.sample(derived(name)[0], (B, t, H, K, V), "softplus")
    compare(name, tensors, normal(B, H, K, V), normal(B, t, H, V, seed=1), normal(B, H, K, V, seed=2))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["kda", "gated_deltanet", "dplr", "deltaproduct", "gla"]), st.integers(1, 40),
    st.sampled_from([1, 2, 8, 16, 32]), st.sampled_from(list(GATES)), st.integers(0, 1 << 16), st.integers(1, 9),
)  # fmt: skip
def test_any_length_chunk_span_and_gate(name, t, chunk_size, gate, seed, chunks):
    form, program, back = derived(name)
    tensors = zoo.sample(form, (B, t, H, K, V), gate, seed)
    d_out, d_final = normal(B, t, H, V, seed=seed), normal(B, H, K, V, seed=seed + 1)
    run = AdjointInterpreter(back, tensors, chunk_size)
    run.span_tokens = lambda elements: chunks * chunk_size
    forward = Interpreter(program, tensors, chunk_size)
    states, state = forward.new_states(), torch.zeros(B, H, K, V, dtype=torch.float64)
    forward.scan(state, states=states)
    run.scan(d_final.clone(), d_out, states)
    want = oracle(name, tensors, None, d_out, d_final)
    for n, got in run.gradients.items():
        assert off(got, want[n]) <= 1e-9


@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "dplr", "gla"])
@pytest.mark.parametrize("gate", [float("-inf"), -1e4, -100.0, 0.0])
def test_gates_at_the_edge(name, gate, short):
    tensors = zoo.sample(derived(name)[0], (B, 40, H, K, V))
    tensors["g"] = torch.full_like(tensors["g"], gate)
    tensors["g"][:, 23:] = -0.1
    if name == "dplr":
        tensors["a"] = tensors["a"] * 0.1
    given = normal(B, H, K, V), normal(B, 40, H, V, seed=1), normal(B, H, K, V, seed=2)
    compare(name, tensors, *given)
    if gate == float("-inf"):
        assert not found(name, tensors, *given)["g"][:, :23].any()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", zoo.names())
def test_float32(name, gate):
    tensors = {n: x.float() for n, x in zoo.sample(derived(name)[0], (B, 150, H, K, V), gate).items()}
    compare(name, tensors, normal(B, H, K, V).float(), normal(B, 150, H, V, seed=1), None, bound=1e-5)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_gradients_have_the_dtype_of_their_arguments(dtype, bound):
    tensors = zoo.sample(derived("kda")[0], (B, 70, H, K, V))
    mixed = {n: x.float() if n == "g" else x.to(dtype) for n, x in tensors.items()}
    given = None, normal(B, 70, H, V).to(dtype), None
    got, want = found("kda", mixed, *given), oracle("kda", mixed, *given)
    assert {n: x.dtype for n, x in mixed.items()} == {n: got[n].dtype for n in mixed}
    assert got["initial_state"].dtype == torch.float32
    assert all(off(got[n], want[n]) <= bound for n in got)


@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "bonus"])
def test_the_same_bits_again_and_with_states_computed_again(name):
    tensors = {n: x.float() for n, x in zoo.sample(derived(name)[0], (B, 200, H, K, V)).items()}
    given = normal(B, H, K, V).float(), normal(B, 200, H, V, seed=1).float(), None
    first = found(name, tensors, *given)
    for keep in (True, False):
        assert all(torch.equal(x, first[n]) for n, x in found(name, tensors, *given, keep=keep).items())


def test_grouped_heads_get_the_sum_of_their_group(short):
    tensors = zoo.sample(derived("kda")[0], (B, 20, 4, K, V))
    grouped = {n: x[:, :, :2].contiguous() if n in ("q", "k") else x for n, x in tensors.items()}
    leaves = {n: x.clone().requires_grad_() for n, x in grouped.items()}
    d_out = normal(B, 20, 4, V)
    o, _ = recurrence_reference(zoo.get("kda"), leaves)
    want = torch.autograd.grad(o, list(leaves.values()), d_out)
    got = found("kda", grouped, None, d_out, None)
    assert all(off(got[n], w) <= 1e-9 for n, w in zip(leaves, want, strict=True))


def test_inputs_are_left_as_they_were():
    tensors = zoo.sample(derived("kda")[0], (B, 40, H, K, V))
    program = derived("kda")[1]
    given = {"state": normal(B, H, K, V), "d_out": normal(B, 40, H, V), "d_final": normal(B, H, K, V, seed=2)}
    given["states"] = cpu.run_keeping(program, tensors, given["state"])[2]
    before = {n: x.clone() for n, x in (tensors | given).items()}
    cpu.backward(derived("kda")[2], tensors, *given.values())
    assert all(torch.equal(x, before[n]) for n, x in (tensors | given).items())


def test_the_forward_that_keeps_states_is_the_forward():
    tensors = zoo.sample(derived("kda")[0], (B, 150, H, K, V))
    program, state = derived("kda")[1], normal(B, H, K, V)
    o, final, states = cpu.run_keeping(program, tensors, state, torch.float32)
    expected = cpu.run(program, tensors, state, torch.float32)
    assert o.dtype == torch.float32 and torch.equal(o, expected[0]) and torch.equal(final, expected[1])
    assert states.shape == (3 * B, 1, H, K, V) and torch.equal(states[::3, 0], state)
    until = {n: x[:, :64] for n, x in tensors.items()}
    assert off(states[1::3, 0], recurrence_reference(zoo.get("kda"), until, state)[1]) <= 1e-12


def test_scratch_does_not_grow_with_the_sequence():
    form, program, back = derived("kda")
    sizes = []
    for t in (1024, 4096):
        tensors = {n: x.float() for n, x in zoo.sample(form, (1, t, 8, 64, 64)).items()}
        run = AdjointInterpreter(back, tensors, 16)
        run.scan(torch.zeros(1, 8, 64, 64), torch.zeros(1, t, 8, 64), torch.zeros(t // 16, 1, 8, 64, 64))
        sizes.append(sum(x.numel() for x in run.arena.kept.values()))
    assert sizes[0] == sizes[1]


def test_nothing_is_recorded_for_autograd():
    tensors = {n: x.requires_grad_() for n, x in zoo.sample(derived("gla")[0], (B, 5, H, K, V)).items()}
    got = found("gla", tensors, None, normal(B, 5, H, V).requires_grad_(), None)
    assert not any(x.requires_grad for x in got.values())


@pytest.mark.parametrize("name", ["kda", "dplr", "rwkv7", "kda_softplus"])
def test_the_plain_adjoint_gives_the_same(name):
    """That which kernels are made from takes decayed operands apart before the Gram's adjoint."""
    form, program, seeded = derived(name)
    tensors = zoo.sample(form, (2, 40, 2, 8, 4), "extreme")
    d_out = torch.randn(2, 40, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, expected = (
        cpu.backward(a, tensors, None, d_out, None)[0] for a in (seeded, verify_adjoint(adjoint(program)))
    )
    assert seeded.gradients != adjoint(program).gradients
    for n, x in found.items():
        torch.testing.assert_close(x, expected[n], rtol=1e-9, atol=1e-12)
