"""`kdagen explain --backward`: golden text, LaTeX that is well formed, costs, and what the memory policies keep."""

import pytest
import sympy
from click.testing import CliRunner
from foreign import CASES
from test_explain import well_formed

from kdagen import zoo
from kdagen.cli_explain import command
from kdagen.explain import Derived
from kdagen.explain_backward import explain, figures, latex, reverse_text
from kdagen.ir.tensor_cost import C, K, V, backward_cost, cost
from kdagen.ir.tensor_equations import Plain
from kdagen.ir.tensor_show import show_adjoint
from kdagen.schedule import Keep

RECURRENCES = {**{name: zoo.get(name) for name in zoo.names()}, **{name: case[0] for name, case in CASES.items()}}


def run(*args):
    return CliRunner().invoke(command, args)


@pytest.mark.parametrize("name", ["kda", "mamba2"])
def test_explanation(name, golden):
    text = explain(zoo.get(name))
    golden(f"explain_{name}_backward.txt", text)
    assert run(name, "--backward").output == text


def test_other_views(golden):
    golden("explain_kda_backward.tex", run("kda", "--backward", "--latex").output)
    golden("adjoint_kda.txt", run("kda", "--backward", "--tensor-ir").output)


def test_a_comparison_is_one_of_forwards():
    result = run("kda", "--backward", "--against", "dplr")
    assert result.exit_code == 2 and "--against compares forwards: leave out --backward" in result.output


@pytest.mark.parametrize("name", RECURRENCES)
def test_any_backward_has_equations_and_a_cost(name):
    d = Derived(RECURRENCES[name])
    a = d.adjoint
    made = " ".join(line.split(" = ")[0] for line in Plain().equations(a.reverse + a.gradients))
    assert all(value is None or value.name in made for _, value in a.results)
    assert a.d_state.name in reverse_text(d)
    assert all(line == line.rstrip() for line in show_adjoint(a).splitlines())
    well_formed(latex(RECURRENCES[name]))
    it = backward_cost(a)
    assert sympy.expand(it.products + it.solve + it.elementwise - it.flops) == 0
    assert not it.flops.free_symbols - {C, K, V}


def test_products_of_the_backward_grow_as_those_of_the_forward():
    """Per token: K V in the states, C K and C V within a chunk, and no higher power of C than the solve's adjoint."""
    it, forward = backward_cost(Derived(zoo.get("kda")).adjoint), cost(Derived(zoo.get("kda")).program)
    assert {str(m) for m in monomials(forward.products)} == {"C*K", "C*V", "K*V"}
    assert {str(m) for m in monomials(it.products)} == {"C**2", "C*K", "C*V", "K*V"}
    at = {C: 32, K: 128, V: 128}
    assert 2 < it.products.subs(at) / forward.products.subs(at) < 3


def monomials(expr) -> list:
    return [term.as_coeff_Mul()[1] for term in sympy.Add.make_args(expr)]


def test_memory_policies_keep_more_and_move_less_in_the_backward():
    by_policy = {keep: figures(zoo.get("gated_deltanet"), keep) for keep in Keep}
    kept, forward, backward = zip(*(by_policy[k] for k in (Keep.INPUTS, Keep.STATES, Keep.ALL)))
    assert kept[0] == 0 < kept[1] < kept[2]
    assert forward[0] < forward[1] == forward[2]
    assert backward[0] > backward[1] > backward[2]


def test_a_state_a_chunk_is_kept():
    kept, *_ = figures(zoo.get("gla"), Keep.STATES)
    assert kept == 128 * 128 * 2 / 32
