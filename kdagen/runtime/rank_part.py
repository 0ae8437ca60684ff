"""One rank's part of sequences that are split over ranks: what it computes before, and after, states are exchanged.

What its tokens make of any state that comes before them is exact and linear, S_out = M S_in + E, and so is what their
outputs take from it, O = Q S_in + O_own. All ranks find M, E, Q and O_own at once, by the op itself, with an identity
in place of a state; what passes between them is in exchange. The backward is the same from right to left: of the state
before it a rank asks M^T dS_out + B, where B = Q^T dO. Only when dS_out has come does the op's own backward run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import sympy
import torch
import torch.nn.functional as F

from kdagen.ir.canonical import Intra
from kdagen.runtime.call import Call
from kdagen.runtime.checks import state_dtype
from kdagen.runtime.exchange import Exchange, times, transposed
from kdagen.runtime.op import Op

LARGE, LARGE_HALF = 2.0**20, 2.0**6  # of an identity beside values that cannot be silenced; in float16


class Through(torch.autograd.Function):
    """The op on a rank's tokens, behind those of the ranks before: its output, and the final state if it is wanted."""

    @staticmethod
    def forward(ctx, part: Part, cu_seqlens, initial_state, *tensors):
        o, state, *kept = part.forward(tensors, initial_state, cu_seqlens, any(ctx.needs_input_grad))
        ctx.part = part
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, cu_seqlens, *kept)
        return o, state

    @staticmethod
    def backward(ctx, d_out, d_state):
        gradients = (None, None, *ctx.part.backward(ctx.saved_tensors, d_out, d_state))
        return tuple(x if need else None for x, need in zip(gradients, ctx.needs_input_grad, strict=True))


@dataclass(frozen=True)
class Part:
    """A call on one rank's tokens, without its tensors. States are [N, HV, K, V] here, whatever the op's layout."""

    op: Op
    exchange: Exchange
    sizes: dict
    dtype: torch.dtype
    device: torch.device
    ragged: bool
    wants_state: bool
    check: bool

    @classmethod
    def of(cls, op: Op, exchange: Exchange, call: Call) -> Part:
        like, ragged = call.like, call.cu_seqlens is not None
        return cls(op, exchange, call.sizes, like.dtype, like.device, ragged, call.wants_state, call.check)

    @property
    def first(self) -> slice:
        """The sequences that come from the rank before: the first of a ragged batch, or all."""
        return slice(0, 1) if self.ragged else slice(None)

    @property
    def last(self) -> slice:
        """The sequences that go on."""
        return slice(-1, None) if self.ragged else slice(None)

    @property
    def on_cpu(self) -> bool:
        """Whether the op takes any number of value channels, and its backward finds by itself what was not kept."""
        return self.device.type == "cpu"

    @property
    def through(self) -> bool:
        """Whether what comes also goes on."""
        return not self.ragged or self.sizes["N"] == 1

    # -- forward

    def forward(self, tensors: tuple, initial, cu_seqlens, keeping: bool) -> tuple:
        """Output, final state (None unless wanted); then what the backward needs: the state before, M, Q, what is kept.

        On the first rank the op runs as it is. On others the states within are found again in the backward, by when the
        one before is known: what they keep is Q, of the size of q.
        """
        if self.exchange.first:
            given = *tensors, initial, True, cu_seqlens
            op = self.op.training_op if keeping else self.op.torch_op
            o, out, kept = op(*given, *(() if keeping else (0,)), self.check)
            self.exchange.before(self.inside(out)[self.last], None, self.columns)
            return o, self.final(out), initial, None, None, *(kept if keeping else ())
        own = self.without_first(initial)
        o, out, made, reads = self.linear(tensors, own, cu_seqlens)
        came = self.exchange.before(out[self.last], self.passed(made), self.columns)
        o = (o + (wide(reads).transpose(1, 2) @ came).transpose(1, 2)).to(o.dtype)
        out[self.first] += times(made, came)
        before = self.outside(self.with_first(own, came))
        return o.contiguous(), self.final(self.outside(out)), before, made, reads

    def final(self, out):
        """The state after the last rank's tokens; of a ragged batch those after this rank's."""
        if not self.wants_state:
            return None
        return out if self.ragged else self.exchange.from_last(out)

    def passed(self, made):
        """What the state that goes on is of the one that comes: nothing, where they are of two sequences."""
        return made if self.through else torch.zeros_like(made)

    def linear(self, tensors: tuple, own, cu_seqlens) -> tuple:
        """(O_own, E, M, Q). On the CPU by one run, with channels for an identity beside those of values."""
        if not (self.on_cpu and self.through and silenced(self.op)):
            return *self.run(tensors, own, cu_seqlens), *self.transition(tensors, cu_seqlens)
        k, v = self.sizes["K"], self.sizes["V"]
        wider = self.with_values(tensors, lambda x: F.pad(x, (0, k)))
        o, out = self.run(wider, F.pad(self.identity(), (v, 0)), cu_seqlens)
        return o[..., :v], out[..., :v], self.shortened(out[..., v:]), o[..., v:].contiguous()

    def transition(self, tensors: tuple, cu_seqlens) -> tuple:
        """(M, Q) of what comes: final state and output from an identity, of the op without values.

        Where values enter otherwise than by being written, they stay, and what they give alone is subtracted; the
        identity is large then, so that nothing is lost by that.
        """
        k, v, silent = self.sizes["K"], self.sizes["V"], silenced(self.op)
        width = k if silent and self.on_cpu else v
        ends, scale = cu_seqlens[:2] if self.ragged else None, 1.0
        if silent:
            tensors = self.with_values(tensors, lambda x: x.new_zeros(*x.shape[:-1], width))
        else:
            scale = LARGE_HALF if self.dtype == torch.float16 else LARGE
            alone = [wide(x) for x in self.run(tensors, None, ends)]
        found = []
        for columns in F.pad(scale * self.identity(), (0, -k % width)).split(width, -1):
            pair = self.run(tensors, columns, ends)
            found.append(pair if silent else [(wide(x) - y) / scale for x, y in zip(pair, alone)])
        reads, made = (torch.cat(x, -1)[..., :k] for x in zip(*found))
        return self.shortened(made), reads.to(self.dtype).contiguous()

    def run(self, tensors: tuple, state, cu_seqlens) -> tuple:
        """The op: its output, and the state after it."""
        o, after, _ = self.op.torch_op(*tensors, self.outside(state), True, cu_seqlens, 0, self.check)
        return o, self.inside(after)

    def with_values(self, tensors: tuple, change) -> tuple:
        """The tensors, those that have value channels changed."""
        return tuple(change(x) if dims[-1] == "V" else x for x, dims in zip(tensors, self.op.signature.dims.values()))

    # -- backward

    def backward(self, saved: tuple, d_out, d_state) -> tuple:
        """Gradients of the initial state and of the tensors; None where no rank behind this one asks for any."""
        count = len(self.op.signature.tensors)
        tensors, (cu_seqlens, before, made, reads, *kept) = saved[:count], saved[count:]
        with torch.no_grad():  # the gradients' own derivative is refused where they are made, by the op
            d_after = self.d_after(d_out, d_state, made, reads)
            if d_out is None and d_after is None:
                return (None,) * (count + 1)
            if not (self.exchange.first or self.on_cpu):
                *_, kept = self.op.training_op(*tensors, before, False, cu_seqlens, self.check)
        *gradients, d_before = self.op.backward_op(*tensors, before, cu_seqlens, kept, d_out, self.outside(d_after))
        return d_before if self.exchange.first else self.outside(self.without_first(d_before)), *gradients

    def d_after(self, d_out, d_state, made, reads):
        """What is asked of the states after this rank's tokens, by all ranks behind it too; None for nothing."""
        own = self.cotangent(d_state)
        passed = None if self.exchange.first else transposed(self.passed(made))
        came = self.exchange.before(self.asked(d_out, own, made, reads), passed, self.columns, reverse=True)
        if came is None:
            return own
        total = self.zeros(self.sizes["N"]) if own is None else own
        total[self.last] += came
        return total

    def cotangent(self, d_state):
        """Of the states after this rank's tokens, by what is asked of the final state; None for zero."""
        if not self.wants_state or (self.ragged and d_state is None):
            return None
        given = self.zeros(self.sizes["N"]) if d_state is None else self.inside(d_state).clone()
        return given if self.ragged else self.exchange.to_last(given)

    def asked(self, d_out, d_after, made, reads):
        """Of the state that comes, by this rank's outputs and its own final states."""
        total = self.zeros(self.incoming)
        if self.exchange.first:
            return total
        if d_out is not None:
            total += wide(reads).permute(0, 2, 3, 1) @ wide(d_out).transpose(1, 2)
        return total if d_after is None else total + times(transposed(made), d_after[self.first])

    # -- states

    @property
    def incoming(self) -> int:
        """How many sequences come from the rank before."""
        return 1 if self.ragged else self.sizes["B"]

    @property
    def columns(self) -> int:
        """Of M: one for its diagonal, where the recurrence only scales its state."""
        return self.sizes["K"] if couples(self.op) else 1

    def shortened(self, made):
        """M without what is zero in any case."""
        return made.contiguous() if couples(self.op) else made.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).contiguous()

    def zeros(self, count: int):
        """States in float32 at least."""
        dims = (self.sizes[dim] for dim in ("HV", "K", "V"))
        return torch.zeros(count, *dims, dtype=widened(self.dtype), device=self.device)

    def identity(self):
        """One for each head of the sequences that come, [N, HV, K, K]."""
        eye = torch.eye(self.sizes["K"], dtype=widened(self.dtype), device=self.device)
        return eye.expand(self.incoming, self.sizes["HV"], -1, -1)

    def without_first(self, state):
        """States of the op's, zero for the sequences that come from the rank before; None if nothing is left."""
        if state is None or not self.ragged:
            return None if state is None else torch.zeros_like(self.inside(state))
        found = self.inside(state).clone()
        found[self.first] = 0
        return found

    def with_first(self, own, came):
        """The same with the states that came."""
        found = self.zeros(self.sizes["N"]) if own is None else own.clone()
        found[self.first] = came
        return found

    def inside(self, state):
        """A state of the op's as [N, HV, K, V] in float32 at least."""
        return wide(state if self.op.state.layout == "KV" else state.mT)

    def outside(self, state):
        """The inverse; None for None."""
        if state is None:
            return None
        turned = state if self.op.state.layout == "KV" else state.mT
        return turned.to(state_dtype(self.dtype, self.op.state)).contiguous()


@cache
def silenced(op: Op) -> bool:
    """Whether values that are zero write nothing and leave all else as it is."""
    form = op.form
    values = {a.symbol: sympy.S.Zero for a in form.arguments if a.axis == "V"}
    readers = [*(s.reader for s in form.streams), form.output]
    others = [form.decay, *(s.x for s in form.streams), *(e for r in readers for e in (r.z, r.scale))]
    others += [i for r in readers for i in r.intra if not isinstance(i, Intra)]
    return all(sympy.sympify(r.y).xreplace(values) == 0 for r in readers) and not any(
        sympy.sympify(e).free_symbols & values.keys() for e in others
    )


@cache
def couples(op: Op) -> bool:
    """Whether a token mixes the rows of a state, rather than scale each."""
    return any(stream.reader.reads for stream in op.form.streams)


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def wide(x):
    """In float32 at least."""
    return x.to(widened(x.dtype))
