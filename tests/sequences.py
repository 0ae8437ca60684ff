"""Batches of sequences for tests of ops: grouped heads, ragged batches, and the oracle on each sequence."""

from __future__ import annotations

from itertools import accumulate

import torch

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.reference import recurrence_reference


def per_token(name: str) -> set[str]:
    """The arguments that have a token dimension."""
    return {a.name for a in canonical(kg.load(name)).arguments if a.per_token}


def inputs(name: str, shape, groups: int = 1, dtype=torch.float64, gate: str = "mild", seed: int = 0) -> dict:
    """Arguments for (B, T, HV, K, V), of which keys have HV // groups heads."""
    form = canonical(kg.load(name))
    drawn = kg.zoo.sample(form, shape, gate, seed)
    keys = {a.name for a in form.arguments if form.heads(a) == "H"}
    return {n: (x[:, :, ::groups] if n in keys else x).to(dtype).contiguous() for n, x in drawn.items()}


def cut(name: str, given: dict, start: int, end: int) -> dict:
    """The tokens start..end-1 of all sequences."""
    return {n: x[:, start:end] if n in per_token(name) else x for n, x in given.items()}


def one(name: str, given: dict, n: int) -> dict:
    """Sequence n of a batch."""
    return {m: x[n : n + 1] if m in per_token(name) else x for m, x in given.items()}


def ends_of(lengths, dtype=torch.int64):
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def reference(name: str, given: dict, state, lengths) -> tuple:
    """The oracle on each sequence of a ragged batch: its outputs behind each other, and final states."""
    ends, outs, finals = [0, *accumulate(lengths)], [], []
    for n, (start, end) in enumerate(zip(ends, ends[1:])):
        if start == end:
            finals.append(state[n : n + 1].double())
            continue
        o, final = recurrence_reference(kg.load(name), cut(name, given, start, end), state[n : n + 1])
        outs.append(o)
        finals.append(final)
    return torch.cat(outs, 1), torch.cat(finals)


def off(found, expected) -> float:
    """Relative error."""
    return float((found.double() - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))
