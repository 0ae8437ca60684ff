"""What the recurrence makes of a case, token by token in float64: results, and gradients by torch's autograd.

The oracle is the recurrence as it is written (kdagen.reference.recurrence_reference), where it is at hand: a task that
names file.py:name may be measured on a machine that has no such file. There it is the canonical form that the kernels'
manifest stores (canonical_reference), which sees all that is done after the derivation, but not the derivation itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from kdagen.autotune.cases import Case
from kdagen.autotune.sweep import Task

from kdagen.errors import RecurrenceError

PIECE = 64  # tokens whose states autograd keeps at once
SIZE = "size of "  # before a name: what its error is a part of, where that is not its own norm


@dataclass(frozen=True)
class Oracle:
    """A recurrence, or its canonical form, and what runs it."""

    task: Task
    canonical: object
    subject: object
    run: Callable  # (subject, tensors, initial state) -> (output, final state)

    @property
    def name(self) -> str:
        """Which of the two it is."""
        return "canonical form" if self.subject is self.canonical else "recurrence"

    @property
    def per_token(self) -> set[str]:
        """The arguments that have an entry for each token."""
        return {a.name for a in self.canonical.arguments if a.per_token}

    def plain(self, states):
        """States of the task's type as [.., K, V] in float64."""
        return (states if self.task.state.layout == "KV" else states.mT).double()

    def expected(self, case: Case) -> dict:
        """By name: out, final_state and, with cotangents, d_initial_state and d_<argument>; or out and state_pool.

        Padding is zero, and an empty sequence passes on its state. The gradient of a head's parameter is a sum over all
        tokens, in which terms cancel: its SIZE is that of the sum without signs, of pieces.
        """
        if case.state_pool is not None:
            return self._decoded(case)
        states = self._states(case, case.initial_state)
        if case.d_out is None and case.d_final_state is None:
            parts = [self._results(given, states[n]) for n, (given, _) in enumerate(self._sequences(case))]
        else:
            d_out, d_final = self._d_out(case), self._states(case, case.d_final_state)
            parts = [
                self._gradients(given, states[n], d_out[:, rows], d_final[n])
                for n, (given, rows) in enumerate(self._sequences(case))
            ]
        found = {name: self._joined(case, name, [part[name] for part in parts]) for name in parts[0]}
        if case.initial_state is None:
            found.pop("d_initial_state", None)
        return found

    def _sizes(self, case: Case) -> tuple[int, int]:
        """B and T."""
        return next(x.shape[:2] for n, x in case.arguments.items() if n in self.per_token)

    def _sequences(self, case: Case) -> list[tuple[dict, slice]]:
        """The arguments of each, [1, T, ..], and its tokens in the row of all of them."""
        batch, tokens = self._sizes(case)
        ends = [n * tokens for n in range(batch + 1)] if case.cu_seqlens is None else case.cu_seqlens.tolist()
        flat = {n: x.flatten(0, 1)[None] if n in self.per_token else x for n, x in case.arguments.items()}
        return [(self._cut(flat, slice(*pair)), slice(*pair)) for pair in pairwise(ends)]

    def _cut(self, arguments: dict, rows: slice) -> dict:
        return {n: x[:, rows] if n in self.per_token else x for n, x in arguments.items()}

    def _states(self, case: Case, given):
        """As the oracle has them, one a sequence [1, HV, K, V]; zero where none are given."""
        import torch

        shape = len(self._sequences(case)), case.value_heads, *self.task.head_dim
        states = torch.zeros(shape, dtype=torch.float64) if given is None else self.plain(given)
        return states.split(1)

    def _d_out(self, case: Case):
        """[1, tokens, HV, V]."""
        import torch

        shape = *self._sizes(case), case.value_heads, self.task.head_dim[1]
        given = torch.zeros(shape, dtype=torch.float64) if case.d_out is None else case.d_out.double()
        return given.flatten(0, 1)[None]

    def _results(self, given: dict, state) -> dict:
        """Of one sequence."""
        if not self._tokens(given):
            return {"out": state.new_zeros(1, 0, state.shape[1], state.shape[3]), "final_state": state}
        return dict(zip(("out", "final_state"), self.run(self.subject, given, state)))

    def _tokens(self, given: dict) -> int:
        return next(x.shape[1] for n, x in given.items() if n in self.per_token)

    def _gradients(self, given: dict, state, d_out, d_final) -> dict:
        """The same, and gradients, in pieces from the last to the first, so that autograd keeps few states."""
        import torch

        from kdagen.tolerance import reference_gradients

        pieces, states = [slice(i, i + PIECE) for i in range(0, self._tokens(given), PIECE)], [state]
        for rows in pieces:
            states.append(self._results(self._cut(given, rows), states[-1])["final_state"])
        outs, parts = [], []
        for rows, first in zip(reversed(pieces), reversed(states[:-1])):
            piece = self._cut(given, rows), first, d_out[:, rows], d_final
            with torch.enable_grad():
                out, _, gradients = reference_gradients(self.subject, *piece, self.run)
            d_final = gradients.pop("initial_state")
            outs, parts = [out, *outs], [gradients, *parts]
        parts = parts or [{n: torch.zeros(x.shape, dtype=torch.float64) for n, x in given.items()}]
        found = {f"d_{n}": self._summed(n, [p[n] for p in parts]) for n in given}
        found |= {f"{SIZE}d_{n}": sum(p[n].abs() for p in parts) for n in given.keys() - self.per_token}
        out = torch.cat(outs, 1) if outs else d_out.new_zeros(d_out.shape)
        return {"out": out, "final_state": states[-1], "d_initial_state": d_final, **found}

    def _summed(self, name: str, parts: list):
        """A gradient from those of pieces, or of sequences: behind each other a token, else added up."""
        import torch

        return torch.cat(parts, 1) if name in self.per_token else sum(parts[1:], parts[0])

    def _joined(self, case: Case, name: str, parts: list):
        """A result of the batch from those of its sequences."""
        import torch

        if name in ("final_state", "d_initial_state"):
            return torch.cat(parts)
        argument = name.removeprefix(SIZE).removeprefix("d_")
        if name != "out" and argument not in self.per_token:
            return self._summed(argument, parts)
        (batch, tokens), row = self._sizes(case), torch.cat(parts, 1)
        padding = row.new_zeros(1, batch * tokens - row.shape[1], *row.shape[2:])
        return torch.cat([row, padding], 1).view(batch, tokens, *row.shape[2:])

    def _decoded(self, case: Case) -> dict:
        """Outputs, and the pool afterwards: a sequence starts from the column of its last accepted token."""

        pool = self.plain(case.state_pool).clone()
        accepted = [1] * len(case.slots) if case.num_accepted_tokens is None else case.num_accepted_tokens.tolist()
        outs = []
        for (given, _), slots, count in zip(self._sequences(case), case.slots, accepted):
            if (first := slots[count - 1]) < 0:
                outs.append(pool.new_zeros(1, self._tokens(given), pool.shape[1], pool.shape[3]))
                continue
            state = pool[first : first + 1].clone()
            outs.append(self._results(given, state)["out"])
            for slot, tokens in self._stores(slots, self._tokens(given)):
                pool[slot] = self._results(self._cut(given, slice(0, tokens)), state)["final_state"][0]
        return {"out": self._joined(case, "out", outs), "state_pool": pool}

    def _stores(self, slots: list[int], tokens: int) -> list[tuple[int, int]]:
        """Slots that are written, and after how many tokens: the only one at the end, one of several after each."""
        if len(slots) == 1:
            return [(slots[0], tokens)]
        return [(slot, t + 1) for t, slot in enumerate(slots[:tokens]) if slot >= 0]


def oracle(task: Task, stored: dict | None) -> Oracle:
    """Of a task, whose kernels' manifest stores this canonical form, if there are kernels."""
    from kdagen.derive.canonical import canonical
    from kdagen.ir.canonical_json import from_json
    from kdagen.recurrence import load
    from kdagen.reference import canonical_reference, recurrence_reference

    form = from_json(stored) if stored else None
    try:
        recurrence = load(task.op)
    except RecurrenceError:
        if form is None:
            raise
        return Oracle(task, form, form, canonical_reference)
    return Oracle(task, form or canonical(recurrence), recurrence, recurrence_reference)
