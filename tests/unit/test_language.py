"""What a user may write, and the roles that are inferred from it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.ir.canonical import Argument


def roles(recurrence):
    return {a.name: (a.axis, a.per_token) for a in recurrence.arguments}


def test_roles_follow_from_use():
    @kg.recurrence
    def r(S, query, key, value, gate, rate):
        S = kg.diag(kg.exp(gate)) @ S
        S = S + kg.outer(key, rate * (value - S.T @ key))
        return S, S.T @ query

    per_token = {"query": "K", "key": "K", "value": "V", "gate": "K", "rate": ""}
    assert roles(r) == {n: (axis, True) for n, axis in per_token.items()}


def test_a_gate_that_multiplies_the_state_is_a_scalar():
    @kg.recurrence
    def r(S, q, k, v, g):
        return kg.exp(g) * S + kg.outer(k, v), S.T @ q

    assert roles(r)["g"] == ("", True)


def test_standard_names_decide_what_use_leaves_open():
    assert roles(kg.zoo.get("kda_softplus")) == {
        "q": ("K", True),
        "k": ("K", True),
        "v": ("V", True),
        "g": ("K", True),
        "beta": ("", True),
        "A_log": ("", False),
        "dt_bias": ("K", False),
    }


def test_use_decides_over_standard_names():
    @kg.recurrence
    def r(S, q, k, v, beta, dt_bias):
        return kg.exp(-kg.softplus(dt_bias)) * kg.diag(kg.exp(-beta)) @ S + kg.outer(k, v), S.T @ q

    vectors = {"q": ("K", True), "k": ("K", True), "v": ("V", True)}
    assert roles(r) == {**vectors, "beta": ("K", True), "dt_bias": ("", False)}


def test_an_annotation_decides_over_a_key_s_or_value_s_name():
    @kg.recurrence
    def r(S, q, v: kg.Key, k: kg.Value):
        return S + kg.outer(v, k), S.T @ q

    assert roles(r) == {"q": ("K", True), "v": ("K", True), "k": ("V", True)}


def test_query_key_and_value_are_standard_names():
    @kg.recurrence
    def r(S, query, key, value, write):
        return S + kg.outer(key, write * value), S.T @ query

    assert roles(r) == {"query": ("K", True), "key": ("K", True), "value": ("V", True), "write": ("", True)}


def test_operands_of_a_sum_have_its_axis_and_factors_beside_a_vector_are_scalars():
    @kg.recurrence
    def r(S, q, k, v, g, bias, rate):
        return kg.diag(kg.exp(-kg.softplus(g + bias))) @ S + kg.outer(k, rate * v), S.T @ q

    assert (roles(r)["bias"], roles(r)["rate"]) == (("K", True), ("", True))


def test_annotations_with_bounds():
    @kg.recurrence
    def r(S, q, k, v, g: kg.Channel(lower=-5.0, upper=0.0), w: kg.ValueParameter):
        return kg.diag(kg.exp(g)) @ S + kg.outer(k, w * v), S.T @ q

    assert r.arguments[3:] == (Argument("g", "K", True, -5.0, 0.0), Argument("w", "V", False))
    assert canonical(r).decay_lower == -5.0


def of_order(n):
    @kg.recurrence
    def r(S, q, k: kg.Key[n], v: kg.Value[n]):
        assert isinstance(k, tuple) and len(v) == n
        for a, b in zip(k, v, strict=True):
            S = S + kg.outer(a, b)
        return S, S.T @ q

    return r


def test_sequences_and_annotations_that_are_text():
    """This file postpones annotations: kg.Key[n] is text, and n belongs to the enclosing function."""
    assert list(roles(of_order(2))) == ["q", "k_1", "k_2", "v_1", "v_2"]
    assert list(roles(of_order(1))) == ["q", "k_1", "v_1"]


def test_defaults_are_constants_and_can_be_bound():
    @kg.recurrence
    def r(S, q, k, v, rate=0.5, twice: bool = False):
        assert isinstance(rate, float)
        return rate * S + kg.outer(k, 2 * v if twice else v), kg.exp(0.0) * (S.T @ q)

    assert [a.name for a in r.arguments] == ["q", "k", "v"]
    assert canonical(r).decay_lower == pytest.approx(-0.6931471805599453)
    bound = r.bind(rate=1.0, twice=True)
    assert (canonical(bound).decay, bound.constants) == (0, {"rate": 1.0, "twice": True})


def test_pythons_sum_of_matrices():
    @kg.recurrence
    def r(S, q, k: kg.Key[2], v: kg.Value[2]):
        return S + sum(kg.outer(*kv) for kv in zip(k, v, strict=True)), S.T @ q

    assert len(canonical(r).streams) == 2


def test_a_recurrence_prints_as_equations():
    assert str(kg.zoo.get("kda")) == textwrap.dedent(
        """\
        kda(S, q, k, v, g, beta):
            S1 = diag(exp(g)) @ S
            S' = S1 + outer(k, beta * (v - S1.T @ k))
            o = S'.T @ q"""
    )


def test_a_value_used_twice_is_named():
    @kg.recurrence
    def r(S, q, k, v):
        u = v - S.T @ k
        return S + kg.outer(k, u), S.T @ q + u

    assert [name for name, _ in r.equations] == ["u1", "S'", "o"]


def test_text_of_many_steps_stays_short():
    @kg.recurrence
    def r(S, q, k: kg.Key[12], v):
        for x in k:
            S = S + kg.outer(x, v - S.T @ x)
        return S, S.T @ q

    assert len(str(r)) < 2000 and len(str(r.new_state)) < 5000
    assert len(canonical(r).streams) == 12


def test_errors_say_where():
    with pytest.raises(kg.RecurrenceError, match=r"\(.*test_language.py:\d+\)"):

        @kg.recurrence
        def r(S, q, k, v):
            return S + kg.outer(k, v), S @ q


def test_numpy_scalars_are_numbers():
    numpy = pytest.importorskip("numpy")

    @kg.recurrence
    def r(S, q, k, v):
        return numpy.float64(0.5) * S + numpy.float32(2) * kg.outer(k, v), S.T @ (q * numpy.float64(3))

    assert canonical(r).decay_lower == pytest.approx(-0.6931471805599453)


FILE = """
    from __future__ import annotations
    import kdagen as kg

    @kg.recurrence
    def first(S, q, k: kg.Key, v):
        S = S + kg.outer(k, v)
        return S, S.T @ q
"""


def test_load(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(FILE))
    kda = kg.zoo.get("kda")
    assert kg.load("kda") is kda and kg.load(kda) is kda
    assert kg.load(f"{path}:first").name == kg.load(str(path)).name == "first"


def test_zoo_is_complete_and_documented():
    for name in kg.zoo.names():
        found = kg.zoo.get(name)
        assert found.name == name and found.doc


def test_import_is_light():
    code = "import sys, kdagen, kdagen.zoo; kdagen.zoo.names(); kdagen.exp, kdagen.Key, kdagen.KdagenError; "
    code += "assert callable(kdagen.recurrence); heavy = {'torch', 'tilelang', 'tvm', 'sympy'} & set(sys.modules); "
    code += "assert not heavy, heavy; kdagen.zoo.get('kda'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    for name in kg.__all__:
        assert getattr(kg, name) is not None
    assert "exp" in dir(kg)
    with pytest.raises(AttributeError, match="module 'kdagen' has no attribute 'expp'"):
        kg.expp  # noqa: B018
