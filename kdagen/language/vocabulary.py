"""The functions that a recurrence's body may use; on plain numbers they compute at once."""

from __future__ import annotations

import inspect
import math

from kdagen.errors import RecurrenceError
from kdagen.language.node import Node, make

NUMERIC = {
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "softplus": lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "relu": lambda x: max(x, 0.0),
    "abs": abs,
    "square": lambda x: x * x,
}


def _elementwise(name, numeric):
    def function(x):
        return make(name, x) if isinstance(x, Node) or not isinstance(x, (int, float)) else numeric(x)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{name}, elementwise."
    return function


exp, log, sqrt, rsqrt, sigmoid, softplus, silu, tanh, relu, abs_, square = (
    _elementwise(name, numeric) for name, numeric in NUMERIC.items()
)


def logsigmoid(x):
    """log(sigmoid(x)), which gates are often given as."""
    return -softplus(-x)


def maximum(a, b) -> Node:
    """The larger of two, elementwise."""
    return make("maximum", a, b)


def minimum(a, b) -> Node:
    """The smaller of two, elementwise."""
    return make("minimum", a, b)


def clip(x, lower, upper) -> Node:
    """x held between two bounds, elementwise."""
    return minimum(maximum(x, lower), upper)


def diag(d) -> Node:
    """The K x K matrix with d on its diagonal: `diag(d) @ S` scales row i of the state by d_i."""
    return make("diag", d)


def eye() -> Node:
    """The K x K identity, for operators such as `eye() - beta * outer(k, k)`."""
    return make("eye")


def outer(x, p) -> Node:
    """x p^T: a write of the value p at the key x, or with two key vectors a rank-one K x K operator."""
    return make("outer", x, p)


def dot(a, b) -> Node:
    """The sum over channels of a * b: a scalar a token."""
    return make("dot", a, b)


def sum_(x) -> Node:
    """The sum of a vector over its channels: a scalar a token."""
    return make("sum", x)


def l2norm(x, eps: float = 1e-6) -> Node:
    """x / sqrt(sum x^2 + eps)."""
    return make("l2norm", x, value=float(eps))


def shift(x, *_):
    """Refuses: a recurrence sees one token."""
    raise RecurrenceError(
        f"'shift({x})': a recurrence sees token t alone. Shift the tensor before the op, pass it as one more argument"
    )


def functions() -> list[str]:
    """What a body may call, by the names that kdagen exports."""
    here = [n for n, f in globals().items() if inspect.isfunction(f) and f.__module__ == __name__]
    return sorted(n.rstrip("_") for n in here if n[0] != "_" and n not in ("functions", "shift"))
