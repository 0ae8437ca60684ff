"""Sympy expressions as text in C, on floats; what kdagen.lower.expression is for TileLang."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from kdagen.errors import RecurrenceError
from kdagen.lower.expression import TilePrinter

# What each function of a recurrence is in C; those with a trailing underscore are in functions.c.
FUNCTIONS = {
    "exp": "exp_({0})",
    "log": "log_({0})",
    "tanh": "tanhf({0})",
    "Abs": "fabsf({0})",
    "sigmoid": "(1.0f / (1.0f + exp_(-({0}))))",
    "softplus": "softplus_({0})",
    "inverse_or_zero": "inverse_or_zero_({0})",
    "sign": "sign_({0})",
    "Heaviside": "heaviside_({0}, {1})",
    "Max": "max_({0}, {1})",
    "Min": "min_({0}, {1})",
}


class CPrinter(TilePrinter):
    """Prints with `accesses` standing for symbols; every number is a float."""

    def _print_Function(self, expr):
        name = expr.func.__name__
        if name not in FUNCTIONS:
            raise RecurrenceError(f"'{expr}' has no form in C: expected functions among {', '.join(FUNCTIONS)}")
        return FUNCTIONS[name].format(*(self._print(a) for a in expr.args))

    _print_Abs = _print_Heaviside = _print_Function

    def _print_minmax(self, expr):
        first, *rest = (self._print(a) for a in expr.args)
        for other in rest:
            first = FUNCTIONS[expr.func.__name__].format(first, other)
        return first

    _print_Max = _print_Min = _print_minmax

    def _print_Exp1(self, expr):
        return self._print_number(expr)

    def _print_Pow(self, expr, rational=False):
        base = self._print(expr.base)
        if expr.exp == sympy.Rational(-1, 2):
            return f"(1.0f / sqrtf({base}))"
        if expr.exp == sympy.Rational(1, 2):
            return f"sqrtf({base})"
        if expr.exp.is_Integer and 1 < expr.exp <= 4:
            return "(" + " * ".join([f"({base})"] * int(expr.exp)) + ")"
        if expr.exp == -1:
            return f"(1.0f / ({base}))"
        return f"powf({base}, {self._print(expr.exp)})"

    def _print_number(self, expr):
        return f"{float(expr)!r}f"

    _print_Integer = _print_Rational = _print_Float = _print_NumberSymbol = _print_number
    _print_Pi = _print_number
    _print_Zero = _print_One = _print_NegativeOne = _print_Half = _print_number


def c_text(expr: sympy.Expr, accesses: Mapping[sympy.Symbol, str]) -> str:
    """`expr` as one line of C, `accesses` giving the text that reads each symbol."""
    return CPrinter(accesses).doprint(expr)
