"""Runs the adjoint of a tensor program on torch: the CPU backend of every backward.

Spans of tokens are taken from the last to the first. In a span what the forward made is made again for all chunks at
once, from the state before each; then the cotangent of the state goes through them, chunk after chunk from the last;
then the gradients of all chunks at once. What an op does with tensors is in tensor_values.
"""

from __future__ import annotations

from kdagen.ir.canonical import Argument
from kdagen.ir.tensor import Adjoint, Value, reads
from kdagen.ir.tensor_values import Values

SPAN_ELEMENTS = 1 << 19  # of one K- or V-wide value of a span


class AdjointInterpreter(Values):
    """One run of a backward."""

    keep_levels = True

    def __init__(self, adjoint: Adjoint, tensors: dict, chunk_size: int, dtype=None, wider: int = 1):
        super().__init__(adjoint.forward.canonical, tensors, chunk_size, dtype, wider)
        self.adjoint = adjoint
        self.expect((*adjoint.recompute, *adjoint.gradients), adjoint.reverse)
        read = {v for op in adjoint.gradients for v in reads(op)} | {v for _, v in adjoint.results}
        self.collected = [op.out for op in adjoint.reverse if op.out in read]  # kept for all chunks of a span
        self.one_chunk -= {v.name for v in self.collected}
        self.gradients = self.new_gradients()

    def new_gradients(self) -> dict:
        """Zeros for the gradient of each argument; those of parameters, which are added up, in full."""
        arguments = self.adjoint.forward.canonical.arguments
        given, full = self.tensors, self.arena.like
        return {a.name: (given[a.name] if a.per_token else full).new_zeros(given[a.name].shape) for a in arguments}

    def scan(self, d_state, d_out, states, tokens: tuple[int, int] | None = None) -> None:
        """Adds the gradients of tokens from..to (all unless given).

        `d_state` [B, HV, K, V], the cotangent of the state after them, is replaced by that of the state before them;
        `d_out` is [B, T, HV, V], and `states` hold the state before each chunk of theirs.
        """
        first, end = tokens or (0, self.size["T"])
        step = self.span_tokens(self.wider * SPAN_ELEMENTS)
        for start in reversed(range(first, end, step)):
            self.begin(start, min(end, start + step))
            self.span(states[(start - first) // self.chunk :][: self.n], d_state, d_out)

    def span(self, states, d_state, d_out) -> None:
        """The tokens at hand: writes their gradients, and replaces the state's cotangent by the one before them."""
        adjoint = self.adjoint
        d_out = self.chunked(d_out[:, self.start : self.end])
        contiguous = self.arena.take(adjoint.d_out.name, d_out.shape).copy_(d_out)
        self.env = {adjoint.forward.state.name: states, adjoint.d_out.name: contiguous}
        self.do(adjoint.recompute)
        self.reverse(d_state)
        self.do(adjoint.gradients)
        for argument, value in adjoint.results:
            if value is not None:
                self.give(argument, value)

    def reverse(self, d_state) -> None:
        """Chunks from the last: the cotangent of the state after each, and what the gradients read of each."""
        adjoint, env = self.adjoint, self.env
        d_states = self.arena.take(adjoint.d_next_state.name, (self.n + 1, *d_state.shape))
        d_states[self.n] = d_state
        prepared = self.by_chunk(adjoint.reverse)
        whole = {v.name: self.target(v) for v in self.collected} | {adjoint.d_state.name: d_states}
        for i in reversed(range(self.n)):
            self.targets = {name: x[i : i + 1] for name, x in whole.items()}
            self.env = prepared[i] | {adjoint.d_next_state.name: d_states[i + 1 : i + 2]}
            self.do(adjoint.reverse)
        d_state.copy_(d_states[0])
        self.targets = {}
        self.env = env | whole | {adjoint.d_next_state.name: d_states[1:]}

    def give(self, argument: Argument, value: Value) -> None:
        """Write a gradient, or add to a parameter's; that of a group of heads is the sum of theirs."""
        x = self.env[value.name]
        if not argument.per_token:
            self.gradients[argument.name] += x.sum((0, 1))
            return
        gradient = self.gradients[argument.name]
        for i in range(self.n):
            here = self.tokens(i)
            rows = grouped(x[i].transpose(1, 2), 2, gradient.shape[2])
            gradient[:, here] = rows[:, : here.stop - here.start]


def grouped(x, dim: int, heads: int):
    """Sums over consecutive heads so that `heads` are left."""
    return x if x.shape[dim] == heads else x.unflatten(dim, (heads, -1)).sum(dim + 1)
