"""What a recurrence asks of a layer: for each argument where it comes from, and what is done to it before the op.

Found from the recurrence's own canonical form, so that any recurrence can be a layer: keys and values are projected and
convolved, gates projected, parameters of the head learned. What the recurrence does itself (norms of keys, sigmoids,
softplus) is left to it; the rest is made part of it (kdagen.models.fused).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

# What the release calls the projections of two arguments; used of any recurrence, unless an argument has that name.
MODULES = {"g": "f", "beta": "b"}
TAKEN = ("g", "o")  # the output gate's, and the output's


@dataclass(frozen=True)
class Input:
    """An argument of the recurrence, and what a layer does to make it."""

    name: str
    module: str  # how the layer's parameters are called: `module`_proj and so on
    kind: str  # "vector" (a key or value), "channel" (a gate), "scalar" or "parameter" (of the head)
    axis: str  # "K", "V" or ""
    shape: str  # "raw": as projected; "unit": divided by its norm; "decay", "rate", "range": see fused.shaped
    lower: float | None = None
    upper: float | None = None
    logarithm: bool = True  # of a decay: whether the recurrence wants the log decay, or the factor
    own: tuple[str, str] | None = None  # of a decay a token: the layer's parameters behind it, its rate and bias


@cache
def inputs(recurrence) -> tuple[Input, ...]:
    """The inputs of a recurrence, in its order."""
    from kdagen.derive.canonical import canonical

    form = canonical(recurrence)
    names = {a.name for a in form.arguments}
    found = [_input(a, form, recurrence, names) for a in form.arguments]
    decays = [i for i in found if i.shape == "decay" and i.kind != "parameter"]
    return tuple(replace(i, own=_own(i, len(decays), names)) if i in decays else i for i in found)


def _own(i: Input, decays: int, names: set) -> tuple[str, str]:
    """A_log and dt_bias, with the argument's name if there are others."""
    plain = decays == 1 and not names & {"A_log", "dt_bias"}
    return ("A_log", "dt_bias") if plain else (f"{i.module}_A_log", f"{i.module}_dt_bias")


def _input(a, form, recurrence, names: set) -> Input:
    squashed = a.symbol not in _bare(form)
    annotated = recurrence.roles.get(a.name)
    gate = a.name in form.gates or squashed or (annotated is not None and annotated.name == "Channel")
    kind = (
        "parameter"
        if not a.per_token
        else "scalar"
        if not a.axis
        else "channel"
        if gate and a.axis == "K"
        else "vector"
    )
    logarithm = not _inside_logarithm(form.decay, a.symbol)
    return Input(
        a.name, _module(a.name, names), kind, a.axis, _shape(a, form, kind, squashed), a.lower, a.upper, logarithm
    )


def _module(name: str, names: set) -> str:
    found = MODULES.get(name, name)
    return f"in_{name}" if found in TAKEN or found in names - {name} else found


def _shape(a, form, kind: str, squashed: bool) -> str:
    if squashed:
        return "raw"
    if kind == "vector":
        return "unit" if a.axis == "K" and a.symbol not in _normalised(form) else "raw"
    if a.lower is not None and a.upper is not None:
        return "range"
    if a.symbol in form.decay.free_symbols and _may_grow(form):
        return "decay"
    return "raw" if kind == "parameter" or a.symbol in form.decay.free_symbols else "rate"


def _expressions(form) -> list:
    """All that a canonical form computes from its arguments."""
    readers = [s.reader for s in form.streams] + [form.output]
    explicit = [i for r in readers for i in r.intra if not isinstance(i, str)]
    return [form.decay, *(s.x for s in form.streams), *(e for r in readers for e in (r.y, r.z, r.scale)), *explicit]


def _bare(form) -> set:
    """The symbols that stand outside of sigmoids and softpluses somewhere."""
    import sympy

    from kdagen.ir.functions import sigmoid, softplus

    squashes = (sigmoid, softplus, sympy.tanh)
    found = set()
    for e in map(sympy.sympify, _expressions(form)):
        found |= e.replace(lambda x: isinstance(x, squashes), lambda x: sympy.S.One).free_symbols
    return found


def _normalised(form) -> set:
    """The symbols that are divided by their own norm wherever they stand."""
    import sympy

    from kdagen.ir.functions import ChannelSum

    found = set()
    for e in map(sympy.sympify, _expressions(form)):
        roots = [p for p in e.atoms(sympy.Pow) if p.exp == -sympy.S.Half and p.has(ChannelSum)]
        found |= {s for p in roots for c in p.atoms(ChannelSum) for s in c.free_symbols}
    return found


def _may_grow(form) -> bool:
    """Whether the log decay is above 0 for some values of its arguments, which a layer then has to keep off."""
    from kdagen.derive.bounds import interval

    return interval(form.decay, form.arguments)[1] > 0


def _inside_logarithm(expr, symbol) -> bool:
    import sympy

    return any(symbol in part.free_symbols for part in expr.atoms(sympy.log))


@cache
def recurrence_of(mixer: str, head_dim: int, gate: str, rate: int, lower_bound: float | None):
    """The recurrence of a config's choices, the same object each time.

    "kda" stands for KDA with the gate, rate and norms of the config, all inside the kernels; another recurrence gets
    what it has constants for: scale, lower_bound.
    """
    import kdagen

    scale = head_dim**-0.5
    if mixer == "kda":
        from kdagen.zoo.kda import variant

        return variant(gate=gate, rate=rate, normalise=True, scale=scale, lower_bound=lower_bound)
    found = kdagen.load(mixer)
    constants = {"scale": scale} | ({} if lower_bound is None else {"lower_bound": lower_bound})
    constants = {name: value for name, value in constants.items() if name in found.constants}
    return found.bind(**constants) if constants else found
