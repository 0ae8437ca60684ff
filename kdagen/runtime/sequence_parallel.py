"""Sequences split over processes: `sequence_parallel(op, group)` is called as the op is, each rank with its own tokens.

What is public of it, and what is checked; what a rank computes is in rank_part, what passes between ranks in exchange.
"""

from __future__ import annotations

import torch

from kdagen.errors import ArgumentError
from kdagen.runtime.call import Call, forward
from kdagen.runtime.checks import short
from kdagen.runtime.exchange import Exchange
from kdagen.runtime.op import Op
from kdagen.runtime.package import BuiltOp
from kdagen.runtime.rank_part import Part, Through
from kdagen.runtime.torch_op import NAMES
from kdagen.runtime.training import needs_gradient

OPTIONS = ("initial_state", "output_final_state", "cu_seqlens", "check")


def sequence_parallel(op, group=None) -> SequenceParallel:
    """The op over the ranks of a torch.distributed group, each of which holds consecutive tokens of every sequence.

        op = kdagen.sequence_parallel(kdagen.compile("kda"))
        o, state = op(q, k, v, g, beta, output_final_state=True)        # q, k ..: of this rank's tokens

    Args:
        op: what `kdagen.compile` returns, or an op of a built package.
        group: the ranks, in the order of their tokens; all ranks unless given.

    Raises:
        ArgumentError: something else was given, torch.distributed is not initialised, or this rank is not in the group.
    """
    return SequenceParallel(op, group)


class SequenceParallel:
    """An op whose sequences are split over ranks. All ranks of the group call it together, forward and backward.

    Arguments are those of the op. Ranks may hold different numbers of tokens, also none. `initial_state` is read on the
    first rank and ignored on others, so all may be given the same. `final_state` is that after the last rank's tokens,
    on every rank.

    With `cu_seqlens` each rank gives the ends of its own pieces: its first piece goes on from the last one of the rank
    before (which may go on from the rank before that), and has no tokens ([0, 0, ..]) where a sequence begins with the
    rank; `part_of` finds these ends. States are then each rank's own, one a piece: initial states of the pieces that
    begin here, and states after this rank's tokens, final for all but a last piece that goes on.

    Gradients are those of the sum of what all ranks call backward on; a rank whose outputs no loss needs takes part all
    the same, by (0 * o).sum().backward(). Gradients of arguments a token and of the initial state are whole. Those of
    parameters of the head are each rank's own contribution, to be summed over the group as in data parallelism.

    The first call compares what the ranks were given, and so does a call with `check=True`, which waits for a GPU.
    A state that passes is rounded to the op's state_dtype, as between calls of one process; sums are float32 at least.
    torch.compile is kept out by torch.compiler.disable around this.
    """

    def __init__(self, op, group=None):
        if not isinstance(op, (Op, BuiltOp)):
            raise ArgumentError(
                f"sequence_parallel was given a {type(op).__name__}, expected an op: kdagen.compile('kda'), or one of "
                f"a built package"
            )
        self.op: Op = op.load() if isinstance(op, BuiltOp) else op
        self.exchange = Exchange(self.op.name, group)
        self._compared = False

    def __call__(self, *args, initial_state=None, output_final_state: bool = False, cu_seqlens=None,
                 check: bool = False, **named):  # fmt: skip
        """(output [B, T, HV, V] of this rank's tokens, final state or None)."""
        call = said = error = None
        try:
            tensors = self._bound(args, named, initial_state=initial_state, cu_seqlens=cu_seqlens)
            options = initial_state, bool(output_final_state), cu_seqlens, 0, bool(check)
            call = self._checked(tensors, options)
            wants = needs_gradient(self.op.name, [*tensors, *(x for x in (initial_state,) if x is not None)])
            said = self._said(call, wants)
        except ArgumentError as refused:
            error = refused
        if check or not self._compared:
            self.exchange.compare(said, error)
            self._compared = True
        if error:
            raise error
        o, state = Through.apply(Part.of(self.op, self.exchange, call), cu_seqlens, initial_state, *tensors)
        return o, self.op.tagged(state) if output_final_state else None

    def _bound(self, args: tuple, named: dict, **options) -> list:
        """The op's tensors in order; what is not taken over ranks is refused."""
        if "states_every" in named:
            raise ArgumentError(
                f"{self.op.name}: states_every = {named['states_every']!r}, which is not taken over ranks, for each "
                f"would begin to count by itself: expected some of {', '.join(OPTIONS)}"
            )
        tensors = self.op.bound(args, named, OPTIONS)
        self.op.given_options(**options)
        return tensors

    def _checked(self, tensors: list, options: tuple) -> Call:
        """What this rank was given, checked as the op checks it."""
        call = forward(self.op.signature, self.op.state, NAMES[""], (*tensors, *options), {})
        if call.cu_seqlens is not None and call.sizes["N"] == 0:
            raise ArgumentError(
                f"{self.op.name}: cu_seqlens holds no piece, expected at least one on each rank: [0, 0] where the "
                f"sequence that goes on has no token"
            )
        if call.check or call.like.device.type == "cpu":
            with torch.no_grad():
                call.check_values()
        return call

    def _said(self, call: Call, wants_gradient: bool) -> dict:
        """What has to be the same on all ranks."""
        state = self.op.state
        return {
            "the recurrence": f"{self.op.name} ({self.op.signature.recurrence})",
            "the type of states": f"{state.layout} {state.dtype}",
            **{dim: call.sizes[dim] for dim in ("B", "H", "HV", "K", "V")},
            "dtype": short(call.like.dtype),
            "cu_seqlens": "None" if call.cu_seqlens is None else "given",
            "output_final_state": call.wants_state,
            "that a gradient is wanted": wants_gradient,
        }

    def __repr__(self) -> str:
        return f"<kdagen op {self.op.signature} over {self.exchange.size} ranks>"


def part_of(cu_seqlens, start: int, end: int) -> tuple:
    """Of a rank that holds tokens start..end-1 of the whole: the ends of its own pieces, and which sequences they are.

    The latter is a slice of the sequences of `cu_seqlens`, and so of their initial states. Empty sequences behind the
    last token are of no rank.
    """
    first, last = (max(int((cu_seqlens[:-1] < at).sum()) - 1, 0) for at in (start, end))
    return cu_seqlens[first : last + 2].clamp(start, end) - start, slice(first, last + 1)
