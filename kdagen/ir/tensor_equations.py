"""The equations of a tensor program, as plain text or LaTeX: each op's meaning in index or matrix notation.

Unlike tensor_show, which prints the program as it stands, this is written for people who want the mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import sympy

from kdagen.ir.tensor import Decay, Gram, Interleave, Map, MatMul, Op, RowSum, SolveTril, Span, Value

CHANNEL = {"i": "i", "j": "j", "k": "d", "v": "e"}  # k and v are names of keys and values as well
INDEX = {"C": "i", "K": "d", "V": "e"}


class Plain:
    """Equations as text: `A[i,j] = sum_d q[i,d] k[j,d] exp(g[j+1,d] + .. + g[i,d])`."""

    def equations(self, ops: Iterable[Op]) -> list[str]:
        """One or more equations an op; loads have none."""
        rules = {
            Map: self.map, RowSum: self.row_sum, Decay: self.decay, Gram: self.gram,
            Interleave: self.interleave, SolveTril: self.solve, MatMul: self.matmul,
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
        return f"sum_{index} {terms}"

    def exp_sum(self, g: Value, first: str, last: str, *channel: str) -> str:
        return f"exp({self.at(g, first, *channel)} + .. + {self.at(g, last, *channel)})"

    def where(self, text: str, condition: str) -> str:
        return f"{text}   for {condition}"

    def transposed(self, text: str) -> str:
        return f"{text}^T"

    def inverse(self, text: str) -> str:
        return f"(I - {text})^-1"

    def stacked(self, parts: list[list[str]]) -> str:
        return "rows of " + "; ".join(", ".join(row) for row in parts) + " interleaved token by token"

    up_to, below = "j <= i", "j < i"

    # -- ops, as pairs of left and right

    def map(self, op: Map):
        elements = {v.symbol: self.at(v, *(CHANNEL[i] for i in index)) for v, index in op.operands}
        yield self.at(op.out, *(CHANNEL[i] for i in op.indices)), self.expr(op.expr, elements)

    def row_sum(self, op: RowSum):
        channel = INDEX[op.a.dims[-1]]
        yield self.at(op.out, "i"), self.summed(channel, self.at(op.a, "i", channel))

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


class Latex(Plain):
    """The same as lines of an align environment; `document` makes them a file that compiles."""

    up_to, below = r"j \le i", "j < i"

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
        """Letters, then digits and what follows an underscore as a subscript; a trailing underscore is a prime."""
        if value.name in STATES:
            return STATES[value.name]
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

    def exp_sum(self, g, first, last, *channel):
        return rf"e^{{\sum_{{t={first}}}^{{{last}}} {self.at(g, 't', *channel)}}}"

    def where(self, text, condition):
        return rf"{text}, \quad {condition}"

    def transposed(self, text):
        return rf"{{{text}}}^{{\top}}"

    def inverse(self, text):
        return rf"(I - {text})^{{-1}}"

    def stacked(self, parts):
        return r"\operatorname{interleave}" + rf"\left({'; '.join(', '.join(row) for row in parts)}\right)"


GREEK = {"alpha", "beta", "gamma", "delta", "kappa", "lambda", "mu", "eta", "theta", "sigma", "omega"}
STATES = {"S_next": "S'", "S_kept": r"\tilde{S}"}


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "_&%#$" else c for c in text)
