"""A recurrence with what a layer does before it made part of it: norms of keys, decays below 0, rates, ranges.

So kernels do it, in float32, on what was projected; no gate or normalised key is written to memory, and gradients flow
to the projections themselves. What there is to do is said by kdagen.models.roles.
"""

from __future__ import annotations

import inspect
from functools import cache

from kdagen.models.roles import Input, inputs


@cache
def fused(recurrence, rate: int = 1):
    """The recurrence on what a layer projects; the same object each time. `rate` is what rates are at most.

    Its arguments are those of the recurrence and, of each decay, a rate A_log and a bias dt_bias.
    """
    import kdagen

    found = {i.name: i for i in inputs(recurrence)}
    if all(i.shape == "raw" for i in found.values()):
        return recurrence
    groups = _groups(recurrence)

    def body(S, **given):
        take = lambda name, x: shaped(found[name], x, given, rate)  # noqa: E731
        made = {
            name: take(name, given[name]) if tensors == [name] else tuple(map(take, tensors, given[name]))
            for name, tensors in groups.items()
        }
        return recurrence.body(S, **made, **recurrence.constants)

    parameters = [inspect.Parameter("S", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for name, tensors in groups.items():
        role = _role(found[tensors[0]])
        parameters.append(_parameter(name, role if tensors == [name] else role[len(tensors)]))
    for i in found.values():
        if i.own:
            parameters.append(_parameter(i.own[0], kdagen.HeadParameter))
            parameters.append(_parameter(i.own[1], kdagen.ChannelParameter if i.axis else kdagen.HeadParameter))
    body.__signature__ = inspect.Signature(parameters)
    body.__doc__ = recurrence.doc
    return kdagen.recurrence(body, name=recurrence.name)


def shaped(i: Input, x, given: dict, rate: int):
    """What the recurrence takes, of what was projected."""
    import kdagen as kg

    if i.shape == "raw":
        return x
    if i.shape == "unit":
        return kg.l2norm(x)
    if i.shape == "rate":
        return kg.sigmoid(x) if rate == 1 else rate * kg.sigmoid(x)
    if i.shape == "range":
        return i.lower + (i.upper - i.lower) * kg.sigmoid(x)
    if i.own:
        A_log, dt_bias = (given[name] for name in i.own)
        g = -kg.exp(A_log) * kg.softplus(x + dt_bias)
    else:
        g = -kg.softplus(x)
    return g if i.logarithm else kg.exp(g)


def _groups(recurrence) -> dict[str, list[str]]:
    """The tensors of each parameter: kg.Key[2] stands for two."""
    from kdagen.runtime.signature import parameters

    return dict(parameters(recurrence))


def _role(i: Input):
    import kdagen

    if i.kind == "parameter":
        return {"": kdagen.HeadParameter, "K": kdagen.ChannelParameter, "V": kdagen.ValueParameter}[i.axis]
    if i.kind == "channel":
        return kdagen.Channel
    return {"": kdagen.Scalar, "K": kdagen.Key, "V": kdagen.Value}[i.axis]


def _parameter(name: str, role) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=role)
