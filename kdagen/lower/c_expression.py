"""Sympy expressions as text in C, on floats; what kdagen.lower.expression is for TileLang."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

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


POWERS = "(1.0f / sqrtf({0}))", "sqrtf({0})", "powf({0}, {1})"


class CPrinter(TilePrinter):
    """Prints with `accesses` standing for symbols; every number is a float."""

    functions, powers, form = FUNCTIONS, POWERS, "form in C"

    @staticmethod
    def number(value: float) -> str:
        """A number as it is written."""
        return f"{value!r}f"


def c_text(expr: sympy.Expr, accesses: Mapping[sympy.Symbol, str]) -> str:
    """`expr` as one line of C, `accesses` giving the text that reads each symbol."""
    return CPrinter(accesses).doprint(expr)
