"""The CPU backend of an op: its tensor program run by the interpreter, with the choices that suit a CPU.

Sequences of one length that follow each other are run together where each has the bits that it has alone. States are
[N, HV, K, V] in the dtype of what is computed; in which layout and dtype an op takes them is for kdagen.runtime.call to
see to. The step of one token is cpu_decode's.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, pairwise
from typing import NamedTuple

from kdagen.errors import ArgumentError
from kdagen.ir.tensor import Adjoint, Program
from kdagen.ir.tensor_values import sizes
from kdagen.runtime.cpu_schedule import at_most
from kdagen.schedule import CpuSchedule

ALIGNED = 16  # channels
ROWS = CpuSchedule().rows  # unless a schedule says otherwise


def run(
    program: Program, tensors: dict, initial_state=None, out_dtype=None, ends=None, every: int = 0,
    schedule: CpuSchedule | None = None,
) -> tuple:  # fmt: skip
    """Output [B, T, HV, V] in `out_dtype` (that of what is computed unless given) and final state [N, HV, K, V].

    Half floats are computed in float32, which is then the state's dtype; float64 stays float64. `ends` are those of a
    ragged batch's sequences, 0 first. The third result, None without `every`, holds the states after so many tokens
    each, [B, T // every, ...].
    """
    forward = Forward(program, tensors, ends, schedule)
    with at_most(forward.threads):
        return forward.run(initial_state, out_dtype, every)


def run_keeping(
    program: Program, tensors: dict, initial_state=None, out_dtype=None, ends=None, schedule: CpuSchedule | None = None
) -> tuple:
    """Output, final state, and the state before each chunk, [chunk, 1, HV, K, V], for `backward` by this schedule."""
    forward = Forward(program, tensors, ends, schedule)
    states = forward.new_states()
    with at_most(forward.threads):
        return *forward.run(initial_state, out_dtype, states=states)[:2], states


class Group(NamedTuple):
    """Sequences of one length that follow each other: the first's number and first token, how many, how long each."""

    first: int
    start: int
    count: int
    length: int

    @property
    def numbers(self) -> slice:
        return slice(self.first, self.first + self.count)

    def of(self, x):
        """Their part of what there is of each token, [T, ...], as [count, length, ...]."""
        return x[self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))


class Sequences:
    """The tensors of a batch with all tokens in a row, and the interpreters that suit its sequences."""

    def __init__(self, program: Program, tensors: dict, ends=None, schedule: CpuSchedule | None = None):
        chosen = schedule or CpuSchedule(rows=ROWS)
        self.rows, self.wider, self.threads = chosen.rows, chosen.span, chosen.threads
        self.program, self.given, self.ragged = program, tensors, ends is not None
        self.per_token = {a.name for a in program.canonical.arguments if a.per_token}
        self.b, self.t = next(tensors[name].shape[:2] for name in self.per_token)
        self.tensors = {n: x.flatten(0, 1) if n in self.per_token else x for n, x in tensors.items()}
        self.ends = [n * self.t for n in range(self.b + 1)] if ends is None else ends
        self.solving = len(program.canonical.solving)
        self.by_chunk: dict = {}

    @property
    def together(self) -> bool:
        """Whether a sequence has the same bits among others as alone.

        Torch's products of matrices depend on whether there is one or several, and on whether rows of one are aligned;
        no function in kdagen.ir.torch_expression depends on an element's place.
        """
        size = sizes(self.program.canonical, self.given)
        return size["HV"] > 1 and size["K"] % ALIGNED == size["V"] % ALIGNED == 0

    @property
    def groups(self) -> list[Group]:
        """The sequences with tokens."""
        lengths = [end - start for start, end in pairwise(self.ends)]
        found, first = [], 0
        for _, same in groupby(range(len(lengths)), (lambda n: lengths[n]) if self.together else None):
            count, length = len(list(same)), lengths[first]
            if length:
                found.append(Group(first, self.ends[first], count, length))
            first += count
        return found

    def of(self, group: Group, tensors: dict) -> dict:
        """A group's part of tensors."""
        return {n: group.of(x) if n in self.per_token else x for n, x in tensors.items()}

    def suited(self, tokens: int, group: Group | None = None):
        """The interpreter with the chunks that suit so many tokens, of a group or of all."""
        chunk = chunk_size(tokens, self.solving, self.rows)
        given = self.given if group is None else self.of(group, self.tensors)
        if chunk not in self.by_chunk:
            self.by_chunk[chunk] = self.make(given, chunk)
        self.by_chunk[chunk].turn_to(given)
        return self.by_chunk[chunk]

    def make(self, tensors: dict, chunk: int):
        from kdagen.ir.tensor_interpret import Interpreter

        return Interpreter(self.program, tensors, chunk, computed_in(tensors), self.wider)

    def new(self, *dims, dtype=None):
        """A tensor in the dtype of what is computed."""
        some = self.suited(self.rows)
        return some.arena.like.new_empty([some.size.get(dim, dim) for dim in dims], dtype=dtype)

    def kept(self, states, chunk: int, run, group: Group) -> tuple:
        """The states before the chunks of a group, the first of which has this number; and the next group's."""
        end = chunk + group.count * -(-group.length // run.chunk)
        return states[chunk:end].reshape(-1, group.count, *states.shape[2:]), end

    def new_state(self, given=None):
        """The state before the first token, or the cotangent of that after the last; zero unless given."""
        state = self.new(len(self.ends) - 1, "HV", "K", "V")
        return state.zero_() if given is None else state.copy_(given)

    @property
    def chunks(self) -> int:
        """Of which the state before each is kept."""
        return kept_chunks(self.b, self.t, len(self.ends) - 1 if self.ragged else None, self.solving, self.rows)

    def new_states(self):
        """Where the state before each chunk is kept."""
        states = self.new(self.chunks, 1, "HV", "K", "V")
        return states.zero_() if self.ragged else states  # for all lengths, and so for more chunks than there may be


class Forward(Sequences):
    """One run of a program on the sequences of a batch."""

    def run(self, initial_state=None, out_dtype=None, every: int = 0, states=None, output: bool = True) -> tuple:
        """Output, final state and states after every so many tokens (None unless asked for)."""
        import torch

        with torch.no_grad():
            state = self.new_state(initial_state)
            out = self.new(self.b * self.t, "HV", "V", dtype=out_dtype).zero_() if output else None
            after = self.new(self.b, self.t // every, "HV", "K", "V").zero_() if every else None
            chunk = 0
            for group in self.groups:
                run, here = self.suited(group.length, group), group.of(out) if output else None
                if every:
                    self.in_parts(state[group.numbers], here, group, every, after.flatten(0, 1))
                elif states is None:
                    run.scan(state[group.numbers], here)
                else:
                    kept, chunk = self.kept(states, chunk, run, group)
                    run.scan(state[group.numbers], here, kept)
            return out.view(self.b, self.t, *out.shape[1:]) if output else None, state, after

    def slot(self, n: int, every: int) -> int:
        """That of the first of a sequence's states after every so many tokens."""
        return self.ends[n] // every if self.ragged else n * (self.t // every)

    def in_parts(self, state, out, group: Group, every: int, after) -> None:
        """Sequences in parts of `every` tokens; the states after each whole one go to their slots of `after`."""
        slots = [self.slot(group.first + n, every) for n in range(group.count)]
        for i, first in enumerate(range(0, group.length, every)):
            last = min(group.length, first + every)
            self.suited(last - first, group).scan(state, out, None, (first, last))
            if last - first == every:
                after[[slot + i for slot in slots]] = state


def adjoint_of(program: Program) -> Adjoint:
    """The backward of a program as `backward` runs it fastest: decayed operands and Gram matrices in one tree."""
    from kdagen.derive.adjoint import adjoint
    from kdagen.ir.tensor_values import carried

    return adjoint(program, carried(program.prepare))


def backward(
    adjoint: Adjoint, tensors: dict, initial_state, d_out, d_final_state, states=None, ends=None,
    schedule: CpuSchedule | None = None,
) -> tuple:  # fmt: skip
    """Gradients by argument name, in the argument's shape, and that of the initial state [N, HV, K, V].

    `d_out` [B, T, HV, V] and `d_final_state` [N, HV, K, V] may be None, which is zero. `states` are those of
    `run_keeping` by the same schedule; without them they are computed again. Gradients are in the dtype of the
    argument, those of parameters in that of what is computed.
    """
    import torch

    run = Backward(adjoint, tensors, ends, schedule)
    with torch.no_grad(), at_most(run.threads):
        if states is None:
            forward = Forward(replace(adjoint.forward, output=()), tensors, ends, schedule)
            states = forward.new_states()
            forward.run(initial_state, states=states, output=False)
        return run.run(d_out, d_final_state, states)


class Backward(Sequences):
    """One run of an adjoint on the sequences of a batch."""

    def __init__(self, adjoint: Adjoint, tensors: dict, ends=None, schedule: CpuSchedule | None = None):
        super().__init__(adjoint.forward, tensors, ends, schedule)
        self.adjoint = adjoint

    def make(self, tensors: dict, chunk: int):
        from kdagen.ir.adjoint_interpret import AdjointInterpreter

        return AdjointInterpreter(self.adjoint, tensors, chunk, computed_in(tensors), self.wider)

    def run(self, d_out, d_final_state, states) -> tuple:
        """Gradients, and that of the initial state."""
        if len(states) != self.chunks:
            raise ArgumentError(
                f"{self.program.canonical.name}: the forward kept {len(states)} states, expected {self.chunks} with "
                f"rows = {self.rows}: run forward and backward by one CpuSchedule"
            )
        zero = self.new(1).zero_()
        d_out = zero.expand(1, 1, 1) if d_out is None else d_out.flatten(0, 1)
        d_out = d_out.expand(self.b * self.t, *self.new(0, "HV", "V").shape[1:])
        d_state, chunk = self.new_state(d_final_state), 0
        gradients = self.suited(self.rows).new_gradients()
        packed = {n: x.flatten(0, 1) if n in self.per_token else x for n, x in gradients.items()}
        for group in self.groups:
            run = self.suited(group.length, group)
            run.gradients = self.of(group, packed)
            kept, chunk = self.kept(states, chunk, run, group)
            run.scan(d_state[group.numbers], group.of(d_out), kept)
        return gradients, d_state


def computed_in(tensors: dict):
    """The dtype of what is computed."""
    import torch

    return torch.float64 if any(x.dtype == torch.float64 for x in tensors.values()) else torch.float32


def chunk_size(tokens: int, solving: int, rows: int | None = None) -> int:
    """A power of two: no more than the sequence fills, nor than gives `rows` rows for that many solving streams.

    From `rows` tokens on it does not depend on the length, so that neither do the bits of an output.
    """
    most, chunk = (rows or ROWS) >> (max(solving, 1) - 1).bit_length(), 1
    while chunk < most and chunk < tokens:  # comparisons alone: torch's compiler asks for any number of tokens
        chunk *= 2
    return chunk


def kept_chunks(batch: int, tokens: int, ragged: int | None, solving: int, rows: int | None = None) -> int:
    """How many states `run_keeping` has room for; of a ragged batch of so many sequences, whatever their lengths."""
    chunk = chunk_size((rows or ROWS) if ragged is not None else tokens, solving, rows)
    return batch * -(-tokens // chunk) if ragged is None else tokens // chunk + ragged
