"""The canonical form: the zoo against the oracle, the table of streams, and one form for one recurrence."""

import dataclasses
import math

import pytest
import sympy
import torch

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.ir.canonical import Intra
from kdagen.reference import canonical_reference, recurrence_reference
from kdagen.zoo.inputs import GATES

# streams, of which read, readers x streams
TABLE = {
    "linear_attention": (1, 0, 1),
    "retnet": (1, 0, 1),
    "mamba2": (1, 0, 1),
    "gla": (1, 0, 1),
    "hgrn2": (1, 0, 1),
    "deltanet": (1, 1, 2),
    "gated_deltanet": (1, 1, 2),
    "kda": (1, 1, 2),
    "kda_softplus": (1, 1, 2),
    "kda_bounded": (1, 1, 2),
    "kda_clamped": (1, 1, 2),
    "comba": (1, 1, 2),
    "gdn2": (1, 1, 2),
    "longhorn": (1, 1, 2),
    "dplr": (2, 1, 4),
    "rwkv7": (2, 1, 4),
    "deltaproduct": (2, 2, 6),
}


def test_the_table_is_the_zoo():
    assert set(TABLE) == set(kg.zoo.names())


@pytest.mark.parametrize("name", TABLE)
def test_streams_and_readers(name):
    form = canonical(kg.zoo.get(name))
    assert (len(form.streams), len(form.solving), form.secondary_matrices) == TABLE[name]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", TABLE)
def test_zoo_equals_the_oracle(name, gate):
    found = kg.zoo.get(name)
    form = canonical(found)
    tensors = kg.zoo.sample(form, (2, 20, 2, 6, 5), gate, seed=3)
    state = torch.randn(2, 2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = recurrence_reference(found, tensors, state)
    for got, want in zip(canonical_reference(form, tensors, state), expected, strict=True):
        assert torch.isfinite(want).all()
        assert (got - want).norm() <= 1e-12 * want.norm()


def symbols(names):
    return sympy.symbols(names, real=True)


def test_kda_is_one_stream_with_a_common_scale():
    k, v, beta, g = symbols("k v beta g")
    form = canonical(kg.zoo.get("kda"))
    (stream,) = form.streams
    reader = stream.reader
    assert (stream.x, reader.y, reader.z, reader.scale, reader.after) == (k, v, -k, beta, True)
    assert (form.decay, form.decay_axis, form.decay_lower) == (g, "K", -math.inf)
    assert form.output.intra == (Intra.GRAM,) and form.output.after


def test_dplr_reads_the_undecayed_state():
    k, v, a, b = symbols("k v a b")
    write, low_rank = canonical(kg.zoo.get("dplr")).streams
    assert (write.x, write.reader.y, write.reader.z, write.reader.scale) == (k, v, 0, 1)
    assert (low_rank.x, low_rank.reader.y, low_rank.reader.z, low_rank.reader.after) == (b, 0, a, False)


def test_later_steps_read_earlier_ones_of_the_token():
    first, second = canonical(kg.zoo.get("deltaproduct")).streams
    assert first.reader.intra == (Intra.NONE, Intra.NONE)
    assert second.reader.intra == (Intra.GRAM, Intra.NONE)


def test_scalars_of_a_plain_write_go_to_the_key():
    k, v, dt, dt_bias = symbols("k v dt dt_bias")
    (stream,) = canonical(kg.zoo.get("mamba2")).streams
    assert stream.reader.y == v and stream.reader.scale == 1
    assert stream.x == k * kg.ir.functions.softplus(dt + dt_bias)


def test_bounds_of_the_gate_are_derived():
    assert canonical(kg.zoo.get("kda_bounded")).decay_lower == -5.0
    assert canonical(kg.zoo.get("kda_bounded").bind(lower_bound=-8.0)).decay_lower == -8.0
    assert canonical(kg.zoo.get("rwkv7")).decay_lower == pytest.approx(-math.exp(-0.5))
    assert canonical(kg.zoo.get("kda_softplus")).decay_lower == -math.inf
    assert canonical(kg.zoo.get("deltanet")).decay_lower == 0.0


def same(form):
    """What must agree between two spellings: all but name, doc and the order of arguments."""
    return dataclasses.replace(form, name="", doc="", arguments=tuple(sorted(form.arguments, key=lambda a: a.name)))


def kda_with_operator(S, q, k, v, g, beta):
    S = (kg.eye() - beta * kg.outer(k, k)) @ kg.diag(kg.exp(g)) @ S + beta * kg.outer(k, v)
    return S, S.T @ q


def kda_with_one_operator(S, q, k, v, g, beta):
    S = (kg.diag(kg.exp(g)) - kg.outer(k, beta * kg.exp(g) * k)) @ S + kg.outer(beta * k, v)
    return S, S.T @ q


def kda_in_separate_writes(S, q, k, v, g, beta):
    S = kg.diag(kg.exp(g)) @ S
    S = kg.outer(k, v) * beta + S - kg.outer(k, (S.T @ k) * beta)
    return S, S.T @ q


def kda_forgetting_first(S, q, k, v, g, beta):
    S = kg.diag(kg.exp(g)) @ S
    S = S - beta * kg.outer(k, k @ S)
    S = S + kg.outer(k, beta * v)
    return S, q @ S


def kda_with_the_sign_turned(S, q, k, v, g, beta):
    S = kg.diag(kg.exp(g)) @ S
    S -= kg.outer(-k, beta * -(S.T @ k - v))
    return S, (2 * S).T @ q / 2


def kda_with_arguments_in_another_order(S, beta, g, v, k, q):
    S = kg.diag(kg.exp(g)) @ S
    return S + kg.outer(k, beta * (v - S.T @ k)), (S + kg.outer(k, beta * (v - S.T @ k))).T @ q


def kda_transposed(S, q, k, v, g, beta):
    decayed = (S.T @ kg.diag(kg.exp(g))).T
    S = (decayed.T @ (kg.eye() - beta * kg.outer(k, k)).T).T + kg.outer(k, beta * v)
    return S, S.T @ q


def kda_with_the_output_written_out(S, q, k, v, g, beta):
    S = kg.diag(kg.exp(g)) @ S
    u = beta * (v - S.T @ k)
    return S + kg.outer(k, u), S.T @ q + kg.dot(q, k) * u


KDA = [f for n, f in dict(globals()).items() if n.startswith("kda_")]


@pytest.mark.parametrize("spelling", KDA, ids=lambda f: f.__name__)
def test_spellings_of_kda_have_one_form(spelling):
    assert same(canonical(kg.recurrence(spelling))) == same(canonical(kg.zoo.get("kda")))


def dplr_in_another_order(S, q, k, v, a, b, g):
    S = (kg.diag(kg.exp(g)) + kg.outer(b, a)) @ S + kg.outer(k, v)
    return S, S.T @ q


def dplr_write_first(S, q, k, v, a, b, g):
    S = kg.outer(k, v) - kg.outer(-b, S.T @ a) + kg.diag(kg.exp(g)) @ S
    return S, S.T @ q


@pytest.mark.parametrize("spelling", [dplr_in_another_order, dplr_write_first], ids=lambda f: f.__name__)
def test_spellings_of_dplr_have_one_form(spelling):
    assert same(canonical(kg.recurrence(spelling))) == same(canonical(kg.zoo.get("dplr")))


def deltaproduct_by_operators(S, q, k: kg.Key[2], v: kg.Value[2], beta: kg.Scalar[2], g):
    first, second = (kg.eye() - beta[i] * kg.outer(k[i], k[i]) for i in range(2))
    S = second @ first @ (kg.exp(g) * S) + second @ kg.outer(k[0], beta[0] * v[0]) + kg.outer(k[1], beta[1] * v[1])
    return S, S.T @ q


def deltaproduct_written_out(S, q, k: kg.Key[2], v: kg.Value[2], beta: kg.Scalar[2], g):
    S = kg.exp(g) * S
    u = beta[0] * (v[0] - S.T @ k[0])
    w = beta[1] * (v[1] - S.T @ k[1] - kg.dot(*k) * u)
    return S + kg.outer(k[0], u) + kg.outer(k[1], w), S.T @ q + kg.dot(q, k[0]) * u + kg.dot(q, k[1]) * w


@pytest.mark.parametrize("spelling", [deltaproduct_by_operators, deltaproduct_written_out], ids=lambda f: f.__name__)
def test_spellings_of_deltaproduct_have_one_form(spelling):
    assert same(canonical(kg.recurrence(spelling))) == same(canonical(kg.zoo.get("deltaproduct")))


def test_rwkv_bonus_however_written():
    def by_temporary_write(S, q, k, v, g, u: kg.ChannelParameter):
        return kg.diag(kg.exp(g)) @ S + kg.outer(k, v), (S + kg.outer(u * k, v)).T @ q

    def by_dot(S, q, k, v, g, u: kg.ChannelParameter):
        return kg.outer(k, v) + kg.diag(kg.exp(g)) @ S, S.T @ q + kg.dot(q * u, k) * v

    forms = [same(canonical(kg.recurrence(f))) for f in (by_temporary_write, by_dot)]
    assert forms[0] == forms[1]
    assert isinstance(forms[0].output.intra[0], sympy.Expr) and forms[0].output.y == 0


def test_no_coefficient_divides_by_a_decay():
    """A read between a write and a later decay: the coefficient must not contain exp(-g), infinite at a reset."""

    def read_before_decay(S, q, k, v, g, beta):
        S = S + kg.outer(k, beta * (v - S.T @ k))
        return kg.exp(g) * S, S.T @ q

    (coefficient,) = canonical(kg.recurrence(read_before_decay)).output.intra
    assert sympy.Symbol("g", real=True) not in coefficient.free_symbols
