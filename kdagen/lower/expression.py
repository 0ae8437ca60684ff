"""Sympy expressions as text in TileLang's expression syntax."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
from sympy.printing.str import StrPrinter

from kdagen.errors import RecurrenceError

# What each function of a recurrence is on the GPU. Arguments are fp32; forms do not overflow.
FUNCTIONS = {
    "exp": "T.exp({0})",
    "log": "T.log({0})",
    "tanh": "T.tanh({0})",
    "Abs": "T.abs({0})",
    "sigmoid": "(1.0 / (1.0 + T.exp(-({0}))))",
    "softplus": "(T.max({0}, 0.0) + T.log(1.0 + T.exp(-T.abs({0}))))",
    "inverse_or_zero": "T.if_then_else({0} == 0.0, 0.0, 1.0 / ({0}))",
    "sign": "T.if_then_else({0} > 0.0, 1.0, T.if_then_else({0} < 0.0, -1.0, 0.0))",
    "Heaviside": "T.if_then_else({0} > 0.0, 1.0, T.if_then_else({0} < 0.0, 0.0, {1}))",
    "Max": "T.max({0}, {1})",
    "Min": "T.min({0}, {1})",
}


# Powers: of -1/2, of 1/2, any other.
POWERS = "T.rsqrt({0})", "T.sqrt({0})", "T.pow({0}, {1})"


class TilePrinter(StrPrinter):
    """Prints with `accesses` standing for symbols; every number is a float."""

    functions, powers, form = FUNCTIONS, POWERS, "GPU form"

    def __init__(self, accesses: Mapping[sympy.Symbol, str]):
        super().__init__()
        self.accesses = accesses

    def _print_Symbol(self, expr):
        return self.accesses[expr]

    def _print_Function(self, expr):
        name = expr.func.__name__
        if name not in self.functions:
            raise RecurrenceError(f"'{expr}' has no {self.form}: expected functions among {', '.join(self.functions)}")
        return self.functions[name].format(*(self._print(a) for a in expr.args))

    _print_Abs = _print_Heaviside = _print_Function  # sympy prints these in a way of its own

    def _print_minmax(self, expr):
        first, *rest = (self._print(a) for a in expr.args)
        for other in rest:
            first = self.functions[expr.func.__name__].format(first, other)
        return first

    _print_Max = _print_Min = _print_minmax

    def _print_KroneckerDelta(self, expr):
        return f"T.if_then_else({self._print(expr.args[0])} == {self._print(expr.args[1])}, 1.0, 0.0)"

    def _print_Pow(self, expr, rational=False):
        base, (inverse_root, root, power) = self._print(expr.base), self.powers
        if expr.exp == sympy.Rational(-1, 2):
            return inverse_root.format(base)
        if expr.exp == sympy.Rational(1, 2):
            return root.format(base)
        if expr.exp.is_Integer and 1 < expr.exp <= 4:
            return "(" + " * ".join([f"({base})"] * int(expr.exp)) + ")"
        if expr.exp == -1:
            return f"({self.number(1.0)} / ({base}))"
        return power.format(base, self._print(expr.exp))

    @staticmethod
    def number(value: float) -> str:
        """A number as it is written."""
        return repr(value)

    def _print_number(self, expr):
        return self.number(float(expr))

    _print_Integer = _print_Rational = _print_Float = _print_NumberSymbol = _print_number
    _print_Pi = _print_Exp1 = _print_number
    _print_Zero = _print_One = _print_NegativeOne = _print_Half = _print_number


def tile_text(expr: sympy.Expr, accesses: Mapping[sympy.Symbol, str]) -> str:
    """`expr` as one line of TileLang, `accesses` giving the text that reads each symbol."""
    return TilePrinter(accesses).doprint(expr)
