"""From a recurrence to its canonical form.

kdagen.derive.linear says what each write and read is and kdagen.derive.streams merges the writes; here the log decay is
found and bounded, decays are taken out of the reads, and own-token terms become diagonals of Gram matrices.
"""

from __future__ import annotations

import sympy

from kdagen.derive.bounds import interval
from kdagen.derive.forms import divides, finish, monomial, normal, split
from kdagen.derive.linear import Form, Linear
from kdagen.derive.streams import Write, streams
from kdagen.errors import RecurrenceError
from kdagen.ir.canonical import Canonical, Intra, Reader, Stream
from kdagen.ir.functions import axis_of, sigmoid, softplus


def canonical(recurrence) -> Canonical:
    """The canonical form of a recurrence."""
    try:
        return _canonical(recurrence)
    except RecurrenceError as e:
        text = str(e)
        raise RecurrenceError(text if text.startswith("rec") else f"recurrence '{recurrence.name}': {text}") from None


def _canonical(recurrence) -> Canonical:
    linear = Linear(recurrence)
    decay = log_decay(linear)
    writes, output = streams(linear)
    _check_needed(linear, decay, writes, output)
    if not any(a.axis == "V" for a in linear.arguments):
        raise RecurrenceError(
            "nothing new is written to the state: expected a value vector among the arguments and a write of it, such "
            "as S + kg.outer(k, v)"
        )
    return Canonical(
        name=recurrence.name,
        doc=recurrence.doc,
        arguments=linear.arguments,
        decay=_finish(decay, linear),
        decay_axis=axis_of(decay, linear.axes),
        decay_lower=_lower(decay, linear),
        streams=tuple(Stream(_finish(w.x, linear), _reader(w.p, writes, linear, w.p.z != 0)) for w in writes),
        output=_reader(output, writes, linear),
    )


def _check_needed(linear: Linear, decay, writes: list[Write], output: Form) -> None:
    """Refuses an argument that is used but cancels."""
    forms = [output, *(w.p for w in writes)]
    exprs = [decay, *(w.x for w in writes), *(e for f in forms for e in (f.y, f.z, *f.refs.values()))]
    needed = set().union(*(linear.spelled(e).free_symbols for e in exprs))
    if gone := [a.name for a in linear.arguments if a.symbol not in needed]:
        raise RecurrenceError(
            f"nothing depends on {', '.join(gone)}, which cancels or is multiplied by zero: remove it, or use it"
        )


def _finish(expr, linear):
    return finish(linear.spelled(expr), linear.axes)


# The decay.


def log_decay(linear: Linear) -> sympy.Expr:
    """g, from the product of all that the state is multiplied by."""
    d = linear.new_state.d
    if d == 0:
        raise RecurrenceError("the previous state does not enter the new one: there is nothing to recur")
    sign, factors = monomial(d)
    if sign < 0:
        raise RecurrenceError(
            f"the state is multiplied by {linear.spelled(d)}, a negative decay: "
            f"expected exp of a log decay, or a factor in [0, 1]"
        )
    return sum((e * _log(b.args[0], linear) for b, e in factors.items()), sympy.S.Zero)


def _log(exponent, linear):
    """The exponent of one decay factor; for one that was not written as exp, its logarithm."""
    return _log_of(linear.decays[exponent], linear) if exponent in linear.decays else exponent


def _log_of(base, linear):
    if isinstance(base, sigmoid):
        return -softplus(-base.args[0])
    if isinstance(1 - base, sigmoid):
        return -softplus(*(1 - base).args)
    if base.is_Pow and not base.exp.is_number:
        return base.exp * _log_of(base.base, linear)
    parameter = any(a.symbol == base and not a.per_token and a.lower is None for a in linear.arguments)
    if not parameter and interval(base, linear.arguments)[0] < 0:
        raise RecurrenceError(
            f"the state decays by {base}, which may be negative as far as is known: write the decay as kg.exp(g) of a "
            f"log decay, or as kg.sigmoid(...), or give the bounds of the raw factor, such as "
            f"kg.{'Channel' if axis_of(base, linear.axes) else 'Scalar'}(lower=0.0, upper=1.0), or hold it at zero by "
            f"kg.relu(...)"
        )
    return sympy.log(base)


def _lower(decay, linear) -> float:
    lower, upper = interval(decay, linear.arguments)
    if lower >= 0 and upper > 0:
        raise RecurrenceError(
            f"the state grows: its log decay is {decay}, never below {lower:g}. Expected one that is never positive, "
            f"such as -kg.exp(A_log) * kg.softplus(g)"
        )
    return lower


# Readers.


def _reader(form: Form, writes: list[Write], linear: Linear, scaled: bool = False) -> Reader:
    """The reader scale * (y + S^T z + ...); `after` where the token's whole decay divides z."""
    d = linear.new_state.d
    z = linear.renamed(form.z)
    after = divides(d, [z])
    z = linear.spelled(normal(z / d) if after else z)
    scale, parts = split([form.y, z, *form.refs.values()], linear.axes) if scaled else (sympy.S.One, None)
    y, z, *coefficients = parts or [form.y, z, *form.refs.values()]
    refs = dict(zip(form.refs, coefficients, strict=True))
    intra = tuple(_intra(refs.get(i, sympy.S.Zero), w, z, linear) for i, w in enumerate(writes))
    return Reader(_finish(y, linear), _finish(z, linear), _finish(scale, linear), after, intra)


def _intra(c, w: Write, z, linear: Linear) -> Intra | sympy.Expr:
    """How a stream of the same token is seen: not at all, by the Gram matrix's diagonal, or by a coefficient."""
    if c == 0:
        return Intra.NONE
    return Intra.GRAM if c == linear.sum(linear.spelled(w.x) * z) else _finish(c, linear)
