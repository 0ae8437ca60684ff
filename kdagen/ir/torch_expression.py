"""Sympy expressions as torch functions whose last step writes into a given tensor.

Compiled once an expression; unlike kdagen.reference.evaluate (the oracle's) the result keeps the operands' dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import sympy

from kdagen.errors import RecurrenceError
from kdagen.ir.functions import inverse_or_zero, sigmoid, softplus

Compiled = Callable[..., object]  # (env: symbol -> tensor, out: tensor or None) -> tensor
SAME_INDEX = sympy.Symbol("same_index")  # stands for KroneckerDelta(i, j): env gives the identity matrix


@functools.lru_cache(maxsize=1024)
def compiled(expr: sympy.Expr) -> Compiled:
    """A function of (env, out) that evaluates `expr`; numbers are tensors without dims, so they promote nothing."""
    if isinstance(expr, sympy.KroneckerDelta):
        expr = SAME_INDEX
    if expr.is_Symbol:
        return lambda env, out=None: _into(out, env[expr])
    if expr.is_number:
        return _constant(float(expr))
    function, args = _function(expr)
    steps = [compiled(a) for a in args]
    return lambda env, out=None: _apply(function, [step(env) for step in steps], out)


def _constant(number: float) -> Compiled:
    import torch

    value = torch.tensor(number, dtype=torch.float64)
    return lambda env, out=None: _into(out, value)


def _function(expr: sympy.Expr):
    functions = _functions()
    if isinstance(expr, sympy.Pow) and expr.exp in POWERS:
        return functions[POWERS[expr.exp]], expr.args[:1]
    if expr.func not in functions:
        known = ", ".join(sorted(f if isinstance(f, str) else f.__name__ for f in functions))
        raise RecurrenceError(f"'{expr}' has no form on torch: expected functions among {known}")
    return functions[expr.func], expr.args


def _apply(function, values: list, out):
    """Folds a function of two over more arguments, the smallest first, so that little is done at full size."""
    if len(values) > 2:
        values.sort(key=lambda v: v.numel())
    while len(values) > 2:
        values[:2] = [function(*values[:2])]
    if out is not None and any(v.shape == out.shape for v in values):
        return function(*values, out=out)
    return _into(out, function(*values))


def _into(out, value):
    return value if out is None else out.copy_(value)


# Powers with functions of their own: torch.pow with a tensor for an exponent takes 30 times as long as a product.
POWERS = {
    sympy.Rational(1, 2): "sqrt",
    sympy.Rational(-1, 2): "rsqrt",
    sympy.Integer(-1): "reciprocal",
    sympy.Integer(2): "square",
}


@functools.cache
def _functions() -> dict:
    import torch

    # torch's own sigmoid and softplus give the last elements of a tensor other bits than the rest; these do not.
    def rate(x, out=None):
        return torch.reciprocal(torch.neg(x).exp_().add_(1), out=out)

    def plus(x, out=None):
        return torch.add(x.clamp_min(0), torch.abs(x).neg_().exp_().log1p_(), out=out)

    def step(x, at_zero, out=None):
        return torch.heaviside(x, at_zero.to(x.dtype), out=out)

    def inverse(x, out=None):
        return torch.where(x == 0, x, torch.reciprocal(x), out=out)

    return {
        inverse_or_zero: inverse,
        sympy.Add: torch.add,
        sympy.Mul: torch.mul,
        sympy.Pow: torch.pow,
        sympy.exp: torch.exp,
        sympy.log: torch.log,
        sympy.tanh: torch.tanh,
        sympy.Abs: torch.abs,
        sympy.sign: torch.sign,
        sympy.Max: torch.maximum,
        sympy.Min: torch.minimum,
        sympy.Heaviside: step,
        sigmoid: rate,
        softplus: plus,
        **{name: getattr(torch, name) for name in POWERS.values()},
    }
