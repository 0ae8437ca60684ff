"""Ragged batches for executed programs, what each sequence gives by itself in float64, and the check of a forward."""

import itertools

import torch

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.reference import recurrence_reference
from kdagen.simulate.run import simulate
from kdagen.tolerance import TOLERANCE, reference_gradients, relative_error

LENGTHS = (5, 0, 33, 1, 17)


class Batch:
    """Sequences of the given lengths, `padding` tokens after the last; HV = `group` times `heads`."""

    def __init__(self, source, recurrence, lengths, padding=0, heads=1, group=1, gate="mild", seed=0):
        self.source, self.recurrence, self.form = source, recurrence, canonical(recurrence)
        self.ends = [0, *itertools.accumulate(lengths)]
        self.cu_seqlens = torch.tensor(self.ends, dtype=torch.int32)
        self.tokens, self.sequences, self.heads = self.ends[-1] + padding, len(lengths), heads * group
        self.k, self.v = source.dims["K"], source.dims["V"]
        dtypes = {p.name: getattr(torch, p.dtype) for kernel in source.kernels for p in kernel.params}
        drawn = zoo.sample(self.form, (1, self.tokens, self.heads, self.k, self.v), gate, seed)
        self.tensors = {
            a.name: self.grouped(a, drawn[a.name], group).to(dtypes[a.name]).contiguous() for a in self.form.arguments
        }
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.state, self.d_final = self.states(), self.states()
        d_out = torch.randn(1, self.tokens, self.heads, self.v, generator=self.generator)
        self.d_out = d_out.to(getattr(torch, source.dtype))
        self.per_token = {a.name for a in self.form.arguments if a.per_token}

    def grouped(self, argument, x, group):
        return x[:, :, ::group] if self.form.heads(argument) == "H" else x

    def states(self):
        drawn = 0.1 * torch.randn(self.sequences, self.heads, self.k, self.v, generator=self.generator)
        kind = self.source.state
        drawn = drawn if kind.layout == "KV" else drawn.mT
        return drawn.contiguous().to(getattr(torch, kind.dtype))

    def plain(self, states):
        """States as [.., K, V] in float64."""
        return (states if self.source.state.layout == "KV" else states.mT).double()

    @property
    def filled(self):
        """(index, rows) of the sequences that are not empty."""
        pairs = enumerate(itertools.pairwise(self.ends))
        return [(s, slice(a, b)) for s, (a, b) in pairs if b > a]

    def only(self, rows, tensors=None):
        """Those tokens of the arguments."""
        tensors = tensors or self.tensors
        return {name: x[:, rows] if name in self.per_token else x for name, x in tensors.items()}

    def expected(self):
        """(output, final state) in float64: zero where no sequence is, empty sequences pass their state on."""
        o = torch.zeros(1, self.tokens, self.heads, self.v, dtype=torch.float64)
        final = self.plain(self.state).clone()
        for s, rows in self.filled:
            o[:, rows], last = recurrence_reference(self.recurrence, self.only(rows), final[s : s + 1])
            final[s] = last[0]
        return o, final

    def states_after(self, every):
        """The state after every so many tokens of a sequence, by its slot."""
        found = {}
        for s, rows in self.filled:
            for i in range((rows.stop - rows.start) // every):
                first = self.only(slice(rows.start, rows.start + (i + 1) * every))
                state = recurrence_reference(self.recurrence, first, self.plain(self.state[s : s + 1]))[1]
                found[rows.start // every + i] = state[0]
        return found

    def gradients(self):
        """Gradient of each argument and of the initial state, in float64, added up over sequences."""
        total = {name: torch.zeros(x.shape, dtype=torch.float64) for name, x in self.tensors.items()}
        total["initial_state"] = self.plain(self.d_final).clone()
        state, d_final = self.plain(self.state), self.plain(self.d_final)
        for s, rows in self.filled:
            one = slice(s, s + 1)
            given = self.recurrence, self.only(rows), state[one], self.d_out[:, rows], d_final[one]
            for name, x in reference_gradients(*given)[2].items():
                where = total[name][one] if name == "initial_state" else total[name]
                if name == "initial_state":
                    where.copy_(x)
                elif name in self.per_token:
                    where[:, rows] += x
                else:
                    where += x
        return total


def check_forward(source, name, lengths=LENGTHS, padding=4, every=0, seeds=(), **choices):
    """Output, final states and states on the way; what is of no sequence is zero, to the bit."""
    batch = Batch(source, zoo.get(name), lengths, padding, **choices)
    given = {"cu_seqlens": batch.cu_seqlens, "states_every": every, "check_races": True}
    o, final, *states, statistics = simulate(
        source, batch.tensors, batch.state, **given, check_schedules=bool(seeds), seeds=seeds
    )
    expected, expected_final = batch.expected()
    tolerance = TOLERANCE[source.dtype]
    for s, rows in batch.filled:
        assert relative_error(o[:, rows], expected[:, rows]) < tolerance
        assert relative_error(batch.plain(final[s]), expected_final[s]) < tolerance
    empty = sorted(set(range(batch.sequences)) - {s for s, _ in batch.filled})
    assert torch.equal(final[empty], batch.state[empty])
    assert not o[:, batch.ends[-1] :].any()
    assert not any(s.writes_out_of_bounds for s in statistics.values())
    for kept in states:
        assert kept.shape == (batch.tokens // every, *batch.state.shape[1:]) and kept.dtype == batch.state.dtype
        after = batch.states_after(every)
        for slot, state in enumerate(batch.plain(kept)):
            assert relative_error(state, after[slot]) < tolerance if slot in after else not state.any()
