"""Interval arithmetic against sampling, and the normal form of expressions."""

import math

import pytest
import sympy
import torch

from kdagen.derive.bounds import interval
from kdagen.derive.forms import divided, divides, normal, split, terms, written_sum
from kdagen.ir.canonical import Argument
from kdagen.ir.functions import ChannelSum, sigmoid, softplus
from kdagen.reference import evaluate

x, y, z = sympy.symbols("x y z", real=True)
ARGUMENTS = (Argument("x", "K", lower=-2.0, upper=1.0), Argument("y", "", lower=0.5, upper=3.0), Argument("z", "K"))
EXPRESSIONS = [
    x + y,
    x * y - 2,
    x**2,
    x**3,
    y**-2,
    sympy.sqrt(y),
    -5 * sigmoid(z),
    -softplus(z) * sympy.exp(x),
    sympy.log(y),
    sympy.Abs(x),
    sympy.Max(x, -1, z),
    sympy.Min(x, y),
    sympy.tanh(z) * y,
    ChannelSum(x**2) * y,
    sympy.exp(-sympy.exp(z)),
    y**x,
    sigmoid(z) + y - y * sigmoid(z) * x**2,
]


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_samples_lie_within(expr):
    lower, upper = interval(expr, ARGUMENTS)
    draw = torch.Generator().manual_seed(0)
    u = torch.rand(3, 1000, 4, generator=draw, dtype=torch.float64)
    env = {x: -2 + 3 * u[0], y: 0.5 + 2.5 * u[1], z: 20 * (u[2] - 0.5)}
    values = evaluate(expr, env)
    assert lower - 1e-12 <= values.min() and values.max() <= upper + 1e-12


@pytest.mark.parametrize(
    "expr, bounds",
    [
        (-5 * sigmoid(z), (-5.0, 0.0)),
        (-softplus(z), (-math.inf, 0.0)),
        (sympy.Max(-softplus(z), -5), (-5.0, 0.0)),
        (sympy.log(sympy.Symbol("y", real=True)), (math.log(0.5), math.log(3.0))),
        (z * softplus(z), (-math.inf, math.inf)),
        (x**2, (0.0, 4.0)),
        (sympy.Abs(x), (0.0, 2.0)),
        (sigmoid(z) + sigmoid(x * z) - sigmoid(z) * sigmoid(x * z), (0.0, 1.0)),
        (1 + x - x * y, (-1.0, 5.0)),
    ],
    ids=str,
)
def test_bounds_are_tight(expr, bounds):
    assert interval(expr, ARGUMENTS) == pytest.approx(bounds)


def test_normal_form_leaves_the_insides_of_functions():
    expr = sigmoid(x * (y + z)) * (x + y)
    assert normal(expr) == x * sigmoid(x * (y + z)) + y * sigmoid(x * (y + z))


def test_squares_of_sums_stay_whole_where_they_must_be_positive():
    axes = {x: "K", y: "", z: "K"}
    assert written_sum(4 * y**2 * (x - z) ** 2, axes) == 4 * y**2 * ChannelSum((x - z) ** 2)
    assert written_sum(x * (x - z), axes) == ChannelSum(x**2) - ChannelSum(x * z)
    for power in (-1, sympy.Rational(1, 2), sympy.Rational(-1, 2)):
        root = ((x - z) ** 2 + 1) ** power
        assert normal(y * root) == y * root


def test_normal_form_multiplies_exponentials():
    assert normal(sympy.exp(x + y) * sympy.exp(-x)) == sympy.exp(y)
    assert normal((x + 1.0) / (x + 1) - 1 + 2.0 * x).atoms(sympy.Float) == set()


def test_a_decay_divides_what_holds_it():
    assert divides(sympy.exp(x), [z * sympy.exp(x + y), z * sympy.exp(2 * x)])
    assert not divides(sympy.exp(x), [z * sympy.exp(x) + z])
    assert divides(sympy.exp(-x), [z * sympy.exp(-x)]) and not divides(sympy.exp(-x), [z * sympy.exp(x)])


def test_split_takes_out_scalars_only():
    axes = {x: "K", y: "", z: "K"}
    assert split([2 * y * x, 4 * y**2 * z], axes) == (2 * y, [x, 2 * y * z])
    assert split([x - x * y, z * y - z], axes)[0] in (1 - y, y - 1)
    assert split([x + z], axes) == (1, [x + z])


def test_exact_division():
    assert divided(x**2 - y**2, x - y) == x + y
    assert divided(x**2 + y, x - y) is None
    assert terms(0 * x) == ()
