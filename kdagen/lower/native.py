"""The step form as C, for decoding on the CPU: native.c.j2 filled in.

Each (sequence, value head) goes through its tokens by itself, in fp32, its state in place where it is stored so. What
kdagen.lower.decode does in a GPU's registers, this does in a core's caches; sizes are arguments, not constants, so one
library serves all head dims and the dtypes of all arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import sympy

from kdagen.ir.step import StepForm
from kdagen.ir.tensor import Load, Map, Value, reads
from kdagen.lower.c_expression import c_text
from kdagen.state import StateType

TEMPLATE = Path(__file__).with_name("native.c.j2")
FUNCTIONS = Path(__file__).with_name("functions.c")  # what C text begins with
LANES = 16  # vectors begin at a multiple of so many floats, and sums are of so many


@dataclass(frozen=True)
class NativeSource:
    """C text, the arguments in the order of its table, and how many vectors and numbers it wants room for."""

    text: str
    arguments: tuple[str, ...]
    keys: int  # of K floats, of a token
    values: int  # of V floats
    numbers: int
    reads: int  # of V floats, kept for each head

    def floats(self, k: int, v: int) -> int:
        """Room for what one token makes."""
        return self.keys * padded(k) + self.values * padded(v) + padded(self.numbers)


def padded(n: int) -> int:
    """As many floats, and up to where the next vector may begin."""
    return -(-n // LANES) * LANES


def native_source(form: StepForm, state: StateType) -> NativeSource:
    """The library of a step form, on states of this type."""
    import jinja2

    writer = _Writer(form)
    template = jinja2.Template(
        TEMPLATE.read_text(), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    text = template.render(functions=FUNCTIONS.read_text(), form=form, state=state, w=writer, lanes=LANES)
    counts = (len(writer.places[axis]) for axis in ("K", "V", ""))
    return NativeSource(text, writer.arguments, *counts, len(form.reads))


class _Writer:
    """Values by number, for a user's name may be none in C: pointers p0, p1, .., to one float without dims."""

    def __init__(self, form: StepForm):
        self.form = form
        self.arguments = tuple(op.argument.name for op in form.token if isinstance(op, Load))
        made = [op.out for op in (*form.token, *form.values)]
        self.places = {axis: [v for v in made if v.dims == tuple(axis)] for axis in ("K", "V", "")}
        self.names = {v: f"p{i}" for i, v in enumerate(made)} | {r.out: f"r{i}" for i, r in enumerate(form.reads)}

    def pointers(self) -> Iterable[tuple[str, str, str]]:
        """(pointer, where it points to, the value's own name)."""
        starts = {"K": "", "V": f"{len(self.places['K'])} * c->KP"}
        starts[""] = f"{starts['V']} + {len(self.places['V'])} * c->VP"
        for axis, size in (("K", " * c->KP"), ("V", " * c->VP"), ("", "")):
            for i, v in enumerate(self.places[axis]):
                yield self.names[v], " + ".join(filter(None, ("env", starts[axis], f"{i}{size}"))), v.name
        for i, read in enumerate(self.form.reads):
            yield self.names[read.out], f"r + {i} * c->VP", read.out.name

    def loads(self) -> list[tuple[str, str]]:
        """(pointer, floats) of each argument."""
        return [(self.names[op.out], _size(op.out)) for op in self.form.token if isinstance(op, Load)]

    def for_reads(self) -> list[str]:
        """Statements that make what the state is read by."""
        wanted = {r.z for r in self.form.reads}
        for op in reversed(self.form.token):
            if op.out in wanted:
                wanted |= set(reads(op))
        return [self.statement(op) for op in self.form.token if op.out in wanted]

    def statements(self, ops) -> list[str]:
        """A line an op, an equation beside it."""
        return [self.statement(op) for op in ops]

    def statement(self, op) -> str:
        name = self.names[op.out]
        if isinstance(op, Load):
            return f"take(c, {self.arguments.index(op.argument.name)}, row, h, {name}, {_size(op.out)});"
        if isinstance(op, Map):
            return self.map(op, name)
        return f"*{name} = total({self.names[op.a]}, {_size(op.a)});"

    def map(self, op: Map, name: str) -> str:
        numbers = {v.symbol: f"(*{self.names[v]})" for v, _ in op.operands if not v.dims}
        if not op.out.dims:
            return f"*{name} = {c_text(op.expr, numbers)};"
        vectors = {v.symbol: f"{self.names[v]}[i]" for v, _ in op.operands if v.dims}
        hoisted: dict[sympy.Symbol, sympy.Expr] = {}
        expr = _hoist(op.expr, vectors.keys(), hoisted)
        names = {s: f"n{i}" for i, s in enumerate(hoisted)}
        before = "".join(f"const float {names[s]} = {c_text(e, numbers)}; " for s, e in hoisted.items())
        text = c_text(expr, vectors | names)
        return f"{{ {before}EACH(i, {_size(op.out)}) {name}[i] = {text}; }}"

    def of(self, value: Value) -> str:
        """The pointer of a value."""
        return self.names[value]


def _hoist(expr: sympy.Expr, vectors, hoisted: dict) -> sympy.Expr:
    """`expr` over vectors and new symbols: what is one number for all channels goes before the loop over them."""
    if expr.is_number:
        return expr
    if not expr.free_symbols & vectors:
        for symbol, known in hoisted.items():
            if known == expr:
                return symbol
        hoisted[symbol := sympy.Symbol(f"#{len(hoisted)}", real=True)] = expr
        return symbol
    same = [a for a in expr.args if not a.free_symbols & vectors]
    if expr.func in (sympy.Add, sympy.Mul) and len(same) > 1:
        rest = [_hoist(a, vectors, hoisted) for a in expr.args if a not in same]
        return expr.func(_hoist(expr.func(*same), vectors, hoisted), *rest)
    return expr.func(*(_hoist(a, vectors, hoisted) for a in expr.args)) if expr.args else expr


def _size(value: Value) -> str:
    return f"c->{value.dims[0]}" if value.dims else "1"
