"""Nodes: what the symbols handed to a recurrence's body are, and what operating on them records.

A node only records. Axes are inferred later (kdagen.derive.roles) and algebra is done later still
(kdagen.derive.canonical); what is refused here is what no later step could accept: anything non-linear in the state,
and anything that is not an operation on one token.
"""

from __future__ import annotations

import math
import numbers
import sys
from dataclasses import dataclass, field

from kdagen.errors import RecurrenceError

LINEAR = {"neg", "add", "sub", "mul", "div", "matmul", "transpose", "outer"}  # may hold the state, each in its way
INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2), "matmul": ("@", 2), "pow": ("**", 4)}


@dataclass(frozen=True, eq=False, repr=False)
class Node:
    """One recorded operation. `value`: an argument's name, a constant's number, the eps of an l2norm."""

    op: str
    args: tuple[Node, ...] = ()
    value: object = None
    holds_state: bool = False
    line: str = field(default_factory=lambda: _user_line())

    def __str__(self):
        return _text(self)

    __repr__ = __str__

    def __add__(self, other):
        return make("add", self, other)

    def __radd__(self, other):
        return self if other == 0 else make("add", other, self)  # python's sum starts from 0, whatever it adds

    def __sub__(self, other):
        return make("sub", self, other)

    def __rsub__(self, other):
        return make("sub", other, self)

    def __mul__(self, other):
        return make("mul", self, other)

    def __rmul__(self, other):
        return make("mul", other, self)

    def __truediv__(self, other):
        return make("div", self, other)

    def __rtruediv__(self, other):
        return make("div", other, self)

    def __pow__(self, other):
        return make("pow", self, other)

    def __rpow__(self, other):
        return make("pow", other, self)

    def __matmul__(self, other):
        return make("matmul", self, other)

    def __rmatmul__(self, other):
        return make("matmul", other, self)

    def __neg__(self):
        return make("neg", self)

    def __pos__(self):
        return self

    def __abs__(self):
        return make("abs", self)

    @property
    def T(self):
        return self.args[0] if self.op == "transpose" else make("transpose", self)

    mT = T

    def __getitem__(self, index):
        raise RecurrenceError(
            f"'{self}[{index}]': a recurrence sees token t alone and its arguments have no index. For another token's "
            f"value, shift the tensor before the op and pass it as one more argument; for a sequence of n an argument "
            f"is annotated, such as kg.Key[2]"
        )

    def __setitem__(self, index, value):
        raise RecurrenceError(
            f"'{self}[{index}] = {value}': nothing is written in place. Write a new value, such as "
            f"S = S + kg.outer(k, v) (or S += ..)"
        )

    def __iter__(self):
        raise RecurrenceError(f"'{self}' is not a sequence: annotate the argument, such as kg.Key[2], to get a tuple")

    def __len__(self):
        return iter(self)

    def __getattr__(self, name):
        if name.startswith("__") or name.startswith("_"):
            raise AttributeError(name)
        raise RecurrenceError(
            f"'{self}.{name}': a symbol has no attribute '{name}'. It stands for its value at token t: there is no "
            f"next or previous token, no shape and no method but .T"
        )

    def __bool__(self):
        raise RecurrenceError(
            f"the truth of '{self}' was asked for ('if', 'and', 'not', a comparison): the body runs once, on symbols. "
            f"Use kg.maximum, kg.minimum or kg.relu, or a python default for a choice made at compile time"
        )

    def _no_order(self, other):
        raise RecurrenceError(
            f"'{self}' was compared with '{other}': the body runs once, on symbols. Use kg.maximum or kg.minimum"
        )

    __lt__ = __le__ = __gt__ = __ge__ = _no_order

    def __eq__(self, other):
        return self._no_order(other) if isinstance(other, numbers.Number) else self is other

    __hash__ = object.__hash__

    def __float__(self):
        raise RecurrenceError(
            f"'{self}' has no value while the recurrence is recorded: use the functions of kdagen (kg.exp, "
            f"kg.sigmoid, ...) in place of those of math, numpy, torch or sympy"
        )

    __int__ = __complex__ = __index__ = _sympy_ = __float__

    def __array__(self, *args, **kwargs):
        return float(self)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        operators = {"add": "add", "subtract": "sub", "multiply": "mul", "true_divide": "div", "divide": "div"}
        if ufunc.__name__ in operators and all(isinstance(i, (Node, numbers.Real)) for i in inputs):
            return make(operators[ufunc.__name__], *inputs)
        return float(self)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return float(next(a for a in args if isinstance(a, Node)))


def constant(value) -> Node:
    """A python number, as a node."""
    if isinstance(value, Node):
        return value
    if isinstance(value, numbers.Real) and not math.isfinite(value):
        raise RecurrenceError(
            f"{value} stands where a finite number was expected: give a full reset as a gate of -inf when the op is "
            f"called, and leave out a bound that is infinite"
        )
    if isinstance(value, numbers.Real):
        return Node("constant", value=int(value) if float(value).is_integer() else float(value))
    fixes = {tuple: "take one of its items, such as k[0], or loop over them", complex: "the state is real"}
    fix = fixes.get(type(value), "pass tensors as arguments; a parameter with a default is a compile-time constant")
    raise RecurrenceError(
        f"a {type(value).__name__} stands where a symbol or a number was expected: a recurrence has only its arguments "
        f"and numbers, so {fix}"
    )


def make(op: str, *args, value=None) -> Node:
    """Records an operation, refusing what is not linear in the state."""
    nodes = tuple(constant(a) for a in args)
    node = Node(op, nodes, value, any(n.holds_state for n in nodes))
    if op == "div" and nodes[1].value == 0:
        raise RecurrenceError(f"'{node}' divides by zero: expected a divisor that is not 0")
    _check_linear(node)
    return node


def _check_linear(node: Node) -> None:
    held = [n for n in node.args if n.holds_state]
    if not held:
        return
    if len(held) > 1 and node.op not in ("add", "sub"):
        why = "both operands hold the state"
    elif node.op == "div" and node.args[1].holds_state:
        why = "it divides by something that holds the state"
    elif node.op in ("dot", "sum"):
        raise RecurrenceError(
            f"'{node}' sums a read of the state over its value channels, which couples them: "
            f"only S.T @ x (a read by a key vector) is in the family"
        )
    elif node.op not in LINEAR:
        why = f"'{node.op}' of something that holds the state"
    else:
        return
    raise RecurrenceError(
        f"'{node}' is not linear in the state: {why}. A gate, norm or product may use the arguments, never S; "
        f"norms and activations of the output belong after the op"
    )


def _text(node: Node, outer: int = 0, names: dict[Node, str] | None = None, depth: int = 8) -> str:
    """Infix text; nodes in `names` by their name, what lies deeper than `depth` left out."""

    def part(n, rank):
        return _text(n, rank, names, depth - 1)

    if names and node in names:
        return names[node]
    if node.op in ("argument", "state"):
        return str(node.value)
    if node.op == "constant":
        return f"({node.value:.6g})" if node.value < 0 and outer > 2 else f"{node.value:.6g}"
    if not depth:
        return "..."
    if node.op == "transpose":
        return f"{part(node.args[0], 9)}.T"
    if node.op == "neg":
        text, rank = f"-{part(node.args[0], 2)}", 2
    elif node.op in INFIX:
        sign, rank = INFIX[node.op]
        right = part(node.args[1], rank + (node.op not in ("add", "mul")))
        text = f"{part(node.args[0], rank)} {sign} {right}"
    else:
        return f"{node.op}({', '.join(part(a, 0) for a in node.args)})"
    return f"({text})" if rank < outer else text


def equations(new_state: Node, output: Node, axes: dict[Node, str]) -> list[tuple[str, str]]:
    """What a body computes, line by line: what is used twice by name (S1 matrices, u1 vectors), then S' and o."""
    users: dict[Node, set[Node]] = {}
    order: dict[Node, None] = {}

    def visit(node):
        for a in node.args:
            users.setdefault(a, set()).add(node)
            if a not in order:
                visit(a)
        order[node] = None

    visit(new_state)
    if output not in order:
        visit(output)
    names: dict[Node, str] = {}
    lines = []
    for node in order:
        between = node.holds_state and node.op in ("add", "sub", "mul", "matmul") and len(users.get(node, ())) > 1
        if node is new_state or between and node is not output:
            name = "S'" if node is new_state else f"{'S' if axes[node] == 'KV' else 'u'}{len(names) + 1}"
            lines.append((name, _text(node, 0, names)))
            names[node] = name
    return [*lines, ("o", _text(output, 0, names))]


def _user_line() -> str:
    """Where in the user's file the operation stands."""
    frame = sys._getframe(1)
    while frame and frame.f_globals.get("__name__", "").startswith("kdagen.") and "zoo" not in frame.f_code.co_filename:
        frame = frame.f_back
    while frame and frame.f_code.co_filename == "<string>":  # the __init__ that dataclass generates
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""
