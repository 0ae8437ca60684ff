"""Calls of ops with bad input, drawn at random: an ArgumentError and nothing written, or the right answer.

A legal call is drawn, then corrupted once or twice. What is still legal is worked out from the oracle alone.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sequences import cut, inputs, one, per_token

import kdagen as kg
from kdagen.errors import ArgumentError
from kdagen.reference import recurrence_reference

NAMES = ("kda_softplus", "gla", "gated_deltanet", "deltaproduct")
MOST = (3, 6, 6, 5, 5)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@cache
def drawn(name: str, groups: int) -> dict:
    return inputs(name, MOST, groups)


@cache
def op_of(name: str, layout: str):
    return kg.compile(name, state_layout=layout)


def arguments(name: str, sizes: dict, dtype) -> dict:
    """A part of the tensors that were drawn once."""
    dims, found = op_of(name, "KV").signature.dims, {}
    for n, x in drawn(name, sizes["HV"] // sizes["H"]).items():
        part = tuple(slice(0, sizes[dim]) for dim in dims[n])
        found[n] = x[part].to(dtype).contiguous()
    return found


@st.composite
def legal(draw) -> dict:
    """A legal call: the recurrence, the layout of states, what is called, and its arguments and options by name."""
    name, layout = draw(st.sampled_from(NAMES)), draw(st.sampled_from(["KV", "VK"]))
    which = draw(st.sampled_from(["op", "recurrent", "decode", "decode"]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float32, torch.bfloat16]))
    ragged, h = draw(st.booleans()), draw(st.integers(1, 2))
    sizes = {"B": 1 if ragged else draw(st.integers(1, 3)), "T": draw(st.integers(0, 5)), "H": h}
    sizes |= {"HV": h * draw(st.integers(1, 3)), "K": draw(st.integers(1, 5)), "V": draw(st.integers(1, 5))}
    named = arguments(name, sizes, dtype)
    n = sizes["B"]
    if ragged:
        ends = sorted(draw(st.lists(st.integers(0, sizes["T"]), min_size=1, max_size=4)))
        named["cu_seqlens"] = torch.tensor([0, *ends], dtype=draw(st.sampled_from([torch.int32, torch.int64])))
        n = len(ends)
    dims = [sizes["HV"], *(sizes[d] for d in layout)]

    def state(slots: int):
        values = torch.linspace(-1, 1, slots * math.prod(dims))
        return values.view(slots, *dims).to(torch.promote_types(dtype, torch.float32))

    if which == "decode":
        named["state_pool"] = state(n + draw(st.integers(0, 3)) + (slots := draw(st.integers(0, 2))) * n)
        named["null_below"] = draw(st.integers(0, 2))
        if slots:
            indices = torch.randperm(len(named["state_pool"]), generator=torch.Generator().manual_seed(n))
            wide = slots == 2 and sizes["T"] <= 2
            named["state_indices"] = indices[: n * 2].view(n, 2) if wide else indices[:n]
            if wide and draw(st.booleans()):
                named["num_accepted_tokens"] = torch.tensor([1 + i % 2 for i in range(n)], dtype=torch.int32)
    else:
        named["output_final_state"] = draw(st.booleans())
        if draw(st.booleans()):
            named["initial_state"] = state(n)
        if which == "op" and draw(st.booleans()):
            named["states_every"] = draw(st.integers(1, 3))
    return {"name": name, "layout": layout, "which": which, "named": named}


# -- corruptions: each gives another value for an argument


def resized(x, pick: int):
    if pick % 5 == 4 or not x.dim():
        return x.unsqueeze(pick % (x.dim() + 1))
    axis = pick % x.dim()
    if pick % 5 == 3:
        return x.select(axis, 0) if x.shape[axis] else x
    size = max(0, x.shape[axis] + (1, -1, -x.shape[axis])[pick % 3])
    shape = [*x.shape[:axis], size, *x.shape[axis + 1 :]]
    return torch.zeros(shape, dtype=x.dtype)


def strided(x, pick: int):
    """The same numbers, otherwise in memory: legal, but of a pool."""
    if not x.dim() or not x.numel():
        return x
    axis = pick % x.dim()
    return x.movedim(axis, 0).contiguous().movedim(0, axis) if pick % 2 else torch.stack([x, x], -1)[..., 0]


def poisoned(x, pick: int):
    if not x.numel() or x.dtype == torch.bool:
        return x
    values = (math.nan, math.inf, -math.inf) if x.dtype.is_floating_point else (-3, -1, 0, 1, 2, 3, 5, 9, 1 << 30)
    changed = x.clone()
    place = torch.unravel_index(torch.tensor(pick % x.numel()), x.shape)  # of a tensor however it lies in memory
    changed[place] = values[pick % len(values)]
    return changed


CORRUPTIONS = {
    "resized": resized,
    "strided": strided,
    "poisoned": poisoned,
    "retyped": lambda x, pick: x.to(DTYPES[pick % len(DTYPES)]),
    "moved": lambda x, pick: x.to("meta"),
    "expanded": lambda x, pick: x[:1].expand(x.shape) if x.dim() and len(x) else x,
    "sparse": lambda x, pick: x.to_sparse(),
    "no tensor": lambda x, pick: (None, 0.5, [1, 2], "x")[pick % 4],
}
OPTIONS = {
    "null_below": (-1, 0, 1, 3, 99, 0.5, None, True),
    "states_every": (-1, 0, 1, 2, 99, 2.5, True),
    "output_final_state": (True, False),
    "check": (True, False),
    "scale": (1.0,),
}


@st.composite
def corrupted(draw) -> dict:
    call = draw(legal())
    named = dict(call["named"])
    for _ in range(draw(st.integers(1, 2))):
        tensors = sorted(n for n, x in named.items() if isinstance(x, torch.Tensor) and not x.is_sparse)
        if draw(st.integers(0, 9)) == 0:
            option = draw(st.sampled_from(sorted(OPTIONS)))
            named[option] = draw(st.sampled_from(OPTIONS[option]))
        elif tensors:
            which = draw(st.sampled_from(tensors))
            how = CORRUPTIONS[draw(st.sampled_from(sorted(CORRUPTIONS)))]
            if not named[which].is_meta:
                named[which] = how(named[which], draw(st.integers(0, 99)))
    return {**call, "named": named}


# -- what a call should give


def run(call: dict):
    op = op_of(call["name"], call["layout"])
    return (op if call["which"] == "op" else getattr(op, call["which"]))(**call["named"])


def bits(x) -> str:
    """What a tensor holds, NaN too."""
    return "" if x.is_meta or x.is_sparse else str(x.reshape(-1).tolist())


def snapshot(call: dict) -> dict:
    return {n: bits(x) for n, x in call["named"].items() if isinstance(x, torch.Tensor)}


def token_pieces(call: dict, x: dict) -> list:
    """For each sequence, its tokens, and where these stand."""
    name = call["name"]
    if (cu := call["named"].get("cu_seqlens")) is not None:
        return [(cut(name, x, a, b), (0, slice(a, b))) for a, b in zip(cu.tolist(), cu.tolist()[1:])]
    batch = x[next(iter(per_token(name)))].shape[0]
    return [(one(name, x, n), (n, slice(None))) for n in range(batch)]


def stepped(call: dict, tokens: dict, state) -> tuple:
    """The oracle's output and state of one sequence; of no tokens too."""
    if tokens[next(iter(per_token(call["name"])))].shape[1] == 0:
        return None, state
    return recurrence_reference(kg.load(call["name"]), tokens, state)


def check_sequences(call: dict, results) -> None:
    """Of op and recurrent."""
    named, name = call["named"], call["name"]
    turn = (lambda s: s) if call["layout"] == "KV" else (lambda s: s.mT)
    o, final, *states = results
    x, state, every = {n: named[n] for n in drawn(name, 1)}, named.get("initial_state"), named.get("states_every")
    assert (final is not None) == bool(named.get("output_final_state"))
    pieces = token_pieces(call, x)
    for n, (tokens, place) in enumerate(pieces):
        start = None if state is None else turn(state[n : n + 1])
        out, end = stepped(call, tokens, start)
        if out is not None:
            close(o[place], out[0])
        if final is not None:
            close(turn(final[n]), torch.zeros_like(turn(final[n])) if end is None else end[0])
        for i in range(0 if out is None or not states else out.shape[1] // every):
            slot = (
                (0, place[1].start // every + i)
                if "cu_seqlens" in named and named["cu_seqlens"] is not None
                else (n, i)
            )
            close(turn(states[0][slot]), stepped(call, cut(name, tokens, 0, (i + 1) * every), start)[1][0])


def check_decoding(call: dict, o, before) -> None:
    named, name, pool = call["named"], call["name"], call["named"]["state_pool"]
    turn = (lambda s: s) if call["layout"] == "KV" else (lambda s: s.mT)
    pieces, expected = token_pieces(call, {n: named[n] for n in drawn(name, 1)}), before.clone()
    indices, accepted = named.get("state_indices"), named.get("num_accepted_tokens")
    rows = [[n] for n in range(len(pieces))] if indices is None else indices.reshape(len(pieces), -1).tolist()
    null = max(named.get("null_below", 0), 0)
    for n, (tokens, place) in enumerate(pieces):
        column = 0 if accepted is None else int(accepted[n]) - 1
        if not any(i >= null for i in rows[n]) or rows[n][column] < null:
            assert not o[place].any()
            continue
        state = turn(before[rows[n][column]]).unsqueeze(0)
        count = tokens[next(iter(per_token(name)))].shape[1]
        for t in range(count):
            out, state = stepped(call, cut(name, tokens, t, t + 1), state)
            close(o[place][t], out[0, 0])
            slot = rows[n][0] if len(rows[n]) == 1 else rows[n][t]
            if slot >= null and (len(rows[n]) > 1 or t == count - 1):
                expected[slot] = turn(state[0]).to(pool.dtype)
    close(pool, expected.double())


def close(found, right) -> None:
    tolerance = TOLERANCE[found.dtype]
    assert found.shape == right.shape and not (found.is_meta and found.numel())
    assert torch.allclose(found.double(), right.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def check(call: dict, results, before) -> None:
    if call["which"] == "decode":
        check_decoding(call, results, before)
    else:
        check_sequences(call, results)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(legal())
def test_legal_calls_give_the_right_answer(call):
    pool = call["named"].get("state_pool")
    before = None if pool is None else pool.clone()
    check(call, run(call), before)


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(corrupted())
def test_bad_input_gives_a_clear_error_and_nothing_written_or_the_right_answer(call):
    before = snapshot(call)
    pool = call["named"].get("state_pool")
    kept = pool.clone() if isinstance(pool, torch.Tensor) and not pool.is_meta and not pool.is_sparse else None
    try:
        results = run(call)
    except ArgumentError as error:
        assert snapshot(call) == before
        assert str(error) and str(error)[0].islower()
        return
    check(call, results, kept)


def test_what_is_corrupted_would_be_found():
    """The oracle tells a wrong answer from a right one."""
    call = {
        "name": "gla",
        "layout": "KV",
        "which": "op",
        "named": arguments("gla", dict(zip(("B", "T", "H", "HV", "K", "V"), (1, 3, 1, 2, 4, 4))), torch.float64),
    }
    o, final = run(call)
    check(call, (o, final), None)
    with pytest.raises(AssertionError):
        check(call, (o + 1, final), None)
