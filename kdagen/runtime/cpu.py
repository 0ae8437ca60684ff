"""The CPU backend of an op: its tensor program run by the interpreter, with the choices that suit a CPU.

Each sequence of a ragged batch is run by itself, so that its bits are those that it has alone. States are [N, HV, K, V]
in the dtype of what is computed; in which layout and dtype an op takes them is for kdagen.runtime.call to see to. The
step of one token is cpu_decode's.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from kdagen.ir.tensor import Adjoint, Program

ROWS = 64  # of a chunk's solve: the fastest of 16, 32 and 64 at every length in benchmarks/cpu_op.py


def run(program: Program, tensors: dict, initial_state=None, out_dtype=None, ends=None, every: int = 0) -> tuple:
    """Output [B, T, HV, V] in `out_dtype` (that of what is computed unless given) and final state [N, HV, K, V].

    Half floats are computed in float32, which is then the state's dtype; float64 stays float64. `ends` are those of a
    ragged batch's sequences, 0 first. With `every`, also the states after so many tokens each, [B, T // every, ...].
    """
    return Forward(program, tensors, out_dtype, ends).run(initial_state, every)


def run_keeping(program: Program, tensors: dict, initial_state=None, out_dtype=None, ends=None) -> tuple:
    """As `run`, and the state before each chunk, [chunk, B, HV, K, V], for `backward`."""
    forward = Forward(program, tensors, out_dtype, ends)
    states = forward.new_states()
    return *forward.run(initial_state, states=states)[:2], states


class Forward:
    """One run of a program on the sequences of a batch."""

    def __init__(self, program: Program, tensors: dict, out_dtype=None, ends=None):
        self.program, self.tensors, self.out_dtype, self.ends = program, tensors, out_dtype, ends
        self.most = chunk_size(ROWS, len(program.canonical.solving))
        self.by_chunk: dict = {}
        self.any = self.interpreter(self.most)

    def interpreter(self, tokens: int):
        """An interpreter with the chunks that suit a sequence of so many tokens."""
        from kdagen.ir.tensor_interpret import Interpreter

        chunk = chunk_size(tokens, len(self.program.canonical.solving))
        if chunk not in self.by_chunk:
            self.by_chunk[chunk] = Interpreter(self.program, self.tensors, chunk, _dtype(self.tensors))
        return self.by_chunk[chunk]

    @property
    def sequences(self) -> list[tuple]:
        """Rows of the state, first token and end: all of a batch at once, or each of a ragged one."""
        return sequences(self.ends, self.any.size["T"])

    def new_states(self):
        """Where the state before each chunk is kept."""
        chunks = kept_chunks(self.any.size["T"], self.ends and len(self.ends) - 1, len(self.program.canonical.solving))
        return self.any.new(chunks, "B", "HV", "K", "V")

    def run(self, initial_state=None, every: int = 0, states=None, output: bool = True) -> tuple:
        """Output, final state and states after every so many tokens (None unless asked for)."""
        import torch

        with torch.no_grad():
            state = new_state(self.any, self.ends, initial_state)
            out = new_output(self.any, self.ends, self.out_dtype) if output else None
            after = self.any.new("B", self.any.size["T"] // every, "HV", "K", "V").zero_() if every else None
            chunk = 0
            for rows, start, end in self.sequences:
                if every:
                    self.pieces(state[rows], out, start, end, every, after)
                elif end > start:
                    run = self.interpreter(end - start)
                    run.scan(state[rows], out, None if states is None else states[chunk:], (start, end))
                    chunk += -(-(end - start) // run.chunk)
            return out, state, after

    def pieces(self, state, out, start: int, end: int, every: int, after) -> None:
        """A sequence in pieces of `every` tokens; the state after each whole one goes to its slot of `after`."""
        for first in range(start, end, every):
            last = min(end, first + every)
            self.interpreter(last - first).scan(state, out, None, (first, last))
            if last - first == every:
                after[:, start // every + (first - start) // every] = state


def adjoint_of(program: Program) -> Adjoint:
    """The backward of a program as `backward` runs it fastest: decayed operands and Gram matrices in one tree."""
    from kdagen.derive.adjoint import adjoint
    from kdagen.ir.tensor_values import carried

    return adjoint(program, carried(program.prepare))


def backward(adjoint: Adjoint, tensors: dict, initial_state, d_out, d_final_state, states=None, ends=None) -> tuple:
    """Gradients by argument name, in the argument's shape, and that of the initial state [N, HV, K, V].

    `d_out` [B, T, HV, V] and `d_final_state` [N, HV, K, V] may be None, which is zero. `states` are those of
    `run_keeping`; without them they are computed again. Gradients are in the dtype of the argument, those of
    parameters in that of what is computed.
    """
    import torch

    forward = Forward(replace(adjoint.forward, output=()), tensors, None, ends)
    with torch.no_grad():
        if states is None:
            states = forward.new_states()
            forward.run(initial_state, states=states, output=False)
        if d_out is None:
            d_out = forward.any.new(1).zero_().expand([forward.any.size[d] for d in ("B", "T", "HV", "V")])
        d_state = new_state(forward.any, ends, d_final_state)
        return _backward(adjoint, forward, d_state, d_out, states), d_state


def _backward(adjoint: Adjoint, forward: Forward, d_state, d_out, states) -> dict:
    """Gradients; replaces `d_state` by the cotangent of the initial state."""
    from kdagen.ir.adjoint_interpret import AdjointInterpreter

    by_chunk, chunk, dtype = {}, 0, _dtype(forward.tensors)
    first = AdjointInterpreter(adjoint, forward.tensors, forward.most, dtype)
    for rows, start, end in forward.sequences:
        if end > start:
            size = chunk_size(end - start, len(adjoint.forward.canonical.solving))
            if size not in by_chunk:
                by_chunk[size] = AdjointInterpreter(adjoint, forward.tensors, size, dtype, first.gradients)
            by_chunk[size].scan(d_state[rows], d_out, states[chunk:], (start, end))
            chunk += -(-(end - start) // size)
    return first.gradients


def sequences(ends: list[int] | None, tokens: int) -> list[tuple[slice, int, int]]:
    """Rows of the state, first token and end: all of a batch at once, or each of a ragged one."""
    if ends is None:
        return [(slice(None), 0, tokens)]
    return [(slice(n, n + 1), start, end) for n, (start, end) in enumerate(pairwise(ends))]


def new_state(like, ends: list[int] | None, given=None):
    """The state before the first token, or the cotangent of that after the last; zero unless given."""
    state = like.new("B" if ends is None else len(ends) - 1, "HV", "K", "V")
    return state.zero_() if given is None else state.copy_(given)


def new_output(like, ends: list[int] | None, dtype):
    """Where the output goes; zero where a ragged batch has no sequence."""
    out = like.arena.like.new_empty([like.size[d] for d in ("B", "T", "HV", "V")], dtype=dtype)
    return out if ends is None else out.zero_()


def _dtype(tensors: dict):
    """That of what is computed."""
    import torch

    return torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32


def chunk_size(tokens: int, solving: int) -> int:
    """A power of two: no more than the sequence fills, nor than gives ROWS rows for that many solving streams.

    From ROWS tokens on it does not depend on the length, so that neither do the bits of an output.
    """
    most, chunk = ROWS >> (max(solving, 1) - 1).bit_length(), 1
    while chunk < most and chunk < tokens:  # comparisons alone: torch's compiler asks for any number of tokens
        chunk *= 2
    return chunk


def kept_chunks(tokens: int, ragged: int | None, solving: int) -> int:
    """How many states `run_keeping` has room for; of a ragged batch of so many sequences, whatever their lengths."""
    chunk = chunk_size(ROWS if ragged is not None else tokens, solving)
    return -(-tokens // chunk) if ragged is None else tokens // chunk + ragged
