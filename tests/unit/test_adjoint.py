"""Each rule of the adjoint alone, on random float64 leaves, against torch.autograd of a plain formula."""

from types import SimpleNamespace

import pytest
import sympy
import torch

from kdagen.derive.adjoint import RULES, Tape
from kdagen.ir.canonical import Argument
from kdagen.ir.functions import sigmoid, softplus
from kdagen.ir.tensor import (
    Decay,
    Gram,
    Interleave,
    Map,
    MatMul,
    RowSum,
    SolveTril,
    Span,
    Term,
    Value,
    reads,
    writes,
)
from kdagen.ir.tensor_values import Values

N, B, H, C, K, V, LAST = 2, 2, 2, 8, 5, 3, 6  # chunks, sequences, heads, tokens a chunk, channels; of the last chunk
SIZE = {"C": C, "2C": 2 * C, "3C": 3 * C, "K": K, "V": V}
SAME = sympy.KroneckerDelta(sympy.Symbol("i"), sympy.Symbol("j"))


def value(name, *dims):
    return Value(name, dims)


def leaf(v, seed):
    shape = [N, B, H, *(SIZE[d] for d in v.dims)]
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def check(op, plain, leaves=None, unread=(), meaningful=lambda x, v: x):
    """Cotangents by the op's rule against autograd of `plain`, a function of the operands in the order of `reads`.

    `plain` gives what the op makes, in order; no cotangent comes for those in `unread`; of an operand's cotangent
    only what `meaningful` leaves is compared. Returns values by name, and each operand's cotangent.
    """
    operands = list(dict.fromkeys(reads(op)))
    given = {v: leaf(v, i) for i, v in enumerate(operands)} | (leaves or {})
    d_outs = {v: leaf(v, 100 + i) for i, v in enumerate(writes(op)) if v not in unread}
    tape = Tape({*operands, *writes(op)})
    owed = {tape.fresh(v): x for v, x in d_outs.items()}
    for v, d in zip(d_outs, owed, strict=True):
        tape.give(v, d)
    RULES[type(op)](tape, op)
    found = {v: tape.cotangent(v) for v in operands}
    values = run(op, tape.ops, {v.name: x for v, x in (given | owed).items()})
    wanted = [given[v].clone().requires_grad_() for v in operands]
    made = [o for o, v in zip(plain(*wanted), writes(op), strict=True) if v not in unread]
    expected = torch.autograd.grad(made, wanted, list(d_outs.values()), materialize_grads=True)
    for v, want in zip(operands, expected, strict=True):
        got = meaningful(values[found[v].name], v)
        assert (got - want).norm() <= 1e-12 * want.norm().clamp_min(1e-3), v.name
    return values, found


def run(op, adjoint, env):
    """Values after the op and its adjoint."""
    arguments = (Argument("k", "K"), Argument("v", "V"))
    tokens = (N - 1) * C + LAST
    tensors = {a.name: torch.zeros(B, tokens, H, SIZE[a.axis], dtype=torch.float64) for a in arguments}
    values = Values(SimpleNamespace(arguments=arguments, heads=lambda _: "HV"), tensors, C)
    values.keep_levels = True
    values.expect((op, *adjoint), ())
    values.begin(0, tokens)
    values.env = env
    values.do((op, *adjoint))
    return values.env


def rows(x):
    """A vector of rows beside channels or columns."""
    return x.unsqueeze(-1)


def past_end(x):
    """Rows of the last chunk past the end made zero."""
    kept = torch.ones(N, 1, 1, C, *[1] * (x.dim() - 4), dtype=torch.float64)
    kept[-1, :, :, LAST:] = 0
    return x * kept


a, b, c, p, w = value("a", "C", "K"), value("b", "C", "K"), value("c", "C"), value("p", "K"), value("w")
m = value("m", "C", "C")
IK, IJ = ("i", "k"), ("i", "j")
MAPS = {
    "product": (Map(value("o", "C", "K"), IK, a.symbol * b.symbol, ((a, IK), (b, IK))), lambda a, b: a * b),
    "sum": (Map(value("o", "C", "K"), IK, a.symbol - 2 * b.symbol, ((a, IK), (b, IK))), lambda a, b: a - 2 * b),
    "row scalar": (
        Map(value("o", "C", "K"), IK, a.symbol * c.symbol + a.symbol, ((a, IK), (c, ("i",)))),
        lambda a, c: a * rows(c) + a,
    ),
    "functions": (
        Map(
            value("o", "C", "K"),
            IK,
            sympy.exp(a.symbol) * sigmoid(b.symbol) + softplus(a.symbol) * sympy.tanh(b.symbol),
            ((a, IK), (b, IK)),
        ),
        lambda a, b: a.exp() * b.sigmoid() + torch.nn.functional.softplus(a, threshold=1e3) * b.tanh(),
    ),
    "kinks": (
        Map(
            value("o", "C", "K"),
            IK,
            sympy.Max(a.symbol, 0) * sympy.Abs(b.symbol) + sympy.Min(a.symbol, b.symbol),
            ((a, IK), (b, IK)),
        ),
        lambda a, b: a.relu() * b.abs() + torch.minimum(a, b),
    ),
    "powers": (
        Map(value("o", "C"), ("i",), (c.symbol**2 + 1) ** sympy.Rational(-1, 2), ((c, ("i",)),)),
        lambda c: (c**2 + 1).rsqrt(),
    ),
    "parameters": (
        Map(
            value("o", "C", "K"),
            IK,
            a.symbol * p.symbol + w.symbol * c.symbol,
            ((a, IK), (p, ("k",)), (w, ()), (c, ("i",))),
        ),
        lambda a, p, w, c: a * p[..., None, :] + w[..., None, None] * rows(c),
    ),
    "parameters past the end": (
        Map(value("o", "C", "K"), IK, a.symbol * p.symbol + w.symbol, ((a, IK), (p, ("k",)), (w, ())), True),
        lambda a, p, w: past_end(a * p[..., None, :] + w[..., None, None]),
    ),
    "matrix rows": (
        Map(value("o", "C", "C"), IJ, m.symbol * c.symbol, ((m, IJ), (c, ("i",)))),
        lambda m, c: m * rows(c),
    ),
    "matrix columns": (
        Map(value("o", "C", "C"), IJ, m.symbol * c.symbol, ((m, IJ), (c, ("j",)))),
        lambda m, c: m * c[..., None, :],
    ),
    "diagonal": (
        Map(
            value("o", "C", "C"),
            IJ,
            c.symbol * (m.symbol + w.symbol * c.symbol * SAME),
            ((m, IJ), (c, ("i",)), (w, ())),
        ),
        lambda m, c, w: rows(c) * (m + torch.diag_embed(w[..., None] * c)),
    ),
    "diagonal alone": (
        Map(value("o", "C", "C"), IJ, c.symbol * SAME, ((c, ("i",)),)),
        torch.diag_embed,
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_map(name):
    op, plain = MAPS[name]
    own = (
        past_end if op.zero_past_end else (lambda x: x)
    )  # rows past the end are nobody's; parameters must not see them
    check(op, lambda *x: [plain(*x)], meaningful=lambda x, v: own(x) if "C" in v.dims else x)


def test_log_of_a_decay_of_zero_has_a_derivative_of_zero():
    rates = leaf(c, 0).abs()
    rates[..., 2] = 0
    op = Map(value("o", "C"), ("i",), sympy.log(c.symbol), ((c, ("i",)),))
    check(op, lambda c: [c.where(c > 0, torch.ones(())).log()], {c: rates})


def test_row_sum():
    check(RowSum(value("o", "C"), a), lambda a: [a.sum(-1)])
    check(RowSum(value("o"), p), lambda p: [p.sum(-1)])


GATES = {"mild": -0.1, "strong": -5.0, "reset": -0.1}


def log_decay(dims, gate):
    """A leaf for a log decay; some of a reset are -inf."""
    g = value("g", *dims)
    x = GATES[gate] * leaf(g, 7).abs()
    return g, x.masked_fill(leaf(g, 8) > 0.8, float("-inf")) if gate == "reset" else x


def between(g, first, last):
    """exp of the log decays of tokens first..last-1."""
    return g[:, :, :, first:last].sum(3).exp()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dims", [("C",), ("C", "K")])
@pytest.mark.parametrize("span", Span)
def test_decay(span, dims, gate):
    g, x = log_decay(dims, gate)
    ends = {Span.THROUGH: lambda i: (0, i + 1), Span.BEFORE: lambda i: (0, i), Span.REST: lambda i: (i + 1, C)}
    if span == Span.ALL:
        check(Decay(value("o", *dims[1:]), g, span), lambda g: [between(g, 0, C)], {g: x})
    else:
        plain = lambda g: [torch.stack([between(g, *ends[span](i)) for i in range(C)], 3)]  # noqa: E731
        check(Decay(value("o", *dims), g, span), plain, {g: x})


def plain_gram(op):
    """Every product of a row and a column, each with its own decay."""

    def entry(z, x, g, after, diagonal, i, j):
        if j > i or (j == i and not diagonal):
            return z[:, :, :, i, 0] * 0
        terms = z[:, :, :, i] * x[:, :, :, j]
        if g is not None and j < i:
            decay = between(g, j + 1, i + 1 if after else i)
            terms = terms * (decay if decay.dim() > 3 else decay.unsqueeze(-1))
        return terms.sum(-1)

    def plain(*operands):
        given = dict(zip(dict.fromkeys(reads(op)), operands, strict=True))
        for z, after, diagonals in zip(op.readers, op.after, op.diagonal, strict=True):
            for x, diagonal in zip(op.writers, diagonals, strict=True):
                of = (given[z], given[x], given.get(op.g), after, diagonal)
                yield torch.stack([torch.stack([entry(*of, i, j) for j in range(C)], -1) for i in range(C)], -2)

    return lambda *operands: list(plain(*operands))


def gram(readers, writers, g, after, diagonal):
    outs = tuple(tuple(value(f"G{r}{s}", "C", "C") for s in range(len(writers))) for r in range(len(readers)))
    return Gram(outs, readers, writers, g, after, diagonal)


FORMS = {
    "one": ((a,), (b,), (True,), ((False,),)),
    "one before": ((a,), (b,), (False,), ((True,),)),
    "two readers": ((a, value("z", "C", "K")), (b,), (False, True), ((False,), (True,))),
    "shared operand": ((a, b), (b,), (True, True), ((False,), (True,))),
    "many": (
        (a, value("z", "C", "K"), value("q", "C", "K")),
        (b, value("x", "C", "K")),
        (True, False, True),
        ((False, False), (True, False), (True, True)),
    ),
}


@pytest.mark.parametrize("gate", [None, *GATES])
@pytest.mark.parametrize("dims", [("C",), ("C", "K")])
@pytest.mark.parametrize("form", FORMS)
def test_gram(form, dims, gate):
    readers, writers, after, diagonal = FORMS[form]
    g, x = log_decay(dims, gate) if gate else (None, None)
    op = gram(readers, writers, g, after, diagonal)
    for unread in ((), writes(op)[1:], writes(op)[:-1]):
        if len(unread) < len(writes(op)):
            check(op, plain_gram(op), {g: x} if g else {}, unread)


@pytest.mark.parametrize("dims", [("C",), ("C", "K")])
def test_a_reset_has_a_gradient_of_exactly_zero(dims):
    g, x = log_decay(dims, "reset")
    for op in (gram(*FORMS["many"][:2], g, *FORMS["many"][2:]), Decay(value("o", *dims), g, Span.BEFORE)):
        before = lambda g: [torch.stack([between(g, 0, i) for i in range(C)], 3)]  # noqa: E731
        plain = plain_gram(op) if isinstance(op, Gram) else before
        values, found = check(op, plain, {g: x})
        got = values[found[g].name]
        assert x.isinf().any() and not got[x.isinf()].any() and got.any()


@pytest.mark.parametrize(
    "dims, streams",
    [(("C", "K"), (3, 1)), (("C",), (2, 1)), (("C", "C"), (2, 2)), (("C", "C"), (1, 2)), (("C", "C"), (2, 1))],
)
def test_interleave(dims, streams):
    parts = tuple(tuple(value(f"p{r}{s}", *dims) for s in range(streams[1])) for r in range(streams[0]))
    out = [f"{n}C" if n > 1 else "C" for n in streams[: 2 if dims == ("C", "C") else 1]] + [
        d for d in dims[1:] if d != "C"
    ]

    def plain(*given):
        table = [given[r * streams[1] : (r + 1) * streams[1]] for r in range(streams[0])]
        if dims == ("C", "C"):
            table = [[torch.stack(row, -1).flatten(-2)] for row in table]
        return [torch.stack([row[0] for row in table], 4).flatten(3, 4)]

    check(Interleave(value("o", *out), parts), plain)


@pytest.mark.parametrize("dim", ["C", "2C"])
def test_solve_tril(dim):
    lower = value("l", dim, dim)
    eye = torch.eye(SIZE[dim], dtype=torch.float64)
    check(
        SolveTril(value("T", dim, dim), lower),
        lambda x: [torch.linalg.inv(eye - x.tril(-1))],
        {lower: leaf(lower, 0).tril(-1) / 4},
        meaningful=lambda x, v: x.tril(-1),
    )


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_matmul(transpose_a, transpose_b):
    x = value("x", *(("K", "C") if transpose_a else ("C", "K")))
    y = value("y", *(("V", "K") if transpose_b else ("K", "V")))
    add, r, s = value("add", "C", "V"), value("r", "C", "2C"), value("s", "2C", "V")
    op = MatMul(value("o", "C", "V"), (Term(x, y, transpose_a, transpose_b), Term(r, s)), add)

    def plain(x, y, r, s, add):
        return [(x.mT if transpose_a else x) @ (y.mT if transpose_b else y) + r @ s + add]

    check(op, plain)


def test_an_operand_that_meets_itself_is_owed_both_products():
    op = MatMul(value("o", "C", "C"), (Term(a, a, False, True),))
    check(op, lambda a: [a @ a.mT])


@pytest.mark.parametrize("gate", [None, *GATES])
@pytest.mark.parametrize("dims", [("C",), ("C", "K")])
@pytest.mark.parametrize("form", FORMS)
def test_the_matrices_themselves(form, dims, gate):
    readers, writers, after, diagonal = FORMS[form]
    g, x = log_decay(dims, gate) if gate else (None, None)
    op = gram(readers, writers, g, after, diagonal)
    given = {v: leaf(v, i) for i, v in enumerate(dict.fromkeys(reads(op)))} | ({g: x} if g else {})
    made = run(op, (), {v.name: x for v, x in given.items()})
    for v, want in zip(writes(op), plain_gram(op)(*given.values()), strict=True):
        assert torch.allclose(made[v.name], want, rtol=1e-12, atol=1e-12)


def test_every_rule_is_tested_here():
    assert set(RULES) == {Map, RowSum, Decay, Gram, Interleave, SolveTril, MatMul}
