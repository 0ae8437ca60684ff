"""Axes of every node of a recurrence, inferred from how it is used.

Each node has a set of axes it could have; each operation allows certain combinations. Sets shrink until nothing
changes (arc consistency). What use leaves open is settled, in this order, by: the field's standard names; sums, whose
operands have the sum's axis; products, where a factor beside a vector is a scalar. What is still open is an error.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from kdagen.errors import RecurrenceError
from kdagen.ir.canonical import Argument
from kdagen.language import annotations as roles
from kdagen.language.node import Node

# Standard names; a trailing number is ignored (k1, k_2). They decide only what use leaves open.
NAMES = {
    "q": roles.Key,
    "k": roles.Key,
    "v": roles.Value,
    "query": roles.Key,
    "key": roles.Key,
    "value": roles.Value,
    "beta": roles.Scalar,
    "dt": roles.Scalar,
    "A_log": roles.HeadParameter,
    "D": roles.HeadParameter,
    "dt_bias": roles.ChannelParameter,
}

VECTORS, MATRICES = ("", "K", "V"), ("KV", "KK", "VK")
SAME = [(t, t, t) for t in VECTORS]
BROADCAST = SAME + [c for t in ("K", "V") for c in ((t, "", t), (t, t, ""))]
UNARY = [(t, t) for t in VECTORS]
SUM = BROADCAST + [(m, m, m) for m in MATRICES]

# Allowed (result, operands...) of each operation; others are elementwise: UNARY or BROADCAST by their arity.
ALLOWED = {
    "state": [("KV",)],
    "constant": [("",)],
    "argument": [(t,) for t in VECTORS],
    "neg": UNARY + [(m, m) for m in MATRICES],
    "add": SUM,
    "sub": SUM,
    "mul": BROADCAST + [c for m in MATRICES for c in ((m, "", m), (m, m, ""))],
    "div": BROADCAST + [(m, m, "") for m in MATRICES],
    "diag": [("KK", "K")],
    "eye": [("KK",)],
    "outer": [("KV", "K", "V"), ("KK", "K", "K")],
    "transpose": [("VK", "KV"), ("KV", "VK"), ("KK", "KK")],
    "dot": [("", "K", "K"), ("", "V", "V")],
    "sum": [("", "K"), ("", "V")],
    "l2norm": [("K", "K"), ("V", "V")],
    "matmul": [
        ("KV", "KK", "KV"),
        ("KK", "KK", "KK"),
        ("VK", "VK", "KK"),
        ("K", "KK", "K"),
        ("K", "K", "KK"),
        ("V", "VK", "K"),
        ("V", "K", "KV"),
        ("", "K", "K"),
        ("", "V", "V"),
    ],
}

LABELS = {
    "": "a scalar",
    "K": "a key vector",
    "V": "a value vector",
    "KV": "a K x V matrix",
    "KK": "a K x K matrix",
    "VK": "a V x K matrix",
}
ANNOTATIONS = {"": "kg.Scalar", "K": "kg.Channel", "V": "kg.Value"}


TWICE = "pass the tensor twice, under two names"


@dataclass(frozen=True)
class Typed:
    """The axes of all nodes, and the arguments."""

    axes: dict[Node, str]
    arguments: tuple[Argument, ...]


@functools.lru_cache(maxsize=256)
def infer(recurrence) -> Typed:
    """Axes and arguments of a recurrence, or a RecurrenceError that names what is open or contradictory."""
    problem = _Inference(recurrence)
    problem.narrow()
    problem.settle(problem.by_name())
    while choice := problem.by_rule():
        problem.settle([choice])
    return Typed(problem.solution(), tuple(problem.argument(n) for n in recurrence.inputs))


def ordered(*roots: Node) -> list[Node]:
    """The nodes under `roots`, operands first."""
    found: dict[Node, None] = {}

    def visit(node):
        if node not in found:
            for a in node.args:
                visit(a)
            found[node] = None

    for root in roots:
        visit(root)
    return list(found)


class _Inference:
    def __init__(self, recurrence):
        self.recurrence = recurrence
        self.nodes = ordered(recurrence.new_state, recurrence.output)
        self.open = {n: {c[0] for c in _allowed(n)} for n in self.nodes}
        self.reason: dict[Node, str] = {}
        for n in recurrence.inputs:
            self._check_used(n)
            if role := recurrence.roles.get(n.value):
                self.open[n] = {role.axis}
                self.reason[n] = f"it is annotated kg.{role.name}"

    def _check_used(self, node: Node) -> None:
        if node not in self.open:
            raise RecurrenceError(f"argument '{node}' is never used: remove it, or use it")

    def narrow(self) -> None:
        """Shrinks the sets until nothing changes."""
        changed = True
        while changed:
            changed = any([self._narrow(n) for n in self.nodes])
            for node, axis, what in self._roots():
                if axis not in self.open[node]:
                    raise RecurrenceError(self._wrong_root(node, axis, what))
                if self.open[node] != {axis}:
                    self.open[node], changed = {axis}, True
                    self.reason.setdefault(node, f"it is {what}")

    def _roots(self):
        return (self.recurrence.new_state, "KV", "the new state"), (self.recurrence.output, "V", "the output")

    def _narrow(self, node: Node) -> bool:
        parts = (node, *node.args)
        fits = [c for c in _allowed(node) if all(t in self.open[p] for t, p in zip(c, parts, strict=True))]
        if not fits:
            raise RecurrenceError(self._contradiction(node))
        changed = False
        for i, part in enumerate(parts):
            left = self.open[part] & {c[i] for c in fits}
            if not left:  # the same node twice, with two axes
                raise RecurrenceError(self._contradiction(node))
            if left != self.open[part]:
                self.open[part], changed = left, True
                self.reason.setdefault(part, f"by its use in '{node}'")
        return changed

    def settle(self, choices) -> None:
        for node, axis, why in choices:
            if len(self.open[node]) > 1 and axis in self.open[node]:
                self.open[node] = {axis}
                self.reason.setdefault(node, why)
                self.narrow()

    def by_name(self):
        """Open arguments with a standard name."""
        for n in self.recurrence.inputs:
            if role := NAMES.get(_stem(n.value)):
                yield n, role.axis, f"by its name, since use leaves it open: annotate it if it is not kg.{role.name}"

    def by_rule(self):
        """One open operand that a sum or a product settles."""
        for op in (("add", "sub", "maximum", "minimum"), ("mul", "div", "pow")):
            for n in self.nodes:
                if n.op in op and len(self.open[n]) == 1 and (found := self._operand(n, sums=op[0] == "add")):
                    return found
        return None

    def _operand(self, node: Node, sums: bool):
        (axis,) = self.open[node]
        for a, b in (node.args, node.args[::-1]):
            if len(self.open[a]) > 1 and sums and axis in self.open[a]:
                return a, axis, f"as an operand of the sum '{node}'"
            if len(self.open[a]) > 1 and not sums and self.open[b] == {axis} and "" in self.open[a]:
                return a, "", f"as a factor beside a vector in '{node}'"
        return None

    def solution(self) -> dict[Node, str]:
        for n in self.recurrence.inputs:
            if len(self.open[n]) > 1:
                raise RecurrenceError(self._ambiguous(n))
        return {n: next(iter(axes)) for n, axes in self.open.items()}

    def argument(self, node: Node) -> Argument:
        (axis,) = self.open[node]
        self._check_name(node, axis)
        role = self.recurrence.roles.get(node.value) or NAMES.get(_stem(node.value), roles.Scalar)
        return Argument(node.value, axis, role.per_token, role.lower, role.upper)

    def _check_name(self, node: Node, axis: str) -> None:
        """Refuses a key vector called v, a value vector called k or q: where K = V no shape would tell."""
        role = NAMES.get(_stem(node.value))
        if role in (roles.Key, roles.Value) and axis not in ("", role.axis) and node.value not in self.recurrence.roles:
            meant = roles.Key if axis == "K" else roles.Value
            raise RecurrenceError(
                f"argument '{node}' is {LABELS[axis]} {self.reason[node]}, but by its name {LABELS[role.axis]}: "
                f"kg.outer takes the key, then the value, since the state is K x V (o = S.T @ q). If it is meant, "
                f"annotate it, {node}: kg.{meant.name}"
            )

    # What to say.

    def _ambiguous(self, node: Node) -> str:
        use = next(n for n in self.nodes if node in n.args)
        choices = " or ".join(f"{node}: {ANNOTATIONS[t]} ({LABELS[t]})" for t in VECTORS if t in self.open[node])
        return f"the role of argument '{node}' is open: it is used in '{use}' ({use.line}). Annotate it: {choices}"

    def _wrong_root(self, node: Node, axis: str, what: str) -> str:
        hint = "return the state, then the output"
        if axis == "V":
            hint = "the output is a read of the state by a key vector, such as S.T @ q, plus value vectors"
        return f"{what} is '{node}' ({node.line}), {self._label(node)}; expected {LABELS[axis]}: {hint}"

    def _label(self, node: Node) -> str:
        return " or ".join(LABELS[t] for t in (*VECTORS, *MATRICES) if t in self.open[node])

    def _contradiction(self, node: Node) -> str:
        known = [p for p in dict.fromkeys((*node.args, node)) if len(self.open[p]) <= 2]
        facts = "; ".join(f"'{p}' is {self._label(p)}{self._why(p)}" for p in known)
        return f"axes do not fit in '{node}' ({node.line}){facts and ': '}{facts}. {self._hint(node)}"

    def _why(self, node: Node) -> str:
        """Where its axis comes from, unless it is plain to see."""
        return f" ({self.reason[node]})" if node in self.reason and not node.args and node.op != "state" else ""

    def _hint(self, node: Node) -> str:
        kinds = [self.open[a] for a in node.args]
        matrices = [k <= set(MATRICES) for k in kinds]
        if node.op == "matmul" and kinds[0] == {"KV"}:
            return (
                "The state is K x V: a read is S.T @ x and a decay kg.diag(d) @ S. What multiplies it from the right "
                "acts on its value channels, and value-side decay is outside the family"
            )
        if node.op in ("matmul", "add", "sub") and any(matrices):
            return (
                "Arguments are vectors and scalars, never matrices, and there is one matrix state: a write is "
                "kg.outer(key, value), and a K x K operator on the state is kg.diag(d) plus rank-one terms such as "
                "kg.outer(b, a)"
            )
        if node.op in ("mul", "div") and any(matrices):
            return "Only a scalar may multiply a matrix: to scale the rows of the state write kg.diag(d) @ S"
        if node.op == "transpose":
            return (
                "Only a matrix has a transpose: write kg.outer(x, p) for x p^T, kg.dot(a, b) for a^T b, and S.T @ q "
                "or q @ S for a read"
            )
        if node.op == "outer":
            return (
                "kg.outer takes a key vector, then a value vector (or two key vectors: a K x K operator). An argument "
                f"has one axis, even where K = V: {TWICE}"
            )
        if node.op == "diag":
            return "kg.diag takes a key vector; a scalar multiplies the state directly"
        return (
            "Operands have the same axis, or one of them is a scalar; an annotation settles what an argument is, and "
            f"for both key and value {TWICE}"
        )


def _allowed(node: Node):
    return ALLOWED.get(node.op) or (UNARY if len(node.args) == 1 else BROADCAST)


def _stem(name: str) -> str:
    return re.sub(r"_?\d+$", "", name)
