"""Normal form of elementwise expressions: sums of monomials, so that equal expressions are the same object.

Unlike sympy.expand it leaves the insides of functions and denominators alone: sigmoid(a * (g + b)) stays as written,
exp(a + b) becomes exp(a) * exp(b).
"""

from __future__ import annotations

import functools
import math

import sympy

from kdagen.errors import RecurrenceError
from kdagen.ir.functions import ChannelSum, axis_of

Monomial = dict[sympy.Expr, sympy.Expr]  # base -> exponent; exp(c * t) is stored as exp(t) -> c


class L2Norm(sympy.Function):
    """x / sqrt(sum x^2 + eps), kept whole while deriving: a vector like an argument."""

    nargs = 2


@functools.lru_cache(maxsize=65536)
def normal(expr: sympy.Expr) -> sympy.Expr:
    """The sum of monomials equal to `expr`."""
    atoms: dict[sympy.Expr, sympy.Dummy] = {}
    polynomial = sympy.expand(_polynomial(sympy.sympify(expr), atoms))
    whole = {f: sympy.Integer(int(f)) for f in polynomial.atoms(sympy.Float) if float(f).is_integer()}
    return polynomial.xreplace({dummy: atom for atom, dummy in atoms.items()} | whole)


def _polynomial(expr, atoms):
    """`expr` with functions, exponentials and denominators replaced by dummies."""
    if expr.is_Number or expr.is_Symbol:
        return expr
    if expr.is_Add or expr.is_Mul:
        return expr.func(*(_polynomial(a, atoms) for a in expr.args))
    if isinstance(expr, sympy.exp):
        return sympy.Mul(*(_exponential(t, atoms) for t in sympy.Add.make_args(expr.args[0])))
    if expr.is_Pow and expr.exp.is_Integer and expr.exp > 0:
        return _polynomial(expr.base, atoms) ** expr.exp
    if expr.is_Pow and expr.exp.is_Number:
        base = normal(expr.base)
        if not base.is_Add:
            return sympy.Mul(*(_atom(b, atoms) ** (e * expr.exp) for b, e in _roots(base)))
        return _atom(expr.base, atoms) ** expr.exp  # as written: (a - b)^2 written out may round below zero
    return _atom(expr, atoms)


def _roots(base):
    """Factors of a monomial that may be raised to a power one by one."""
    if base.is_Mul and all(a.is_positive or a.is_nonnegative for a in base.args):
        return [a.as_base_exp() for a in base.args]
    return [(base, sympy.S.One)]


def _exponential(term, atoms):
    number, rest = term.as_coeff_Mul()
    if rest == 1:
        return sympy.exp(number).evalf()
    return _atom(sympy.exp(rest), atoms) ** number


def _atom(expr, atoms):
    if expr.is_Number or expr.is_Symbol:
        return expr
    return atoms.setdefault(expr, sympy.Dummy())


def terms(expr: sympy.Expr) -> tuple[sympy.Expr, ...]:
    """The monomials of an expression; none for zero."""
    expr = normal(expr)
    return () if expr == 0 else tuple(sorted(sympy.Add.make_args(expr), key=lambda t: str(product(1, monomial(t)[1]))))


def monomial(term: sympy.Expr) -> tuple[sympy.Expr, Monomial]:
    """The number and the factors of one monomial."""
    number, rest = term.as_coeff_Mul()
    factors: Monomial = {}
    for f in sympy.Mul.make_args(rest):
        base, e = f.as_base_exp()
        if isinstance(f, sympy.exp):
            e, t = f.args[0].as_coeff_Mul()
            base = sympy.exp(t)
        if base != 1:
            factors[base] = factors.get(base, 0) + e
    return number, factors


def product(number, factors: Monomial) -> sympy.Expr:
    """The expression of a monomial."""
    return sympy.Mul(number, *(_power(b, e) for b, e in factors.items()))


def _power(base, e):
    return sympy.exp(base.args[0] * e) if isinstance(base, sympy.exp) else base**e


def common(parts: list[Monomial]) -> Monomial:
    """The factors that all monomials have: the exponent nearest to zero where signs agree."""
    if not parts:
        return {}
    shared = {}
    for base, e in parts[0].items():
        exponents = [p.get(base, sympy.S.Zero) for p in parts]
        if all(x.is_number for x in exponents) and all(x * e > 0 for x in exponents):
            shared[base] = min(exponents, key=abs)
    return shared


def content(exprs, axes) -> sympy.Expr:
    """The scalar monomial, with a positive number, that divides every term of all of `exprs`."""
    factors = [monomial(t) for e in exprs for t in terms(e)]
    scalars = [{b: x for b, x in parts.items() if axis_of(b, axes) == ""} for _, parts in factors]
    return product(_number([n for n, _ in factors]), common(scalars))


def split(exprs, axes) -> tuple[sympy.Expr, list[sympy.Expr]]:
    """The scalar, positive where it is a number, that divides all of `exprs`, and the quotients."""
    shared = content(exprs, axes)
    rest = [normal(e / shared) for e in exprs]
    sums = [c for e in rest for c in collected(e, axes).values()]
    candidate = min(sums, key=lambda c: len(terms(c)), default=sympy.S.One)
    if len(terms(candidate)) < 2 or any(divided(c, candidate) is None for c in sums):
        return shared, rest
    return shared * candidate, [
        normal(sum((v * divided(c, candidate) for v, c in collected(e, axes).items()), sympy.S.Zero)) for e in rest
    ]


def collected(expr: sympy.Expr, axes) -> dict[sympy.Expr, sympy.Expr]:
    """The scalar coefficient of each product of channel-wise factors."""
    found: dict[sympy.Expr, sympy.Expr] = {}
    for t in terms(expr):
        number, factors = monomial(t)
        vector = product(1, {b: x for b, x in factors.items() if axis_of(b, axes) != ""})
        found[vector] = found.get(vector, 0) + t / vector
    return {v: normal(c) for v, c in found.items()}


def divided(expr: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """The quotient, if `divisor` divides `expr` leaving no sum below the line."""
    atoms: dict[sympy.Expr, sympy.Dummy] = {}
    a, b = (sympy.expand(_polynomial(e, atoms)) for e in (expr, divisor))
    quotient = sympy.cancel(a / b)
    if sympy.fraction(quotient)[1].is_Add:
        return None
    quotient = normal(quotient.xreplace({dummy: atom for atom, dummy in atoms.items()}))
    return quotient if normal(quotient * divisor - expr) == 0 else None


def _number(numbers):
    if numbers and all(n.is_Rational for n in numbers):
        return sympy.Rational(
            functools.reduce(math.gcd, (abs(n.p) for n in numbers)), functools.reduce(math.lcm, (n.q for n in numbers))
        )
    sizes = {abs(n) for n in numbers}
    return sizes.pop() if len(sizes) == 1 else sympy.S.One


def divides(divisor: sympy.Expr, exprs) -> bool:
    """Whether a monomial divides every term without leaving new denominators or growing exponentials."""
    _, wanted = monomial(divisor)
    for e in exprs:
        for t in terms(e):
            have = monomial(t)[1]
            if any((have.get(b, 0) * x - x * x).is_nonnegative is not True for b, x in wanted.items()):
                return False
    return True


def sign_of(expr: sympy.Expr) -> int:
    """-1 where most terms are negative (or half of them, the first included): the sign that an expression gives up."""
    numbers = [monomial(t)[0] for t in terms(expr)]
    negative = sum(bool(n < 0) for n in numbers)
    return -1 if 2 * negative > len(numbers) or (numbers and 2 * negative == len(numbers) and numbers[0] < 0) else 1


def channel_sum(expr: sympy.Expr, axes) -> sympy.Expr:
    """The sum over channels, with scalar factors taken out of it term by term."""
    total = sympy.S.Zero
    for t in terms(expr):
        number, factors = monomial(t)
        scalar = {b: e for b, e in factors.items() if axis_of(b, axes) == ""}
        inside = product(1, {b: e for b, e in factors.items() if b not in scalar})
        if inside == 1:
            raise RecurrenceError(f"a sum over channels of {t}, which is the same in each: write it as a scalar")
        total += product(number, scalar) * ChannelSum(inside)
    return normal(total)


def written_sum(expr: sympy.Expr, axes) -> sympy.Expr:
    """The sum over channels of what a user wrote; a weighted square of a sum stays whole, so that it stays positive."""
    factors = sympy.Mul.make_args(expr)
    scalar = sympy.Mul(*(f for f in factors if axis_of(f, axes) == ""))
    sums = [f for f in factors if f.as_base_exp()[0].is_Add and axis_of(f, axes) != ""]
    if not sums or not all(f.as_base_exp()[1].is_even for f in sums):
        return channel_sum(expr, axes)
    return scalar * ChannelSum(expr / scalar)


def finish(expr: sympy.Expr, axes) -> sympy.Expr:
    """The expression with L2Norm written out."""
    if not expr.has(L2Norm):
        return expr

    def write_out(x, eps):
        return x * (written_sum(x * x, axes) + eps) ** sympy.Rational(-1, 2)

    return expr.replace(L2Norm, write_out)
