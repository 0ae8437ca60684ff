"""The chunk form: what it is made of, and that every recurrence has a legal one."""

import pytest
import sympy
from foreign import CASES

import kdagen as kg
from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.derive.chunk import chunk_form
from kdagen.ir.tensor import Decay, Gram, Interleave, Load, Map, MatMul, RowSum, SolveTril, reads
from kdagen.ir.tensor_show import show
from kdagen.ir.tensor_verify import verify


def program(name):
    return chunk_form(canonical(zoo.get(name)))


def of_kind(p, kind):
    return [op for op in p.prepare if isinstance(op, kind)]


@pytest.mark.parametrize("name", zoo.names())
def test_every_zoo_entry_has_a_legal_chunk_form(name):
    verify(program(name))


@pytest.mark.parametrize("name", CASES)
def test_recurrences_of_users_have_a_legal_chunk_form(name):
    verify(chunk_form(canonical(CASES[name][0])))


@pytest.mark.parametrize("name", ["kda", "kda_softplus", "dplr", "deltaproduct", "linear_attention"])
def test_text_of_the_tensor_program(name, golden):
    golden(f"tensor_{name}.txt", show(program(name)))


@pytest.mark.parametrize("name", zoo.names())
def test_one_gram_over_all_readers_and_streams(name):
    p = program(name)
    (gram,) = of_kind(p, Gram)
    reading = [r for r in p.canonical.readers if r.reads]
    assert (len(gram.readers), len(gram.writers)) == (len(reading), len(p.canonical.streams))


def test_no_solve_without_a_stream_that_reads():
    p = program("gla")
    assert not of_kind(p, SolveTril)
    assert [op.out.name for op in p.scan] == ["S_kept", "S_next"]


def test_no_decay_no_decay_ops():
    p = program("deltanet")
    assert not of_kind(p, Decay)
    assert [op.out.name for op in p.scan] == ["R", "P", "S_next"]
    assert of_kind(p, Gram)[0].g is None


def test_bare_arguments_are_operands_as_they_are():
    p = program("kda")
    scan = {op.out.name: op for op in p.scan}
    assert scan["R"].add == next(op.out for op in of_kind(p, Load) if op.argument.name == "v")
    assert [v.name for v in of_kind(p, Gram)[0].writers] == ["k"]


def test_what_varies_by_token_is_zero_past_the_end():
    p = program("kda_softplus")
    by_token = [op for op in of_kind(p, Map) if op.out.dims[:1] == ("C",) and op.out.dims[1:] in ((), ("K",), ("V",))]
    formed = [op for op in by_token if not any(isinstance(o, Decay) and o.out in reads(op) for o in p.prepare)]
    assert {op.out.name for op in formed} >= {"log_decay", "x", "z", "z_o", "scale"}
    assert all(op.zero_past_end for op in formed)


def test_a_channel_sum_becomes_row_sums_once():
    p = program("kda_softplus")
    assert [op.a.name for op in of_kind(p, RowSum)] == ["terms1", "terms2"]


def test_opposite_operands_are_formed_from_each_other():
    p = program("kda_softplus")
    z = next(op for op in of_kind(p, Map) if op.out.name == "z")
    assert [v.name for v in reads(z)] == ["x"]


def test_sub_steps_are_interleaved_and_see_earlier_ones_of_their_token():
    p = program("deltaproduct")
    assert {op.out.name: op.out.dims for op in of_kind(p, Interleave)}["L"] == ("2C", "2C")
    assert of_kind(p, Gram)[0].diagonal == ((False, False), (True, False), (True, True))


def test_streams_known_beforehand_enter_no_solve():
    p = program("dplr")
    assert of_kind(p, SolveTril)[0].a.dims == ("C", "C")
    assert not any(isinstance(op, MatMul) for op in p.prepare)
    (r,) = [op for op in p.scan if op.out.name == "R"]
    assert [(a.name, b.name) for a, b, *_ in r.terms] == [("Z", "S"), ("L_n", "v")]


def test_an_own_token_coefficient_goes_on_the_diagonal():
    @kg.recurrence
    def bonus(S, q, k, v, u: kg.ChannelParameter):
        return S + kg.outer(k, v), S.T @ q + kg.dot(q, u * k) * v

    p = verify(chunk_form(canonical(bonus)))
    a = next(op for op in of_kind(p, Map) if op.out.name == "A")
    assert a.expr.has(sympy.KroneckerDelta)
    assert [v.name for v in reads(a)] == ["GA", "sum1"]


def test_names_of_arguments_never_clash_with_derived_ones():
    @kg.recurrence
    def clash(S, Q, P, A: kg.Value, R, L):
        S = kg.diag(kg.exp(R)) @ S
        S = S + kg.outer(P, L * (A - S.T @ P))
        return S, S.T @ Q

    p = verify(chunk_form(canonical(clash)))
    loads = {op.argument.name: op.out.name for op in of_kind(p, Load)}
    assert loads == {"Q": "Q", "P": "P_", "A": "A", "R": "R_", "L": "L"}
