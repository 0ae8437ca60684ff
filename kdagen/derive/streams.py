"""From rank-one writes to streams: as few as there are directions, each reading in the shortest way.

Writes in the same direction are merged, scalars are put where they cost least, and reads of the updated state that were
written out by hand are found again.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from kdagen.derive.forms import common, content, divides, monomial, normal, product, sign_of, split, terms
from kdagen.derive.linear import Form, Linear
from kdagen.ir.functions import ChannelSum


@dataclass(frozen=True)
class Write:
    """A stream in the making: x p^T, with p's own-token references by the index of another Write."""

    x: sympy.Expr
    p: Form


def streams(linear: Linear) -> tuple[list[Write], Form]:
    """The streams of a recurrence, in order, and its output."""
    writes, output = merge_values(*merge_writes(linear), linear)
    seen: dict[int, Write] = {}
    for n in _topological(writes, key=int):
        w = writes[n]
        seen[n] = writes[n] = Write(w.x, as_read(w.p, dict(seen), writes, linear) if w.p.z != 0 else w.p)
    output = as_read(output, writes, writes, linear)
    writes, output = ordered(writes, output, linear)
    return writes, skips_as_coefficients(output, writes)


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
        scalar, (y,) = split([w.p.y], linear.axes)
        sign = sign_of(y)
        c, y = sign * scalar, normal(sign * y)
        same = next((m for m, other in moved.items() if other.p == Form(y)), n)
        x = normal(w.x * c + (moved[same].x if same != n else 0))
        moved[same], target[n], factor[n] = Write(x, Form(y)), same, c

    def redirect(form: Form) -> Form:
        parts = (Form(refs={target[n]: normal(r * factor[n])}) for n, r in form.refs.items())
        return sum(parts, Form(form.y, form.z))

    return {n: Write(w.x, redirect(w.p)) for n, w in moved.items()}, redirect(output)


def as_read(form: Form, seen: dict[int, Write], writes: dict[int, Write], linear: Linear) -> Form:
    """`form` as a read of the state that `seen` have updated, where that is what it is when written out."""
    if form.refs.keys() == seen.keys() or _size(form, writes) > LONGEST:
        return form
    d = linear.new_state.d
    full = _expand(form, writes)
    z = linear.renamed(full.z)
    if not divides(d, [z]):
        return form
    by = normal(sum((t for t in terms(z / d) if not t.has(ChannelSum)), sympy.S.Zero))
    refs = {n: linear.sum(linear.spelled(w.x) * linear.spelled(by)) for n, w in seen.items()}
    read = Form(z=normal(d * by), refs={n: c for n, c in refs.items() if c != 0})
    rest = full + _expand(read, writes) * sympy.S.NegativeOne
    shorter = len(terms(rest.y)) + len(terms(by)) < len(terms(full.y)) + len(terms(full.z))
    return read + Form(rest.y) if linear.spelled(rest.z) == 0 and shorter else form


LONGEST = 200  # terms, beyond which nothing is written out: each step of a product of operators may double them


def _size(form: Form, writes: dict[int, Write]) -> int:
    """How many terms the form would have when written out, or more than is bearable."""
    total = len(terms(form.y)) + len(terms(form.z))
    for n, c in form.refs.items():
        if total <= LONGEST:
            total += len(terms(c)) * _size(writes[n].p, writes)
    return total


def _expand(form: Form, writes: dict[int, Write]) -> Form:
    while form.refs:
        n = max(form.refs)
        rest = Form(form.y, form.z, {m: c for m, c in form.refs.items() if m != n})
        form = rest + writes[n].p * form.refs[n]
    return form


def ordered(writes: dict[int, Write], output: Form, linear: Linear) -> tuple[list[Write], Form]:
    """Streams after those they refer to; otherwise those that do not read first, then by the arguments of x."""
    position = {a.symbol: i for i, a in enumerate(linear.arguments)}

    def key(n):
        w = writes[n]
        used = sorted(position[s] for s in w.x.free_symbols if s in position)
        return (w.p.z != 0 or bool(w.p.refs), used, str(w.x))

    order = _topological(writes, key)
    place = {n: i for i, n in enumerate(order)}

    def renumber(form):
        return Form(form.y, form.z, {place[n]: c for n, c in form.refs.items()})

    return [Write(writes[n].x, renumber(writes[n].p)) for n in order], renumber(output)


def _topological(writes: dict[int, Write], key) -> list[int]:
    """Each after those it refers to, the least key first."""
    order: list[int] = []
    while left := [n for n in writes if n not in order]:
        order.append(min((n for n in left if writes[n].p.refs.keys() <= set(order)), key=key))
    return order


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
