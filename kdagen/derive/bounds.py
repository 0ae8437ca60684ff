"""Interval arithmetic over elementwise expressions: what is known of a gate before any input is seen."""

from __future__ import annotations

import functools
import itertools
import math

import sympy

from kdagen.derive.forms import L2Norm
from kdagen.ir.canonical import Argument
from kdagen.ir.functions import ChannelSum, sigmoid, softplus

Interval = tuple[float, float]
ANY: Interval = (-math.inf, math.inf)


def interval(expr: sympy.Expr, arguments: tuple[Argument, ...]) -> Interval:
    """Bounds of an expression from those of its arguments; infinite where nothing is known."""
    known = {a.symbol: (_or(a.lower, -math.inf), _or(a.upper, math.inf)) for a in arguments}
    return _interval(sympy.sympify(expr), known)


def _or(value, default):
    return default if value is None else float(value)


def _interval(expr, known) -> Interval:
    if expr.is_number:
        return (float(expr), float(expr))
    if expr.is_Symbol:
        return known.get(expr, ANY)
    parts = [_interval(a, known) for a in expr.args]
    if expr.is_Add:
        low, high = map(sum, zip(*parts, strict=True))
        least, most = _corners(expr, known)
        return (max(low, least), min(high, most))
    if expr.is_Mul:
        return functools.reduce(_times, parts)
    if expr.is_Pow:
        return _power(parts[0], expr.exp)
    if isinstance(expr, (sympy.Max, sympy.Min)):
        of = max if isinstance(expr, sympy.Max) else min
        return (of(p[0] for p in parts), of(p[1] for p in parts))
    if isinstance(expr, sympy.Abs):
        return _absolute(parts[0])
    if isinstance(expr, L2Norm):
        return (-1.0, 1.0)
    if isinstance(expr, ChannelSum):  # of an unknown number of channels
        return (0.0 if parts[0][0] >= 0 else -math.inf, 0.0 if parts[0][1] <= 0 else math.inf)
    if type(expr) in MONOTONE:
        return tuple(MONOTONE[type(expr)](x) for x in parts[0])
    return ANY


def _corners(expr, known) -> Interval:
    """Bounds of a sum of products of bounded factors: linear in each, so extreme at corners, as s + t - s t is."""
    factors = dict.fromkeys(f for t in expr.args for f in sympy.Mul.make_args(t) if not f.is_number)
    bounds = [_interval(f, known) for f in factors]
    if len(bounds) > MOST_FACTORS or not all(math.isfinite(x) for b in bounds for x in b):
        return ANY
    ends = [float(expr.xreplace(dict(zip(factors, map(sympy.Float, c))))) for c in itertools.product(*bounds)]
    return (min(ends), max(ends))


MOST_FACTORS = 6  # beyond which 2^n corners are too many


def _exp(x):
    return math.exp(x) if x < 700 else math.inf


def _log(x):
    return math.log(x) if x > 0 else -math.inf


MONOTONE = {
    sympy.exp: _exp,
    sympy.log: _log,
    sympy.tanh: math.tanh,
    sigmoid: lambda x: 1 / (1 + _exp(-x)),
    softplus: lambda x: x if x == math.inf else max(x, 0.0) + math.log1p(_exp(-abs(x))),
}


def _times(a: Interval, b: Interval) -> Interval:
    ends = [0.0 if 0.0 in (x, y) else x * y for x in a for y in b]
    return (min(ends), max(ends))


def _absolute(a: Interval) -> Interval:
    low = 0.0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))
    return (low, max(abs(a[0]), abs(a[1])))


def _power(a: Interval, e) -> Interval:
    if not e.is_number:
        return (0.0, math.inf) if a[0] >= 0 else ANY
    if e.is_Integer and e % 2 == 0:
        a = _absolute(a)
    elif a[0] < 0:
        return ANY if not (e.is_Integer and e > 0) else (-_raise(-a[0], e), _raise(a[1], e) if a[1] > 0 else a[1])
    ends = (_raise(a[0], e), _raise(a[1], e))
    return (min(ends), max(ends))


def _raise(x: float, e) -> float:
    if x in (0.0, math.inf):
        return x if e > 0 else (math.inf if x == 0 else 0.0)
    return x ** float(e)
