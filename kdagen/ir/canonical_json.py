"""A canonical form as plain JSON and back, so that a build's manifest can say what it computes.

An expression is a symbol's name, a number, or [function, operand, ...]; only functions of kdagen's vocabulary are read,
and nothing is evaluated as code.
"""

from __future__ import annotations

import math

import sympy

from kdagen.errors import ArtefactError
from kdagen.ir.canonical import Argument, Canonical, Intra, Reader, Stream
from kdagen.ir.functions import ChannelSum, sigmoid, softplus

_SYMPY = "Add Mul Pow exp log tanh Abs sign Max Min Heaviside"
_OURS = (sigmoid, softplus, ChannelSum)
FUNCTIONS = {name: getattr(sympy, name) for name in _SYMPY.split(" ")} | {f.__name__: f for f in _OURS}


def to_json(canonical: Canonical) -> dict:
    """What `from_json` reads."""
    return {
        "name": canonical.name,
        "doc": canonical.doc,
        "arguments": [vars(a) for a in canonical.arguments],
        "decay": _write(canonical.decay),
        "decay_axis": canonical.decay_axis,
        "decay_lower": None if canonical.decay_lower == -math.inf else float(canonical.decay_lower),
        "streams": [{"x": _write(s.x), "reader": _write_reader(s.reader)} for s in canonical.streams],
        "output": _write_reader(canonical.output),
    }


def from_json(data: dict) -> Canonical:
    """The canonical form that `to_json` wrote."""
    return Canonical(
        name=data["name"],
        doc=data["doc"],
        arguments=tuple(Argument(**a) for a in data["arguments"]),
        decay=_read(data["decay"]),
        decay_axis=data["decay_axis"],
        decay_lower=-math.inf if data["decay_lower"] is None else data["decay_lower"],
        streams=tuple(Stream(_read(s["x"]), _read_reader(s["reader"])) for s in data["streams"]),
        output=_read_reader(data["output"]),
    )


def _write_reader(reader: Reader) -> dict:
    intra = [i.value if isinstance(i, Intra) else {"coefficient": _write(i)} for i in reader.intra]
    parts = {name: _write(getattr(reader, name)) for name in ("y", "z", "scale")}
    return {**parts, "after": bool(reader.after), "intra": intra}


def _read_reader(data: dict) -> Reader:
    intra = tuple(_read(i["coefficient"]) if isinstance(i, dict) else Intra(i) for i in data["intra"])
    return Reader(_read(data["y"]), _read(data["z"]), _read(data["scale"]), data["after"], intra)


def _write(expr):
    expr = sympy.sympify(expr)
    if expr.is_Symbol:
        return expr.name
    if expr.is_Integer:
        return int(expr)
    if expr.is_Rational:
        return ["Rational", int(expr.p), int(expr.q)]
    if expr.is_number and not expr.args:  # a Float, pi, infinity
        return ["Float", repr(float(expr))]
    return [expr.func.__name__, *(_write(a) for a in expr.args)]


def _read(data) -> sympy.Expr:
    if isinstance(data, str):
        return sympy.Symbol(data, real=True)
    if isinstance(data, int):
        return sympy.Integer(data)
    name, *operands = data
    if name == "Rational":
        return sympy.Rational(*operands)
    if name == "Float":
        return sympy.sympify(float(operands[0]))
    if name not in FUNCTIONS:
        raise ArtefactError(f"unknown function '{name}' in a stored recurrence: expected {', '.join(FUNCTIONS)}")
    return FUNCTIONS[name](*map(_read, operands), evaluate=False)
