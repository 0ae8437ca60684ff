"""A canonical form survives being written as JSON and read again, to the last term."""

import json

import pytest
import sympy

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.ir import canonical_json


@pytest.mark.parametrize("name", zoo.names())
def test_the_zoo_survives(name):
    form = canonical(zoo.get(name))
    text = json.dumps(canonical_json.to_json(form), allow_nan=False)
    assert canonical_json.from_json(json.loads(text)) == form


@pytest.mark.parametrize("number", [sympy.Rational(1, 3), sympy.Float(0.1), sympy.oo, -sympy.oo, sympy.Integer(-7)])
def test_numbers_survive(number):
    text = json.dumps(canonical_json._write(number), allow_nan=False)
    assert canonical_json._read(json.loads(text)) == number


def test_what_sympy_would_rearrange_stays_as_it_is():
    x, y = (sympy.Symbol(n, real=True) for n in "xy")
    product = sympy.Mul(2, x + y, evaluate=False)
    assert canonical_json._read(canonical_json._write(product)) == product != 2 * (x + y)
