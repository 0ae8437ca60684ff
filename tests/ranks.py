"""Ranks for tests: real processes, a function on each; or one process, that runs the parts of ranks in turn."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kdagen.runtime.call import forward
from kdagen.runtime.exchange import times
from kdagen.runtime.rank_part import Part, Through
from kdagen.runtime.torch_op import NAMES


def on_ranks(function, count: int, *args) -> list:
    """What function(rank, *args) returns on each of so many ranks of a gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_one, (function, count, folder, args), count)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _one(rank: int, function, count: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count, timeout=wait)
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


class InTurn:
    """Ranks that run one after another: from the first in the forward, from the last in the backward."""

    def __init__(self, rank: int, size: int, passed: dict):
        self.rank, self.passed, self.first, self.last = rank, passed, rank == 0, rank == size - 1

    def before(self, state, transition, columns, reverse=False):
        came = self.passed.get(reverse)
        self.passed[reverse] = state if came is None else state + (0 if transition is None else times(transition, came))
        return came

    def from_last(self, state):
        return state

    def to_last(self, cotangent):
        return cotangent if self.last else None


def parts(op, tokens: tuple, given: dict, state):
    """Each rank's part of the whole, and its tensors."""
    per_token, passed, start = {a.name for a in op.form.arguments if a.per_token}, {}, 0
    for rank, count in enumerate(tokens):
        own = [x[:, start : start + count] if n in per_token else x for n, x in given.items()]
        call = forward(op.signature, op.state, NAMES[""], (*own, state, True), {})
        yield Part.of(op, InTurn(rank, len(tokens), passed), call), own
        start += count


def gradients(results: list, cotangents: list, leaves: list) -> list:
    found = torch.autograd.grad(results, leaves, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]


def over_ranks(op, tokens: tuple, given: dict, state, d_out, d_state) -> list:
    """Output, final state and gradients; the ranks' backward in one graph that runs from the last to the first."""
    leaves = [x.clone().requires_grad_() for x in given.values()]
    first, outs, finals = state.clone().requires_grad_(), [], []
    for part, own in parts(op, tokens, dict(zip(given, leaves)), state):
        o, final = Through.apply(part, None, first, *own)
        outs.append(o)
        finals.append(final)
    asked = [(o, d) for o, d in zip(outs, d_out.split(tokens, 1))] + [(finals[-1], d_state)]
    found = gradients([x for x, _ in asked], [d for _, d in asked], [*leaves, first])
    return [torch.cat(outs, 1).detach(), finals[-1].detach(), *found]
