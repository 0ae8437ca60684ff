"""The step form: one token as the recurrence says, for every recurrence, from one reading of the state."""

import dataclasses

import pytest
import torch
from foreign import CASES

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.derive.step import step_form
from kdagen.errors import KdagenError
from kdagen.ir.canonical import Intra
from kdagen.ir.step import interpret, show, verify
from kdagen.ir.tensor import Load, Value, reads
from kdagen.reference import recurrence_reference
from kdagen.zoo.inputs import GATES

ALL = {**{name: zoo.get(name) for name in zoo.names()}, **{name: case[0] for name, case in CASES.items()}}


def form(name):
    return step_form(canonical(ALL[name]))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ALL)
def test_equals_the_oracle(name, gate):
    found = verify(form(name))
    tensors = zoo.sample(found.canonical, (2, 12, 2, 6, 5), gate, 1)
    state = torch.randn(2, 2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = recurrence_reference(ALL[name], tensors, state)
    for got, want in zip(interpret(found, tensors, state), expected, strict=True):
        assert torch.isfinite(want).all()
        assert (got - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize("name", ["kda", "kda_softplus", "dplr", "deltaproduct", "linear_attention"])
def test_text(name, golden):
    golden(f"step_{name}.txt", show(form(name)))


@pytest.mark.parametrize("name", ALL)
def test_a_z_meets_the_state_once(name):
    found = form(name)
    c = found.canonical
    assert len({r.z for r in found.reads}) == len(found.reads)
    assert len(found.reads) == len({(r.z, r.after) for r in c.readers if r.reads})


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_made_in_vain(name):
    found = form(name)
    used = {v for op in found.token + found.values for v in reads(op)} | {r.z for r in found.reads} | {found.out}
    used |= {v for w in found.writes for v in (w.x, w.p)} | {found.decay}
    assert {op.out for op in found.ops} <= used


def test_grouped_heads_share_keys():
    tensors = zoo.sample(canonical(ALL["kda"]), (1, 9, 4, 6, 5), "mild", 0)
    shared = {n: x[:, :, ::2] if n in "qk" else x for n, x in tensors.items()}
    expanded = {n: x.repeat_interleave(2, 2) if n in "qk" else x for n, x in shared.items()}
    for got, want in zip(interpret(form("kda"), shared), recurrence_reference(ALL["kda"], expanded)):
        assert (got - want).norm() <= 1e-12 * want.norm()


def test_a_stream_that_is_an_argument_is_read_as_it_is():
    found = form("gla")
    assert [w.p.name for w in found.writes] == ["v"] and [op.out.name for op in found.values] == ["o"]
    assert Intra.GRAM in found.canonical.output.intra


def test_an_illegal_form_is_refused():
    found = form("kda")
    unmade = dataclasses.replace(found, token=tuple(op for op in found.token if not isinstance(op, Load)))
    with pytest.raises(KdagenError, match="step form of kda: .* reads '.*': expected a value that is made before"):
        verify(unmade)
    with pytest.raises(KdagenError, match=r"the update reads .* expected x \(K\), p \(V\), output \(V\)"):
        verify(dataclasses.replace(found, decay=None, out=Value("k", ("K",))))
    with pytest.raises(KdagenError, match="'q' .* expected a new name"):
        verify(dataclasses.replace(found, token=found.token[:1] + found.token))
