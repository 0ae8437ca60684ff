"""The equations of a tensor program, as plain text or LaTeX: each op's meaning in index or matrix notation.

Unlike tensor_show, which prints the program as it stands, this is written for people who want the mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import sympy

from kdagen.ir.tensor import (
    ColSum,
    Decay,
    Deinterleave,
    Gram,
    GramAdjoint,
    Interleave,
    Map,
    MatMul,
    Op,
    RowSum,
    SolveTril,
    Span,
    Spread,
    Value,
)

CHANNEL = {"i": "i", "j": "j", "k": "d", "v": "e"}  # k and v are names of keys and values as well
INDEX = {"C": "i", "K": "d", "V": "e"}


class Plain:
    """Equations as text: `A[i,j] = sum_d q[i,d] k[j,d] exp(g[j+1,d] + .. + g[i,d])`."""

    def equations(self, ops: Iterable[Op]) -> list[str]:
        """One or more equations an op; loads have none."""
        rules = {
            Map: self.map, RowSum: self.row_sum, Decay: self.decay, Gram: self.gram,
            Interleave: self.interleave, SolveTril: self.solve, MatMul: self.matmul, ColSum: self.col_sum,
            Spread: self.spread, GramAdjoint: self.gram_adjoint, Deinterleave: self.deinterleave,
        }  # fmt: skip
        return [self.equation(*sides) for op in ops if type(op) in rules for sides in rules[type(op)](op)]

    # -- notation

    def equation(self, left: str, right: str) -> str:
        return f"{left} = {right}"

    def name(self, value: Value) -> str:
        return value.name

    def at(self, value: Value, *index: str) -> str:
        return f"{value.name}[{','.join(index)}]" if index else value.name

    def expr(self, expr: sympy.Expr, elements: dict[sympy.Symbol, str]) -> str:
        return str(expr.xreplace({s: sympy.Symbol(text) for s, text in elements.items()}))

    def summed(self, index: str, terms: str) -> str:
        return f"sum_{index} {terms}" if len(index) == 1 else f"sum_({index}) {terms}"

    def span(self, g: Value, first: str, last: str, *channel: str) -> str:
        return f"{self.at(g, first, *channel)} + .. + {self.at(g, last, *channel)}"

    def exp_sum(self, g: Value, first: str, last: str, *channel: str) -> str:
        return f"exp({self.span(g, first, last, *channel)})"

    def where(self, text: str, condition: str) -> str:
        return f"{text}   for {condition}"

    def transposed(self, text: str) -> str:
        return f"{text}^T"

    def inverse(self, text: str) -> str:
        return f"(I - {text})^-1"

    def stacked(self, parts: list[list[str]]) -> str:
        return "rows of " + "; ".join(", ".join(row) for row in parts) + " interleaved token by token"

    def part(self, text: str, **which: int) -> str:
        return f"{' and '.join(f'{name} of stream {n}' for name, n in which.items())} of {text}"

    up_to, below = "j <= i", "j < i"
    runs_over = {True: "j < l <= i", False: "j < l < i"}  # token l, by whether the reader is after its own decay

    # -- ops, as pairs of left and right

    def map(self, op: Map):
        elements = {v.symbol: self.at(v, *(CHANNEL[i] for i in index)) for v, index in op.operands}
        yield self.at(op.out, *(CHANNEL[i] for i in op.indices)), self.expr(op.expr, elements)

    def row_sum(self, op: RowSum):
        *left, summed = indices(op.a)
        yield self.at(op.out, *left), self.summed(summed, self.at(op.a, *left, summed))

    def col_sum(self, op: ColSum):
        summed, *left = indices(op.a)
        yield self.at(op.out, *left), self.summed(summed, self.at(op.a, summed, *left))

    def spread(self, op: Spread):
        first, last = {Span.THROUGH: ("i", "C"), Span.BEFORE: ("i+1", "C"), Span.REST: ("1", "i-1")}[op.span]
        channel = indices(op.a)[1:]
        added = f"{self.at(op.add, 'i', *channel)} + " if op.add else ""
        yield self.at(op.out, "i", *channel), added + self.span(op.a, first, last, *channel)

    def decay(self, op: Decay):
        first, last = {
            Span.THROUGH: ("1", "i"), Span.BEFORE: ("1", "i-1"), Span.REST: ("i+1", "C"), Span.ALL: ("1", "C"),
        }[op.span]  # fmt: skip
        channel = [INDEX[d] for d in op.g.dims[1:]]
        yield self.at(op.out, *(INDEX[d] for d in op.out.dims)), self.exp_sum(op.g, first, last, *channel)

    def gram(self, op: Gram):
        for z, row, after, kept in zip(op.readers, op.outs, op.after, op.diagonal, strict=True):
            for x, out, diagonal in zip(op.writers, row, kept, strict=True):
                terms = f"{self.at(z, 'i', 'd')} {self.at(x, 'j', 'd')}"
                if op.g is not None:
                    terms += " " + self.exp_sum(
                        op.g, "j+1", "i" if after else "i-1", *(INDEX[d] for d in op.g.dims[1:])
                    )
                condition = self.up_to if diagonal else self.below
                yield self.at(out, "i", "j"), self.where(self.summed("d", terms), condition)

    def gram_adjoint(self, op: GramAdjoint):
        """Each operand's cotangent, a sum of one term a matrix that it is in; then that of the log decays."""
        for r, d_reader in enumerate(op.d_readers):
            terms = [self.at(add, "i", "d") for add in op.adds[0][r : r + 1] if add]
            terms += [self.summed(cond, f"{d} {x} {w}".rstrip()) for q, _, d, _, x, w, cond in self.pairs(op) if q == r]
            yield self.at(d_reader, "i", "d"), " + ".join(terms)
        for s, d_writer in enumerate(op.d_writers):
            terms = [self.at(add, "j", "d") for add in op.adds[1][s : s + 1] if add]
            terms += [
                self.summed(self.later(cond), f"{d} {z} {w}".rstrip())
                for _, q, d, z, _, w, cond in self.pairs(op)
                if q == s
            ]
            yield self.at(d_writer, "j", "d"), " + ".join(terms)
        if op.d_g:
            channels, over = indices(op.d_g)[1:], () if len(op.d_g.dims) > 1 else ("d",)
            terms = [self.at(add, "l", *channels) for add in op.adds[2] if add]
            terms += [
                self.summed(", ".join((self.runs_over[op.gram.after[r]], *over)), f"{d} {z} {x} {w}")
                for r, _, d, z, x, w, _ in self.pairs(op)
            ]
            yield self.at(op.d_g, "l", *channels), " + ".join(terms)

    def pairs(self, op: GramAdjoint):
        """(reader, writer, cotangent[i,j], z[i,d], x[j,d], decay from j to i, condition) of each matrix that counts."""
        gram = op.gram
        for r, (z, row) in enumerate(zip(gram.readers, op.d_outs, strict=True)):
            for s, (x, d) in enumerate(zip(gram.writers, row, strict=True)):
                if d:
                    last = "i" if gram.after[r] else "i-1"
                    decay = self.exp_sum(gram.g, "j+1", last, *indices(gram.g)[1:]) if gram.g else ""
                    condition = self.up_to if gram.diagonal[r][s] else self.below
                    yield r, s, self.at(d, "i", "j"), self.at(z, "i", "d"), self.at(x, "j", "d"), decay, condition

    def later(self, condition: str) -> str:
        """The same condition on i."""
        return {self.up_to: self.from_on, self.below: self.above}[condition]

    from_on, above = "i >= j", "i > j"

    def deinterleave(self, op: Deinterleave):
        for r, row in enumerate(op.outs):
            for s, out in enumerate(row):
                rows = {"rows": r + 1} if len(op.outs) > 1 else {}
                columns = {"columns": s + 1} if len(row) > 1 else {}
                yield self.name(out), self.part(self.name(op.a), **rows, **columns)

    def interleave(self, op: Interleave):
        yield self.name(op.out), self.stacked([[self.name(v) for v in row] for row in op.parts])

    def solve(self, op: SolveTril):
        yield self.name(op.out), self.inverse(self.name(op.a))

    def matmul(self, op: MatMul):
        yield self.name(op.out), " + ".join([*([self.name(op.add)] if op.add else []), *self.products(op)])

    def products(self, op: MatMul) -> list[str]:
        """The products of a MatMul, one by one."""
        return [f"{self.factor(t.a, t.transpose_a)} {self.factor(t.b, t.transpose_b)}" for t in op.terms]

    def factor(self, value: Value, transposed: bool) -> str:
        return self.transposed(self.name(value)) if transposed else self.name(value)


def indices(value: Value) -> list[str]:
    """A name for each dimension; tokens in columns are j."""
    names = [INDEX.get(d, "i") for d in value.dims]
    return ["i", "j"] if names == ["i", "i"] else names


class Latex(Plain):
    """The same as lines of an align environment; `document` makes them a file that compiles."""

    up_to, below, from_on, above = r"j \le i", "j < i", r"i \ge j", "i > j"
    runs_over = {True: r"j < l \le i", False: "j < l < i"}

    def document(self, title: str, sections: dict[str, Iterable[Op]]) -> str:
        """A whole article, one heading a section."""
        lines = [r"\documentclass{article}", r"\usepackage{amsmath}", r"\allowdisplaybreaks", r"\begin{document}"]
        lines += [rf"\section*{{{_escaped(title)}}}"]
        for heading, ops in sections.items():
            if equations := self.equations(ops):
                body = " \\\\\n".join(equations)
                lines += [rf"\subsection*{{{_escaped(heading)}}}", r"\begin{align*}", body, r"\end{align*}"]
        return "\n".join([*lines, r"\end{document}"]) + "\n"

    def equation(self, left: str, right: str) -> str:
        return f"{left} &= {right}"

    def name(self, value: Value) -> str:
        """Letters; digits and what follows an underscore as a subscript; a last underscore is a prime, d_ is a bar."""
        if value.name in STATES:
            return STATES[value.name]
        if value.name.startswith("d_") and len(value.name) > 2:
            return rf"\overline{{{self.name(Value(value.name[2:], value.dims))}}}"
        letters, digits, rest = re.fullmatch(r"([^\W\d_]*)(\d*)_?(.*)", value.name).groups()
        word = rf"\{letters}" if letters in GREEK else letters if len(letters) == 1 else rf"\mathrm{{{letters}}}"
        subscript = _escaped(digits + rest.rstrip("_"))
        prime = "'" if value.name.endswith("_") else ""
        return rf"{word}{prime}" + (rf"_{{\mathrm{{{subscript}}}}}" if subscript else "")

    def at(self, value: Value, *index: str) -> str:
        name = self.name(value)
        name = f"{{{name}}}" if "_{" in name else name
        return f"{name}_{{{','.join(index)}}}" if index else name

    def expr(self, expr, elements):
        return sympy.latex(expr, symbol_names=elements)

    def summed(self, index, terms):
        return rf"\sum_{{{index}}} {terms}"

    def span(self, g, first, last, *channel):
        return rf"\sum_{{t={first}}}^{{{last}}} {self.at(g, 't', *channel)}"

    def exp_sum(self, g, first, last, *channel):
        return rf"e^{{{self.span(g, first, last, *channel)}}}"

    def where(self, text, condition):
        return rf"{text}, \quad {condition}"

    def transposed(self, text):
        return rf"{{{text}}}^{{\top}}"

    def inverse(self, text):
        return rf"(I - {text})^{{-1}}"

    def part(self, text, **which):
        return rf"\operatorname{{part}}_{{{','.join(map(str, which.values()))}}}\left({text}\right)"

    def stacked(self, parts):
        return r"\operatorname{interleave}" + rf"\left({'; '.join(', '.join(row) for row in parts)}\right)"


GREEK = {"alpha", "beta", "gamma", "delta", "kappa", "lambda", "mu", "eta", "theta", "sigma", "omega"}
STATES = {"S_next": "S'", "S_kept": r"\tilde{S}"}


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "_&%#$" else c for c in text)
