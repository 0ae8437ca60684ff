"""The oracle: a recurrence run token by token in float64, exactly as its body is written.

`recurrence_reference` follows the record of the body and knows nothing of the derivation; `canonical_reference` runs a
canonical form, one token at a time, and is what the derivation is tested with.
"""

from __future__ import annotations

import operator

import sympy

from kdagen.derive.roles import infer, ordered
from kdagen.errors import ArgumentError
from kdagen.ir.canonical import Argument, Canonical, Intra, Reader
from kdagen.ir.functions import ChannelSum, sigmoid, softplus


def recurrence_reference(recurrence, tensors: dict, initial_state=None):
    """Output [B, T, H, V] and final state [B, H, K, V], by the recurrence as recorded."""
    import torch

    typed = infer(recurrence)
    nodes = ordered(recurrence.new_state, recurrence.output)

    def step(state, inputs):
        values = {recurrence.state: state} | {n: inputs[n.value] for n in recurrence.inputs}
        values |= {n: torch.eye(state.shape[-2]).to(state) for n in nodes if n.op == "eye"}
        for n in nodes:
            if n not in values:
                values[n] = _apply(n, [values[a] for a in n.args], [typed.axes[a] for a in n.args])
        return values[recurrence.new_state], values[recurrence.output]

    return _scan(step, typed.arguments, tensors, initial_state)


def canonical_reference(canonical: Canonical, tensors: dict, initial_state=None):
    """Output [B, T, H, V] and final state [B, H, K, V], by the canonical form."""
    import torch

    def step(state, inputs):
        env = {a.symbol: inputs[a.name] for a in canonical.arguments}
        decayed = torch.exp(evaluate(canonical.decay, env)).unsqueeze(-1) * state
        xs = [evaluate(s.x, env) for s in canonical.streams]
        ps = []
        for s in canonical.streams:
            ps.append(_read(s.reader, env, state, decayed, xs, ps))
        new = decayed + sum((x.unsqueeze(-1) * p.unsqueeze(-2) for x, p in zip(xs, ps, strict=True)), 0.0)
        return new, _read(canonical.output, env, state, decayed, xs, ps)

    return _scan(step, canonical.arguments, tensors, initial_state)


def _read(reader: Reader, env, state, decayed, xs, ps):
    z = evaluate(reader.z, env).expand(state.shape[:-1])
    total = evaluate(reader.y, env) + _rows(z, decayed if reader.after else state)
    for x, p, intra in zip(xs, ps, reader.intra, strict=False):
        if intra is not Intra.NONE:
            weight = (x * z).sum(-1, keepdim=True) if intra is Intra.GRAM else evaluate(intra, env)
            total = total + weight * p
    return evaluate(reader.scale, env) * total


def _scan(step, arguments: tuple[Argument, ...], tensors: dict, initial_state):
    import torch

    given = _prepare(arguments, tensors)
    b, t, h, k, v = sizes(arguments, given)
    device = next(iter(given.values())).device
    state = torch.zeros(b, h, k, v, dtype=torch.float64, device=device)
    if initial_state is not None:
        state = state + initial_state.double()
    given = {a.name: _heads(a, given[a.name], h) for a in arguments}
    outputs = []
    for i in range(t):
        inputs = {a.name: given[a.name][:, i] if a.per_token else given[a.name].unsqueeze(0) for a in arguments}
        state, o = step(state, inputs)
        outputs.append((o + torch.zeros(b, h, v, dtype=torch.float64, device=device)).reshape(b, h, v))
    return torch.stack(outputs, 1), state


def _prepare(arguments, tensors: dict) -> dict:
    """Float64 copies with a trailing channel axis, of size one for scalars."""
    if missing := [a.name for a in arguments if a.name not in tensors]:
        raise ArgumentError(f"no tensor for {', '.join(missing)}: expected {', '.join(a.name for a in arguments)}")
    doubles = {a.name: tensors[a.name].double() for a in arguments}
    return {a.name: doubles[a.name] if a.axis else doubles[a.name].unsqueeze(-1) for a in arguments}


def sizes(arguments, given: dict) -> tuple[int, int, int, int, int]:
    """B, T, heads (the most that any argument has), K and V; tensors have a trailing channel axis."""
    tokens = [given[a.name] for a in arguments if a.per_token]
    heads = max(given[a.name].shape[-2] for a in arguments)
    channels = {axis: next((given[a.name].shape[-1] for a in arguments if a.axis == axis), 1) for axis in "KV"}
    return (*tokens[0].shape[:2], heads, channels["K"], channels["V"])


def _heads(argument: Argument, tensor, heads: int):
    """Fewer heads (grouped): each serves as many consecutive ones."""
    return tensor.repeat_interleave(heads // tensor.shape[-2], dim=-2)


def _rows(x, matrix):
    """x^T matrix."""
    return (x.unsqueeze(-1) * matrix).sum(-2)


# Nodes on tensors: scalars [B, H, 1], vectors [B, H, axis], matrices [B, H, ., .].


def _apply(node, args, axes):
    import torch

    if node.op == "constant":
        return torch.tensor([float(node.value)], dtype=torch.float64)
    if node.op in INFIX:
        matrix = any(len(t) == 2 for t in axes)
        args = [a.unsqueeze(-1) if matrix and t == "" else a for a, t in zip(args, axes, strict=True)]
        return INFIX[node.op](*args)
    if node.op == "matmul":
        return _matmul(*args, *axes)
    if node.op == "l2norm":
        return args[0] * torch.rsqrt((args[0] ** 2).sum(-1, keepdim=True) + node.value)
    return _functions(torch)[node.op](*args)


INFIX = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "pow": operator.pow}


def _functions(torch) -> dict:
    return {
        "neg": operator.neg,
        "diag": torch.diag_embed,
        "transpose": lambda m: m.mT,
        "outer": lambda x, p: x.unsqueeze(-1) * p.unsqueeze(-2),
        "dot": lambda a, b: (a * b).sum(-1, keepdim=True),
        "sum": lambda x: x.sum(-1, keepdim=True),
        "exp": torch.exp,
        "log": torch.log,
        "sqrt": torch.sqrt,
        "rsqrt": torch.rsqrt,
        "sigmoid": torch.sigmoid,
        "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "abs": torch.abs,
        "square": torch.square,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
    }


def _matmul(a, b, left: str, right: str):
    if (left, right) in (("K", "K"), ("V", "V")):
        return (a * b).sum(-1, keepdim=True)
    if len(left) == 1:
        return (a.unsqueeze(-2) @ b).squeeze(-2)
    if len(right) == 1:
        return (a @ b.unsqueeze(-1)).squeeze(-1)
    return a @ b


# Expressions on tensors, every one with a trailing channel axis.


def evaluate(expr: sympy.Expr, env: dict):
    """An elementwise expression in float64; `env` gives each symbol's tensor [..., channels or 1]."""
    import torch

    if expr.is_Symbol:
        return env[expr]
    if expr.is_number:
        return torch.tensor([float(expr)], dtype=torch.float64, device=next(iter(env.values())).device)
    args = [evaluate(a, env) for a in expr.args]
    return _torch_functions(torch)[expr.func](*args)


def _fold(function):
    def folded(first, *rest):
        for r in rest:
            first = function(first, r)
        return first

    return folded


def _torch_functions(torch) -> dict:
    return {
        sympy.Add: _fold(operator.add),
        sympy.Mul: _fold(operator.mul),
        sympy.Pow: torch.pow,
        sympy.exp: torch.exp,
        sympy.log: torch.log,
        sympy.tanh: torch.tanh,
        sympy.Abs: torch.abs,
        sympy.Max: _fold(torch.maximum),
        sympy.Min: _fold(torch.minimum),
        sigmoid: torch.sigmoid,
        softplus: lambda x: torch.logaddexp(x, torch.zeros_like(x)),
        ChannelSum: lambda x: x.sum(-1, keepdim=True),
    }
