"""TVM expressions as Python closures of a Frame, compiled once and run for a scalar or for all lanes of a
T.Parallel loop at once.

Half floats are computed in float32 and rounded once, as the GPU does. max and min pass NaN on (the GPU's drop it),
so that poison stays visible. Statements are in program.py, tile operations in tileops.py.
"""

from __future__ import annotations

import numpy as np

from kdagen.errors import SimulationError
from kdagen.simulate.elements import Element, is_lanes
from kdagen.simulate.memory import dtype_of, rounded, widened


def _truncating_divide(x, y):
    return np.trunc(np.asarray(x) / np.asarray(y)).astype(np.int64)[()]


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


ARITHMETIC = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Min": np.minimum,
    "Max": np.maximum,
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Mod": np.fmod,
}
COMPARISONS = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
}
# functions that round their result to the expression's dtype
FUNCTIONS = {
    "exp2": np.exp2,
    "exp": np.exp,
    "exp10": lambda x: np.power(np.float32(10), x),
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "sin": np.sin,
    "cos": np.cos,
    "fabs": np.abs,
    "abs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.rint,
    "nearbyint": np.rint,
    "trunc": np.trunc,
    "pow": np.power,
    "fmod": np.fmod,
    "copysign": np.copysign,
    "clamp": lambda x, low, high: np.minimum(np.maximum(x, low), high),
    "fma": lambda x, y, z: x * y + z,
    "ieee_add": np.add,
    "ieee_sub": np.subtract,
    "ieee_mul": np.multiply,
    "ieee_fdiv": np.divide,
    "ieee_fmaf": lambda x, y, z: x * y + z,
    "ieee_frcp": lambda x: 1 / x,
    "ieee_fsqrt": np.sqrt,
    "ieee_frsqrt": lambda x: 1 / np.sqrt(x),
    "fast_rcp": lambda x: 1 / x,
}
# functions whose result needs no rounding
EXACT = {
    "isnan": np.isnan,
    "isinf": np.isinf,
    "isfinite": np.isfinite,
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "bitwise_not": np.bitwise_not,
    "shift_left": np.left_shift,
    "shift_right": np.right_shift,
    "likely": lambda x: x,
    "tvm_thread_invariant": lambda x: x,
}


def short_name(call) -> str:
    """'tl.tileop.copy' -> 'copy', 'tirx.__exp2' -> 'exp2'."""
    return str(getattr(call.op, "name", call.op)).rsplit(".", 1)[-1].lstrip("_")


def held(value):
    """A value to keep: what memory holds now, whatever is stored there later."""
    return value.copy() if is_lanes(value) else value


def _numeric(args) -> list:
    """Arguments without rounding modes."""
    return [a for a in args if type(a).__name__ != "StringImm"]


class Expressions:
    """Compiles expressions: `compiler.expression(e)` is a function of a Frame."""

    def __init__(self, name: str):
        self.name = name  # of the kernel, for errors
        self.line = ""  # of the source, where compilation is
        self.lane_axes = {}  # variables of the T.Parallel loops around -> their axis

    def unsupported(self, what: str, node) -> SimulationError:
        found = self.line or next(t.strip() for t in str(node).splitlines() if t.strip() and not t.startswith("#"))
        return SimulationError(
            f"kernel '{self.name}': the simulator has no {what}, found at {found}: "
            "write it with constructs that kdagen/simulate knows"
        )

    def expression(self, e):
        if isinstance(e, int):
            return lambda f: e
        kind = type(e).__name__
        if kind in ARITHMETIC:
            return self._arithmetic(e, ARITHMETIC[kind])
        if kind in COMPARISONS:
            return self._pointwise(COMPARISONS[kind], (e.a, e.b))
        method = getattr(self, f"_e_{kind}", None)
        if method is None:
            raise self.unsupported(f"expression {kind}", e)
        return method(e)

    def expressions(self, es) -> list:
        return [self.expression(e) for e in es]

    def indices(self, es):
        """Several integer expressions as one closure that gives a list of ints."""
        if all(isinstance(e, int) or type(e).__name__ == "IntImm" for e in es):
            constant = [int(e) for e in es]
            return lambda f: constant
        parts = self.expressions(es)
        return lambda f: [int(part(f)) for part in parts]

    def _arithmetic(self, e, function):
        a, b = self.expression(e.a), self.expression(e.b)
        if str(e.dtype) not in ("bfloat16", "float16"):
            return lambda f: function(a(f), b(f))
        dtype = dtype_of(e.dtype)
        return lambda f: rounded(function(widened(a(f)), widened(b(f))), dtype)

    def _pointwise(self, function, es):
        parts = self.expressions(es)
        return lambda f: function(*(widened(part(f)) for part in parts))

    def _e_IntImm(self, e):
        value = bool(e.value) if str(e.dtype) == "bool" else int(e.value)
        return lambda f: value

    def _e_FloatImm(self, e):
        value = dtype_of(e.dtype).type(float(e.value))
        return lambda f: value

    def _e_Var(self, e):
        def variable(f):
            try:
                return f.env[e]
            except KeyError:
                raise SimulationError(f"kernel '{self.name}': '{e.name}' has no value here") from None

        return variable

    _e_SizeVar = _e_Var

    def _e_Div(self, e):
        return self._arithmetic(e, np.divide if "float" in str(e.dtype) else _truncating_divide)

    def _e_Not(self, e):
        return self._pointwise(np.logical_not, (e.a,))

    def _e_Cast(self, e):
        value, dtype = self.expression(e.value), dtype_of(e.dtype)
        return lambda f: rounded(value(f), dtype)

    def _e_Select(self, e):
        return self._choose(e.condition, e.true_value, e.false_value)

    def _choose(self, condition, yes, no):
        """Only the branch taken is evaluated, lane by lane: the other one's reads do not happen."""
        condition, yes, no = self.expressions((condition, yes, no))

        def choose(f):
            taken = condition(f)
            if not is_lanes(taken):
                return yes(f) if taken else no(f)
            outer = f.mask
            f.mask = taken if outer is None else outer & taken
            first = yes(f)
            f.mask = ~taken if outer is None else outer & ~taken
            second = no(f)
            f.mask = outer
            return np.where(taken, first, second)

        return choose

    def _e_Let(self, e):
        value, body, var = self.expression(e.value), self.expression(e.body), e.var

        def let(f):
            f.env[var] = held(value(f))
            return body(f)

        return let

    def _e_BufferLoad(self, e):
        return Element(self, e.buffer, e.indices).load

    def _e_Call(self, e):
        name = short_name(e)
        if name == "if_then_else":
            return self._choose(*e.args)
        if name in EXACT:
            return self._pointwise(EXACT[name], e.args)
        if name in FUNCTIONS:
            inner, dtype = self._pointwise(FUNCTIONS[name], _numeric(e.args)), dtype_of(e.dtype)
            return lambda f: rounded(inner(f), dtype)
        method = getattr(self, f"_call_{name}", None)
        if method is None:
            raise self.unsupported(f"function {e.op.name}", e)
        return method(e)

    def _call_infinity(self, e):
        value = dtype_of(e.dtype).type(np.inf)
        return lambda f: value

    def _call_reinterpret(self, e):
        value, dtype = self.expression(e.args[0]), dtype_of(e.dtype)
        return lambda f: np.asarray(value(f)).view(dtype)[()]
