"""The step form: the recurrence of one token of one head, and what it means on torch.

    token     from the token's arguments alone: loads, elementwise maps, channel sums
    reads     r = S^T z, all of the state before the token, so that it is read once
    values    pseudo-values p in the order of streams, then the output: maps over V
    update    S' = decay S + sum of x p^T

Ops and values are those of the tensor IR, with dims ("K",), ("V",) or (): unlike a chunk's program there are no rows,
and nothing reads the new state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kdagen.errors import KdagenError
from kdagen.ir.canonical import Canonical
from kdagen.ir.tensor import Load, Map, Op, RowSum, Value, reads
from kdagen.ir.tensor_show import line, right, typed


@dataclass(frozen=True)
class Read:
    """out = S^T z, S being the state before the token: `out` has dims ("V",), `z` ("K",)."""

    out: Value
    z: Value
    eq: str = ""


@dataclass(frozen=True)
class Write:
    """x p^T, added to the decayed state: `x` has dims ("K",), `p` ("V",)."""

    x: Value
    p: Value


@dataclass(frozen=True)
class StepForm:
    """One token. Each op reads arguments and values made before it, in the order of the fields.

    Maps broadcast: an operand without dims, or without the result's, stands for all channels. Parameters of the head
    are loaded with the token's own arguments; what depends on them alone could be formed once a call.
    """

    canonical: Canonical
    token: tuple[Load | Map | RowSum, ...]  # a RowSum here adds up all channels of ("K",) or ("V",), which gives ()
    reads: tuple[Read, ...]  # each z once, however many readers share it
    values: tuple[
        Map, ...
    ]  # dims ("V",); a pseudo-value that is a read, or one of the token's values, is not among them
    decay: Value | None  # e^g, in [0, 1], with dims ("K",) or (); None: the state does not decay
    writes: tuple[Write, ...]  # S' = decay S + sum of x p^T, one a stream
    out: Value  # the token's output, ("V",)

    @property
    def ops(self) -> tuple[Op | Read, ...]:
        """All that makes values, in order."""
        return self.token + self.reads + self.values


def verify(form: StepForm) -> StepForm:
    """The form itself; KdagenError unless values are made once, before they are read, with dims as their place asks."""
    known: dict[str, Value] = {}
    for op in form.ops:
        _check(form, _operands(op), known, op.eq)
        if op.out.name in known or not set(op.out.dims) <= {"K", "V"} or len(op.out.dims) > 1:
            _fail(form, f"'{op.out.name}' {list(op.out.dims)}", "a new name, and dims (K), (V) or none")
        known[op.out.name] = op.out
    ends = [v for w in form.writes for v in (w.x, w.p)] + [form.out] + [form.decay] * (form.decay is not None)
    _check(form, ends, known, "the update")
    expected = [("K",), ("V",)] * len(form.writes) + [("V",)]
    if [v.dims for v in ends[: len(expected)]] != expected or (form.decay and form.decay.dims not in (("K",), ())):
        _fail(form, f"the update reads {[(v.name, v.dims) for v in ends]}", "x (K), p (V), output (V), decay (K) or ()")
    return form


def _operands(op) -> Iterable[Value]:
    return (op.z,) if isinstance(op, Read) else reads(op)


def _check(form: StepForm, operands: Iterable[Value], known: dict[str, Value], where: str) -> None:
    for v in operands:
        if known.get(v.name) != v:
            _fail(form, f"{where} reads '{v.name}'", "a value that is made before")


def _fail(form: StepForm, written: str, expected: str):
    raise KdagenError(f"step form of {form.canonical.name}: {written}: expected {expected}")


def show(form: StepForm) -> str:
    """The form as text, one line an op, with its equation beside it."""
    lines = [f"step {form.canonical.name}: S[K, V] -> S', {typed(form.out)}"]
    for section in ("token", "reads", "values"):
        lines += ["", f"{section}:"]
        for op in getattr(form, section):
            lines.append(line(typed(op.out), f"S^T {op.z.name}" if isinstance(op, Read) else right(op), op.eq))
    kept = f"{form.decay.name} S" if form.decay else "S"
    return "\n".join([*lines, "", f"S' = {' + '.join([kept, *(f'{w.x.name} {w.p.name}^T' for w in form.writes)])}", ""])


def interpret(form: StepForm, tensors: dict, initial_state=None):
    """Output [B, T, HV, V] and final state [B, HV, K, V] in float64, token by token: what a form means."""
    import torch

    arguments = form.canonical.arguments
    given = {a.name: tensors[a.name].double() for a in arguments}
    given = {a.name: given[a.name] if a.axis else given[a.name].unsqueeze(-1) for a in arguments}
    h = max(given[a.name].shape[-2] for a in arguments)
    given = {n: x.repeat_interleave(h // x.shape[-2], dim=-2) for n, x in given.items()}
    b, t = next(given[a.name].shape[:2] for a in arguments if a.per_token)
    k, v = (next((given[a.name].shape[-1] for a in arguments if a.axis == axis), 1) for axis in "KV")
    state = torch.zeros(b, h, k, v, dtype=torch.float64)
    state = state if initial_state is None else state + initial_state
    outputs = []
    for i in range(t):
        state, o = _step(form, {a: given[a.name][:, i] if a.per_token else given[a.name] for a in arguments}, state)
        outputs.append(o.expand(b, h, v))
    return torch.stack(outputs, 1), state


def _step(form: StepForm, token: dict, state):
    """New state and output; vectors are [B, H, channels or 1]."""
    from kdagen.ir.torch_expression import compiled

    env = {}
    for op in form.ops:
        match op:
            case Load():
                env[op.out] = token[op.argument]
            case Map():
                env[op.out] = compiled(op.expr)({v.symbol: env[v] for v, _ in op.operands})
            case RowSum():
                env[op.out] = env[op.a].expand(*state.shape[:2], _extent(op.a, state)).sum(-1, keepdim=True)
            case Read():
                z = env[op.z].expand(*state.shape[:2], state.shape[2])
                env[op.out] = (z.unsqueeze(-1) * state).sum(-2)
    new = state if form.decay is None else env[form.decay].unsqueeze(-1) * state
    for w in form.writes:
        new = new + env[w.x].unsqueeze(-1) * env[w.p].unsqueeze(-2)
    return new, env[form.out]


def _extent(value: Value, state) -> int:
    return state.shape[2 if value.dims == ("K",) else 3]
