"""Runs a tensor program on torch: what the program means, and the CPU backend of every op.

Prepare does all chunks of a span of tokens at once, scan and output go chunk by chunk. No loop runs over tokens. The
sequence is taken in spans of a few chunks, so that values stay in cache and memory does not grow with T. Each chunk is
computed alike, whatever follows it and however long T is. What an op does with tensors is in tensor_values.
"""

from __future__ import annotations

from kdagen.ir.tensor import Op, Program, reads
from kdagen.ir.tensor_values import Values

SPAN_ELEMENTS = 1 << 19  # of one K- or V-wide value of a span: a few values fill the cache that a core has


def interpret(program: Program, tensors: dict, initial_state=None, chunk_size: int = 32, dtype=None):
    """Output [B, T, HV, V] and final state [B, HV, K, V], in `dtype` (that of the first tensor unless given)."""
    run = Interpreter(program, tensors, chunk_size, dtype)
    out, state = run.new("B", "T", "HV", "V"), run.new("B", "HV", "K", "V").zero_()
    if initial_state is not None:
        state.copy_(initial_state)
    run.scan(state, out)
    return out, state


class Interpreter(Values):
    """One run of a program, on all tokens of its tensors or on some of them."""

    def __init__(self, program: Program, tensors: dict, chunk_size: int, dtype=None, wider: int = 1):
        super().__init__(program.canonical, tensors, chunk_size, dtype, wider)
        self.program = program
        self.steps, self.in_place = chunk_steps(program)
        self.expect(program.prepare, self.steps)

    def new_states(self, chunks: int | None = None):
        """Where `scan` keeps the state before each chunk, [chunk, B, HV, K, V]."""
        chunks = -(-self.size["T"] // self.chunk) if chunks is None else chunks
        return self.new(chunks, "B", "HV", "K", "V")

    def scan(self, state, out=None, states=None, tokens: tuple[int, int] | None = None) -> None:
        """Tokens from..to (all unless given), a span of chunks after another.

        `state` [B, HV, K, V] is replaced by the one after them, their output goes into `out` [B, T, HV, V], and the
        state before each chunk of theirs into `states`.
        """
        first, end = tokens or (0, self.size["T"])
        step = self.span_tokens(self.wider * SPAN_ELEMENTS)
        for start in range(first, end, step):
            self.begin(start, min(end, start + step))
            self.span(state.unsqueeze(0), out, None if states is None else states[(start - first) // self.chunk :])

    def span(self, state, out, states) -> None:
        """The tokens at hand: writes their output and states, and replaces the state by the one after them."""
        self.do(self.program.prepare)
        prepared = self.by_chunk(self.steps)
        self.targets = dict.fromkeys(self.in_place, state)
        for i in range(self.n):
            if states is not None:
                states[i] = state[0]
            self.env = prepared[i] | {self.program.state.name: state}
            self.do(self.steps)
            if out is not None:
                here = self.tokens(i)
                o = self.env[self.program.out.name][0].transpose(1, 2)
                out[:, here] = o[:, : here.stop - here.start]


def chunk_steps(program: Program) -> tuple[tuple[Op, ...], tuple[str, ...]]:
    """Scan and output of one chunk, the state's update last; and the values that may then take the state's place."""
    update = next(op for op in program.scan if op.out == program.next_state)
    rest = [op for op in program.scan if op != update] + list(program.output)
    kept = [op for op in program.scan if update.add == op.out and not any(op.out in reads(other) for other in rest)]
    ahead = tuple(op for op in rest if op not in kept)
    return (*ahead, *kept, update), (program.next_state.name, *(op.out.name for op in kept))
