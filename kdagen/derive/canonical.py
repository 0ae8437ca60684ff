"""From a recurrence to its canonical form: rank-one writes become streams, as few as there are directions.

kdagen.derive.linear says what each write and read is; here writes in the same direction are merged, scalars are put
where they cost least, decays are taken out of the reads, and own-token terms become diagonals of Gram matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from kdagen.derive.bounds import interval
from kdagen.derive.forms import common, content, divides, finish, monomial, normal, product, sign_of, terms
from kdagen.derive.linear import Form, Linear
from kdagen.errors import RecurrenceError
from kdagen.ir.canonical import Canonical, Intra, Reader, Stream
from kdagen.ir.functions import axis_of, sigmoid, softplus


@dataclass(frozen=True)
class Write:
    """A stream in the making: x p^T, with p's own-token references by the index of another Write."""

    x: sympy.Expr
    p: Form


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
    writes, output = ordered(*merge_values(*merge_writes(linear), linear), linear)
    output = skips_as_coefficients(output, writes)
    streams = tuple(Stream(_finish(w.x, linear), _stream_reader(w, writes, linear)) for w in writes)
    return Canonical(
        name=recurrence.name,
        doc=recurrence.doc,
        arguments=linear.arguments,
        decay=_finish(decay, linear),
        decay_axis=axis_of(decay, linear.axes),
        decay_lower=_lower(decay, linear),
        streams=streams,
        output=_reader(output, sympy.S.One, writes, linear),
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
    """The logarithm of one decay factor."""
    base = linear.decays.get(exponent)
    if base is None:
        return exponent
    if isinstance(base, sigmoid):
        return -softplus(-base.args[0])
    if isinstance(1 - base, sigmoid):
        return -softplus(*(1 - base).args)
    parameter = any(a.symbol == base and not a.per_token and a.lower is None for a in linear.arguments)
    if not parameter and interval(base, linear.arguments)[0] < 0:
        raise RecurrenceError(
            f"the state decays by {base}, which may be negative as far as is known: write the decay as kg.exp(g) of a "
            f"log decay, or as kg.sigmoid(...), or give the bounds of the raw factor, such as "
            f"kg.{'Channel' if axis_of(base, linear.axes) else 'Scalar'}(lower=0.0, upper=1.0)"
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


# Streams: merging what is written in the same direction.


def merge_writes(linear: Linear) -> tuple[dict[int, Write], Form]:
    """Writes with the same x become one; the scalar factors of x are moved into p first."""
    weights, directions = {}, {}
    for i, x in linear.new_state.x.items():
        weights[i] = _weight(i, x, linear)
        directions[i] = normal(x / weights[i])
    groups: dict[sympy.Expr, list[int]] = {}
    for i, x in directions.items():
        groups.setdefault(x, []).append(i)
    members = list(groups.values())

    def regroup(form: Form) -> Form:
        return _regroup(form, members, weights, linear)

    writes = {}
    for n, (x, group) in enumerate(groups.items()):
        p = regroup(sum((linear.pseudo[i] * weights[i] for i in group), Form()))
        writes[n] = Write(x, p if p.z != 0 else linear.expand(_ungroup(p, members, weights)))
    return writes, regroup(linear.output)


def _weight(i: int, x, linear: Linear) -> sympy.Expr:
    """The scalar in x_i that may be moved: what every reference to p_i can be divided by as well."""
    forms = [*linear.pseudo, linear.output]
    number, factors = monomial(content([x], linear.axes))
    coefficients = [monomial(t)[1] for f in forms if i in f.refs for t in terms(f.refs[i])]
    return product(sign_of(x) * number, common([factors, *coefficients]))


def _regroup(form: Form, groups, weights, linear: Linear) -> Form:
    """References to pseudo-values as references to groups; what is not a multiple of a whole group is written out."""
    group_of = {i: n for n, group in enumerate(groups) for i in group}
    while form.refs:
        loose = [i for i in form.refs if i not in group_of or not _whole(form, groups[group_of[i]], weights)]
        if not loose:
            break
        form = linear.inline(form, max(loose))
    refs = {group_of[i]: normal(c / weights[i]) for i, c in form.refs.items()}
    return Form(form.y, form.z, refs)


def _whole(form: Form, group, weights) -> bool:
    first = normal(form.refs.get(group[0], 0) / weights[group[0]])
    return all(normal(form.refs.get(i, 0) / weights[i]) == first for i in group[1:])


def _ungroup(form: Form, groups, weights) -> Form:
    refs = {i: normal(c * weights[i]) for n, c in form.refs.items() for i in groups[n]}
    return Form(form.y, form.z, refs)


def merge_values(writes: dict[int, Write], output: Form, linear: Linear) -> tuple[dict[int, Write], Form]:
    """Streams that do not read: scalars move from y into x, and those of one value become one."""
    moved, target, factor = {}, {}, {}
    for n, w in writes.items():
        if w.p.z != 0 or w.p.refs:
            moved[n], target[n], factor[n] = w, n, sympy.S.One
            continue
        c = sign_of(w.p.y) * content([w.p.y], linear.axes)
        y = normal(w.p.y / c)
        same = next((m for m, other in moved.items() if other.p == Form(y)), n)
        x = normal(w.x * c + (moved[same].x if same != n else 0))
        moved[same], target[n], factor[n] = Write(x, Form(y)), same, c

    def redirect(form: Form) -> Form:
        parts = (Form(refs={target[n]: normal(r * factor[n])}) for n, r in form.refs.items())
        return sum(parts, Form(form.y, form.z))

    return {n: Write(w.x, redirect(w.p)) for n, w in moved.items()}, redirect(output)


def ordered(writes: dict[int, Write], output: Form, linear: Linear) -> tuple[list[Write], Form]:
    """Streams after those they refer to; otherwise those that do not read first, then by the arguments of x."""
    position = {a.symbol: i for i, a in enumerate(linear.arguments)}

    def key(n):
        w = writes[n]
        used = sorted(position[s] for s in w.x.free_symbols if s in position)
        return (w.p.z != 0 or bool(w.p.refs), used, str(w.x))

    order: list[int] = []
    while left := [n for n in writes if n not in order]:
        order.append(min((n for n in left if writes[n].p.refs.keys() <= set(order)), key=key))
    place = {n: i for i, n in enumerate(order)}

    def renumber(form):
        return Form(form.y, form.z, {place[n]: c for n, c in form.refs.items()})

    return [Write(writes[n].x, renumber(writes[n].p)) for n in order], renumber(output)


def skips_as_coefficients(output: Form, writes: list[Write]) -> Form:
    """Terms of the output that are a scalar times the value of a stream that does not read refer to that stream."""
    for i, w in enumerate(writes):
        if w.p.z != 0 or w.p.refs or i in output.refs or len(terms(w.p.y)) != 1:
            continue
        found = [t for t in terms(output.y) if divides(w.p.y, [t])]
        c = normal(sum(found, sympy.S.Zero) / w.p.y)
        if c != 0:
            output = Form(normal(output.y - c * w.p.y), output.z, {**output.refs, i: c})
    return output


# Readers.


def _stream_reader(w: Write, writes: list[Write], linear: Linear) -> Reader:
    reads = w.p.z != 0 or w.p.refs
    scale = content([w.p.y, w.p.z, *w.p.refs.values()], linear.axes) if reads else sympy.S.One
    return _reader(w.p, scale, writes, linear)


def _reader(form: Form, scale, writes: list[Write], linear: Linear) -> Reader:
    """The reader scale * (y + S^T z + ...); `after` where the token's whole decay divides z."""
    d = linear.new_state.d
    z = linear.renamed(form.z / scale)
    after = divides(d, [z])
    z = linear.spelled(normal(z / d) if after else z)
    intra = []
    for i, w in enumerate(writes):
        c = normal(form.refs.get(i, sympy.S.Zero) / scale)
        gram = c != 0 and c == linear.sum(linear.spelled(w.x) * z)
        intra.append(Intra.GRAM if gram else Intra.NONE if c == 0 else _finish(c, linear))
    y = normal(form.y / scale)
    return Reader(_finish(y, linear), _finish(z, linear), _finish(scale, linear), after, tuple(intra))
