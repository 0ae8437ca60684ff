"""A tensor program that breaks a rule is refused with the op and the rule."""

import dataclasses

import pytest
import sympy

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.derive.chunk import chunk_form
from kdagen.errors import ArgumentError, KdagenError, RecurrenceError
from kdagen.ir.tensor import Decay, Gram, Interleave, Load, Map, MatMul, RowSum, SolveTril, Span, Term, Value, writes
from kdagen.ir.tensor_interpret import interpret
from kdagen.ir.tensor_verify import verify
from kdagen.ir.torch_expression import compiled

P = chunk_form(canonical(zoo.get("kda")))
BY_NAME = {v.name: op for op in P.prepare + P.scan + P.output for v in writes(op)}
ODD = Value("odd", ("C", "C"))


def value(name):
    return next(v for v in writes(BY_NAME[name]) if v.name == name)


def appended(op, section="prepare"):
    return dataclasses.replace(P, **{section: getattr(P, section) + (op,)})


def changed(name, **fields):
    """KDA's program with one op changed."""
    old, new = BY_NAME[name], dataclasses.replace(BY_NAME[name], **fields)
    sections = {s: tuple(new if op == old else op for op in getattr(P, s)) for s in ("prepare", "scan", "output")}
    return dataclasses.replace(P, **sections)


CASES = [
    (appended(RowSum(Value("r", ("K",)), P.state)), "RowSum of r reads 'S': prepare must not read the state 'S'"),
    (appended(SolveTril(ODD, Value("M", ("C", "C")))), r"reads M\[C, C\]: expected a value made before.*not yet made"),
    (appended(RowSum(Value("r", ("C",)), Value("k", ("C", "V")))), r"reads k\[C, V\].*it is k\[C, K\]"),
    (appended(BY_NAME["T"]), "SolveTril of T makes 'T' again: expected a name that is assigned once"),
    (appended(SolveTril(Value("T2", ("C", "C")), value("A")), "scan"),
     "outside prepare: expected scan and output to hold"),
    (appended(MatMul(Value("O2", ("C", "V")), (Term(value("Q"), P.next_state),)), "output"),
     "output must not read the next state 'S_next'"),
    (dataclasses.replace(P, output=()), "'O' is never made: expected an op that makes O"),
    (dataclasses.replace(P, next_state=value("R")), r"the next state is R\[C, V\]: expected the dims of S\[K, V\]"),
    (changed("q", out=Value("q", ("K", "C"))), r"Load of q has q\[K, C\]: expected dims \(C, K\)"),
    (changed("z", indices=("i",)), r"has indices \('i',\): expected one for each dim of z\[C, K\]"),
    (changed("z", operands=((value("k"), ("k", "i")),)),
     r"reads k\[C, K\] at \(k, i\): expected the indices of its dims"),
    (changed("z", expr=sympy.Symbol("w")), "has 'w': expected operands for w"),
    (appended(RowSum(Value("r", ("K",)), value("k"))), r"RowSum of r has r\[K\]: expected dims \(C\)"),
    (appended(Decay(Value("d", ("C", "V")), value("v"), Span.REST)),
     r"decays by v\[C, V\]: expected one rate a key channel"),
    (changed("gamma", out=Value("gamma", ("C", "K"))), r"has gamma\[C, K\]: expected dims \(K\)"),
    (changed("A", readers=(value("z"), value("v"))), r"has v\[C, V\]: expected dims \(C, K\)"),
    (changed("A", diagonal=((True,),)), r"has diagonal \(1,\): expected 2 rows of 1"),
    (changed("A", after=(True,)), "has 1 flags 'after': expected one for each of 2 readers"),
    (appended(Interleave(Value("I", ("2C", "K")), ((value("k"),), (value("v"),)))),
     r"has v\[C, V\]: expected dims \(C, K\)"),
    (appended(Interleave(Value("I", ("2C", "K")), ((value("k"),), (value("k"), value("q"))))),
     "rows of unequal length"),
    (appended(Interleave(Value("I", ("C", "K")), ((value("k"),), (value("q"),)))),
     r"has I\[C, K\]: expected dims \(2C, K\)"),
    (appended(SolveTril(ODD, value("k"))), r"solves k\[C, K\]: expected a square matrix of rows by rows"),
    (appended(MatMul(ODD, ())), "MatMul of odd has no product: expected at least one term"),
    (appended(MatMul(ODD, (Term(value("beta"), value("k")),))),
     r"multiplies beta\[C\] by k\[C, K\]: expected two matrices"),
    (appended(MatMul(ODD, (Term(value("k"), value("q"), True),))),
     r"multiplies k\[C, K\]\^T by q\[C, K\]: expected a product"),
    (changed("R", add=value("k")), r"MatMul of R has k\[C, K\]: expected dims \(C, V\)"),
]  # fmt: skip


@pytest.mark.parametrize("program, message", CASES, ids=range(len(CASES)))
def test_illegal_programs(program, message):
    with pytest.raises(KdagenError, match=message):
        verify(program)


def test_the_program_they_were_made_from_is_legal():
    assert verify(P) is P
    assert {type(op) for op in P.prepare} == {Load, Map, Gram, SolveTril, Decay}


def test_a_chunk_size_that_is_no_power_of_two():
    tensors = zoo.sample(P.canonical, (1, 4, 1, 4, 4))
    with pytest.raises(ArgumentError, match="chunk_size = 24: expected a power of two, such as 16, 32 or 64"):
        interpret(P, tensors, None, 24)


def test_a_function_without_a_form_on_torch():
    with pytest.raises(RecurrenceError, match=r"'gamma\(x\)' has no form on torch: expected functions among"):
        compiled(sympy.gamma(sympy.Symbol("x")))
