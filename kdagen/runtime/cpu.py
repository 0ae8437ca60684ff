"""The CPU backend of an op: its tensor program run by the interpreter, with the choices that suit a CPU.

Each sequence is run by itself, whatever batch it is in: torch computes the last elements of a tensor in another way
than the rest, so a sequence has the bits that it has alone only in tensors of its own. States are [N, HV, K, V] in the
dtype of what is computed; in which layout and dtype an op takes them is for kdagen.runtime.call to see to. The step of
one token is cpu_decode's.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from kdagen.ir.tensor import Adjoint, Program

ROWS = 64  # of a chunk's solve: the fastest of 16, 32 and 64 at every length in benchmarks/cpu_op.py


def run(program: Program, tensors: dict, initial_state=None, out_dtype=None, ends=None, every: int = 0) -> tuple:
    """Output [B, T, HV, V] in `out_dtype` (that of what is computed unless given) and final state [N, HV, K, V].

    Half floats are computed in float32, which is then the state's dtype; float64 stays float64. `ends` are those of a
    ragged batch's sequences, 0 first. The third result, None without `every`, holds the states after so many tokens
    each, [B, T // every, ...].
    """
    return Forward(program, tensors, ends).run(initial_state, out_dtype, every)


def run_keeping(program: Program, tensors: dict, initial_state=None, out_dtype=None, ends=None) -> tuple:
    """Output, final state, and the state before each chunk, [chunk, 1, HV, K, V], for `backward`."""
    forward = Forward(program, tensors, ends)
    states = forward.new_states()
    return *forward.run(initial_state, out_dtype, states=states)[:2], states


class Sequences:
    """The tensors of a batch with all tokens in a row, and the interpreters that suit its sequences."""

    def __init__(self, program: Program, tensors: dict, ends=None):
        self.program, self.given, self.ragged = program, tensors, ends is not None
        tokens = {a.name for a in program.canonical.arguments if a.per_token}
        self.b, self.t = next(tensors[name].shape[:2] for name in tokens)
        self.tensors = {n: x.flatten(0, 1).unsqueeze(0) if n in tokens else x for n, x in tensors.items()}
        self.ends = [n * self.t for n in range(self.b + 1)] if ends is None else ends
        self.solving = len(program.canonical.solving)
        self.by_chunk: dict = {}

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """Number, first token and end of each sequence with tokens."""
        return [(n, start, end) for n, (start, end) in enumerate(pairwise(self.ends)) if end > start]

    def suited(self, tokens: int):
        """The interpreter with the chunks that suit so many tokens."""
        chunk = chunk_size(tokens, self.solving)
        if chunk not in self.by_chunk:
            self.by_chunk[chunk] = self.make(chunk)
        return self.by_chunk[chunk]

    def make(self, chunk: int):
        from kdagen.ir.tensor_interpret import Interpreter

        return Interpreter(self.program, self.tensors, chunk, computed_in(self.tensors))

    def new(self, *dims, dtype=None):
        """A tensor in the dtype of what is computed."""
        some = self.suited(ROWS)
        return some.arena.like.new_empty([some.size.get(dim, dim) for dim in dims], dtype=dtype)

    def new_state(self, given=None):
        """The state before the first token, or the cotangent of that after the last; zero unless given."""
        state = self.new(len(self.ends) - 1, "HV", "K", "V")
        return state.zero_() if given is None else state.copy_(given)

    def new_states(self):
        """Where the state before each chunk is kept."""
        chunks = kept_chunks(self.b, self.t, len(self.ends) - 1 if self.ragged else None, self.solving)
        return self.new(chunks, 1, "HV", "K", "V")


class Forward(Sequences):
    """One run of a program on the sequences of a batch."""

    def run(self, initial_state=None, out_dtype=None, every: int = 0, states=None, output: bool = True) -> tuple:
        """Output, final state and states after every so many tokens (None unless asked for)."""
        import torch

        with torch.no_grad():
            state = self.new_state(initial_state)
            out = self.new(1, self.b * self.t, "HV", "V", dtype=out_dtype).zero_() if output else None
            after = self.new(self.b, self.t // every, "HV", "K", "V").zero_() if every else None
            chunk = 0
            for n, start, end in self.pieces:
                if every:
                    self.in_parts(state[n : n + 1], out, start, end, every, after.flatten(0, 1)[self.slot(n, every) :])
                else:
                    run = self.suited(end - start)
                    run.scan(state[n : n + 1], out, None if states is None else states[chunk:], (start, end))
                    chunk += -(-(end - start) // run.chunk)
            return out.view(self.b, self.t, *out.shape[2:]) if output else None, state, after

    def slot(self, n: int, every: int) -> int:
        """That of the first of a sequence's states after every so many tokens."""
        return self.ends[n] // every if self.ragged else n * (self.t // every)

    def in_parts(self, state, out, start: int, end: int, every: int, after) -> None:
        """A sequence in parts of `every` tokens; the state after each whole one goes to `after`."""
        for i, first in enumerate(range(start, end, every)):
            last = min(end, first + every)
            self.suited(last - first).scan(state, out, None, (first, last))
            if last - first == every:
                after[i] = state[0]


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

    if states is None:
        forward = Forward(replace(adjoint.forward, output=()), tensors, ends)
        states = forward.new_states()
        forward.run(initial_state, states=states, output=False)
    with torch.no_grad():
        return Backward(adjoint, tensors, ends).run(d_out, d_final_state, states)


class Backward(Sequences):
    """One run of an adjoint on the sequences of a batch."""

    def __init__(self, adjoint: Adjoint, tensors: dict, ends=None):
        super().__init__(adjoint.forward, tensors, ends)
        self.adjoint, self.gradients = adjoint, None

    def make(self, chunk: int):
        from kdagen.ir.adjoint_interpret import AdjointInterpreter

        run = AdjointInterpreter(self.adjoint, self.tensors, chunk, computed_in(self.tensors), self.gradients)
        self.gradients = run.gradients
        return run

    def run(self, d_out, d_final_state, states) -> tuple:
        """Gradients, and that of the initial state."""
        zero = self.new(1).zero_()
        d_out = zero.expand(1, 1, 1, 1) if d_out is None else d_out.flatten(0, 1).unsqueeze(0)
        d_out = d_out.expand(1, self.b * self.t, *self.new(0, "HV", "V").shape[1:])
        d_state, chunk = self.new_state(d_final_state), 0
        for n, start, end in self.pieces:
            run = self.suited(end - start)
            run.scan(d_state[n : n + 1], d_out, states[chunk:], (start, end))
            chunk += -(-(end - start) // run.chunk)
        return {n: x.view(self.given[n].shape) for n, x in self.gradients.items()}, d_state


def computed_in(tensors: dict):
    """The dtype of what is computed."""
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


def kept_chunks(batch: int, tokens: int, ragged: int | None, solving: int) -> int:
    """How many states `run_keeping` has room for; of a ragged batch of so many sequences, whatever their lengths."""
    chunk = chunk_size(ROWS if ragged is not None else tokens, solving)
    return batch * -(-tokens // chunk) if ragged is None else tokens // chunk + ragged
