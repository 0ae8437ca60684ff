"""The functions that appear in kdagen's expressions beside sympy's own.

Expressions are built from symbols, numbers, +, *, ** and: exp, log, tanh, Abs, sign, Max, Min, Heaviside (sympy's),
sigmoid, softplus, inverse_or_zero and ChannelSum (here). Every backend maps exactly these.
"""

from __future__ import annotations

import sympy


class sigmoid(sympy.Function):
    """1 / (1 + exp(-x))."""

    nargs = 1

    @classmethod
    def eval(cls, x):
        return 1 / (1 + sympy.exp(-x)) if x.is_Number else None

    def fdiff(self, argindex=1):
        return self * (1 - self)

    def _eval_is_positive(self):
        return True


class softplus(sympy.Function):
    """log(1 + exp(x)); backends evaluate it as max(x, 0) + log1p(exp(-|x|))."""

    nargs = 1

    @classmethod
    def eval(cls, x):
        return sympy.log(1 + sympy.exp(x)).evalf() if x.is_Number and x.is_finite else None

    def fdiff(self, argindex=1):
        return sigmoid(self.args[0])

    def _eval_is_positive(self):
        return True


class inverse_or_zero(sympy.Function):
    """1 / x, and 0 at x = 0."""

    nargs = 1


class ChannelSum(sympy.Function):
    """The sum of an elementwise expression over its channels (K or V, whichever its symbols have): a scalar a token.

    Opaque to sympy: not to be differentiated as a function of its own value; replace it by a symbol first.
    """

    nargs = 1

    @classmethod
    def eval(cls, x):
        return sympy.S.Zero if x.is_zero else None

    def _eval_is_real(self):
        return self.args[0].is_real

    def _eval_is_nonnegative(self):
        return self.args[0].is_nonnegative


def free_symbols_outside_sums(expr: sympy.Expr) -> frozenset[sympy.Symbol]:
    """The symbols that stand outside any ChannelSum, so decide the axis of an expression."""
    if isinstance(expr, ChannelSum):
        return frozenset()
    if expr.is_Symbol:
        return frozenset((expr,))
    return frozenset().union(*(free_symbols_outside_sums(a) for a in expr.args))


def axis_of(expr: sympy.Expr, axes: dict[sympy.Symbol, str]) -> str:
    """The axis of an elementwise expression: "K", "V" or "" for a scalar."""
    found = {axes[s] for s in free_symbols_outside_sums(expr)} - {""}
    if len(found) > 1:
        raise ValueError(f"{expr} mixes key and value channels")
    return found.pop() if found else ""
