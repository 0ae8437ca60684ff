"""The record of a recurrence, evaluated as linear algebra in the previous state.

    matrix = diag(d) S_{t-1} + sum_i x_i p_i^T          d a monomial, x_i key vectors
    p_i    = y_i + S_{t-1}^T z_i + sum_j c_ij p_j       pseudo-values: one for each outer product, never expanded

Scalars and vectors that do not hold the state are sympy expressions. How pseudo-values are merged into streams is
left to kdagen.derive.canonical.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import sympy

from kdagen.derive.forms import L2Norm, channel_sum, monomial, normal, sign_of, split, terms, written_sum
from kdagen.derive.roles import infer
from kdagen.errors import RecurrenceError
from kdagen.ir.functions import axis_of, sigmoid, softplus
from kdagen.language.node import Node

ELEMENTWISE = {
    "neg": lambda a: -a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "pow": lambda a, b: a**b,
    "exp": sympy.exp,
    "log": lambda x: -softplus(-x.args[0]) if isinstance(x, sigmoid) else sympy.log(x),
    "sqrt": sympy.sqrt,
    "rsqrt": lambda x: x ** sympy.Rational(-1, 2),
    "sigmoid": sigmoid,
    "softplus": softplus,
    "silu": lambda x: x * sigmoid(x),
    "tanh": sympy.tanh,
    "relu": lambda x: sympy.Max(x, 0),
    "abs": sympy.Abs,
    "square": lambda x: x**2,
    "maximum": sympy.Max,
    "minimum": sympy.Min,
}


@dataclass(frozen=True)
class Form:
    """A value vector, linear in the state: y + S^T z + sum_i refs[i] p_i."""

    y: sympy.Expr = sympy.S.Zero
    z: sympy.Expr = sympy.S.Zero
    refs: dict[int, sympy.Expr] = field(default_factory=dict)

    def __add__(self, other: Form) -> Form:
        keys = sorted({*self.refs, *other.refs})
        refs = {i: normal(self.refs.get(i, 0) + other.refs.get(i, 0)) for i in keys}
        return Form(normal(self.y + other.y), normal(self.z + other.z), {i: c for i, c in refs.items() if c != 0})

    def __mul__(self, f: sympy.Expr) -> Form:
        refs = {i: normal(c * f) for i, c in self.refs.items()}
        return Form(normal(self.y * f), normal(self.z * f), refs)

    def __bool__(self):
        return self.y != 0 or self.z != 0 or bool(self.refs)


@dataclass(frozen=True)
class Matrix:
    """diag(d) S_{t-1} + sum_i x[i] p_i^T."""

    d: sympy.Expr
    x: dict[int, sympy.Expr]


class Linear:
    """Evaluates nodes of one recurrence; holds its pseudo-values and its decays by name."""

    def __init__(self, recurrence):
        typed = infer(recurrence)
        self.arguments = typed.arguments
        self.node_axes = typed.axes
        self.axes = {a.symbol: a.axis for a in self.arguments}
        self.pseudo: list[Form] = []
        self.decays: dict[sympy.Symbol, sympy.Expr] = {}  # exp(symbol) stands for a decay that was not written as exp
        self.exprs: dict[Node, sympy.Expr] = {}
        self.memo: dict[Node, Matrix | Form] = {}
        self.new_state = self.matrix(recurrence.new_state)
        self.output = self.form(recurrence.output)

    # Without the state: expressions.

    def expr(self, node: Node) -> sympy.Expr:
        """A scalar or vector that does not hold the state."""
        if node not in self.exprs:
            self.exprs[node] = self._expr(node)
        return self.exprs[node]

    def _expr(self, node):
        if node.op == "argument":
            return sympy.Symbol(node.value, real=True)
        if node.op == "constant":
            return sympy.sympify(node.value)
        if node.op == "matmul":
            return self._product(node)
        args = [self.expr(a) for a in node.args]
        if node.op in ("dot", "sum"):
            return written_sum(sympy.Mul(*args), self.axes)
        if node.op == "l2norm":
            return L2Norm(args[0], sympy.sympify(node.value))
        result = ELEMENTWISE[node.op](*args)
        return result.evalf() if result.is_number and not result.is_Rational else result

    def _product(self, node):
        a, b = node.args
        kinds = self.node_axes[a], self.node_axes[b]
        if "KK" in kinds:
            operator, vector = (a, b) if kinds[0] == "KK" else (b, a)
            return self.apply(operator, self.expr(vector), transposed=kinds[1] == "KK")
        if kinds in (("K", "K"), ("V", "V")):
            return written_sum(self.expr(a) * self.expr(b), self.axes)
        return self.expand(self.form(node)).y

    def sum(self, expr) -> sympy.Expr:
        return channel_sum(expr, self.axes)

    # Matrices.

    def matrix(self, node: Node) -> Matrix:
        """A K x V matrix; the transpose of a V x K one."""
        if node not in self.memo:
            self.memo[node] = self._matrix(node)
        return self.memo[node]

    def _matrix(self, node):
        if node.op == "state":
            return Matrix(sympy.S.One, {})
        if node.op == "transpose":
            return self.matrix(node.args[0])
        if node.op == "outer":
            return self.write(self.expr(node.args[0]), self.form(node.args[1]))
        if node.op == "matmul":
            left = self.node_axes[node.args[0]] == "KK"
            operator, matrix = node.args if left else node.args[::-1]
            return self.apply(operator, self.matrix(matrix), transposed=not left)
        return self._combine(node, self.matrix)

    def _combine(self, node, evaluate):
        """Sums and scalar multiples of matrices or operators' results."""
        if node.op == "neg":
            return self.scale(evaluate(node.args[0]), sympy.S.NegativeOne)
        a, b = node.args
        if node.op in ("add", "sub"):
            left, right = evaluate(a), evaluate(b)
            return self.add(left, right if node.op == "add" else self.scale(right, sympy.S.NegativeOne))
        if node.op == "div":
            return self.scale(evaluate(a), 1 / self.expr(b))
        scalar, matrix = (a, b) if self.node_axes[a] == "" else (b, a)
        return self.scale(evaluate(matrix), self.expr(scalar))

    def apply(self, operator: Node, target, transposed: bool = False):
        """A K x K operator on a matrix or on a key vector; factors of a product act one after the other."""
        if operator.op == "eye":
            return target
        if operator.op == "diag":
            return self.scale(target, self.expr(operator.args[0]))
        if operator.op == "transpose":
            return self.apply(operator.args[0], target, not transposed)
        if operator.op == "outer":
            x, z = operator.args[::-1] if transposed else operator.args
            return self.rank_one(self.expr(x), self.expr(z), target)
        if operator.op == "matmul":
            first, second = operator.args if transposed else operator.args[::-1]
            return self.apply(second, self.apply(first, target, transposed), transposed)
        return self._combine(operator, lambda n: self.apply(n, target, transposed))

    def rank_one(self, x, z, target):
        if isinstance(target, Matrix):
            return self.write(x, self.read(target, z))
        return normal(x * self.sum(z * target))

    def write(self, x, p: Form) -> Matrix:
        """x p^T as a new pseudo-value, with the scalars of x moved into it."""
        x = normal(x)
        if x == 0 or not p:
            return Matrix(sympy.S.Zero, {})
        scalar, (direction,) = split([x], self.axes)
        sign = sign_of(direction)
        p = p * (sign * scalar)
        if p not in self.pseudo:
            self.pseudo.append(p)
        return Matrix(sympy.S.Zero, {self.pseudo.index(p): normal(sign * direction)})

    def read(self, m: Matrix, w) -> Form:
        """m^T w."""
        refs = {i: self.sum(x * w) for i, x in m.x.items()}
        return Form(z=normal(m.d * w), refs={i: c for i, c in refs.items() if c != 0})

    def scale(self, target, f):
        if not isinstance(target, Matrix):
            return normal(target * f)
        if target.d == 0:
            writes = [self.write(x * f, self.pseudo[i]) for i, x in target.x.items()]
            return functools.reduce(self.add, writes, Matrix(sympy.S.Zero, {}))
        x = {i: normal(x * f) for i, x in target.x.items()}
        return Matrix(self.named(target.d * f), {i: c for i, c in x.items() if c != 0})

    def add(self, a, b):
        if not isinstance(a, Matrix):
            return normal(a + b)
        x = {i: normal(a.x.get(i, 0) + b.x.get(i, 0)) for i in sorted({*a.x, *b.x})}
        d = a.d + b.d if 0 in (a.d, b.d) else self.named(self.spelled(a.d) + self.spelled(b.d))
        return Matrix(d, {i: c for i, c in x.items() if c != 0})

    # Decays: monomials of exponentials, so that what a read shares with the decay can be told.

    def named(self, d) -> sympy.Expr:
        """`d` as a signed product of exponentials, each other factor by a name for its logarithm."""
        d = normal(d)
        if d == 0:
            return d
        number, factors = monomial(d) if len(terms(d)) == 1 else (sympy.S.One, {d: sympy.S.One})
        size = abs(number)
        if size != 1:
            factors = {**factors, size: sympy.S.One}
        named = [self._exponential(b, e) for b, e in factors.items()]
        return sympy.Mul(sympy.sign(number), *named)

    def _exponential(self, base, e) -> sympy.Expr:
        if isinstance(base, sympy.exp):
            return sympy.exp(base.args[0] * e)
        return sympy.exp(self._name(base) * e) if e.is_number else sympy.exp(self._name(base**e))

    def _name(self, base) -> sympy.Symbol:
        symbol = sympy.Symbol(f"log({base})", real=True)
        self.decays[symbol] = base
        self.axes[symbol] = axis_of(base, self.axes)
        return symbol

    def spelled(self, expr) -> sympy.Expr:
        """The reverse of `named`."""
        if not expr.free_symbols & self.decays.keys():
            return expr

        def write_out(t):
            number, symbol = t.as_coeff_Mul()
            return self.decays[symbol] ** number if symbol in self.decays else sympy.exp(t)

        return normal(expr.replace(sympy.exp, write_out))

    def renamed(self, expr) -> sympy.Expr:
        """`expr` with decays that were not written as exp by their names, wherever they stand."""
        found = {b: sympy.exp(s) for s, b in self.decays.items() if not b.is_number}
        return normal(expr.subs(found)) if found else expr

    # Value vectors.

    def form(self, node: Node) -> Form:
        """A value vector, linear in the state."""
        if not node.holds_state and node.op != "matmul":
            return Form(normal(self.expr(node)))
        if node not in self.memo:
            self.memo[node] = self._form(node)
        return self.memo[node]

    def _form(self, node):
        if node.op == "matmul":
            m, w = node.args if self.node_axes[node.args[0]] == "VK" else node.args[::-1]
            return self.read(self.matrix(m), self.expr(w))
        if node.op == "neg":
            return self.form(node.args[0]) * sympy.S.NegativeOne
        a, b = node.args
        if node.op in ("add", "sub"):
            return self.form(a) + self.form(b) * sympy.Integer(1 if node.op == "add" else -1)
        read, factor = (a, b) if a.holds_state else (b, a)
        if self.node_axes[factor] == "V":
            raise RecurrenceError(
                f"'{node}' ({node.line}) multiplies a read of the state by the value vector '{factor}', a different "
                f"factor for each value channel: only a scalar may. A gate on the output belongs after the op"
            )
        return self.form(read) * (1 / self.expr(b) if node.op == "div" else self.expr(factor))

    def expand(self, form: Form) -> Form:
        """The same vector without pseudo-values."""
        while form.refs:
            form = self.inline(form, max(form.refs))
        return form

    def inline(self, form: Form, i: int) -> Form:
        """The same vector with pseudo-value i written out."""
        rest = Form(form.y, form.z, {j: c for j, c in form.refs.items() if j != i})
        return rest + self.pseudo[i] * form.refs[i]
