"""The CPU backend of decoding: the step form of an op on states in place, by a native loop or a few torch ops a token.

The native loop is cpu_native's; this says which of the two runs, and holds the one on torch: what depends on arguments
alone is formed for all tokens at once, and all states are read, by one sum of rows for all readers, before the first is
written. Unlike cpu, nothing is chunked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property, lru_cache

from kdagen.ir.step import StepForm
from kdagen.runtime.cpu_native import Native
from kdagen.runtime.cpu_schedule import at_most, pinned_schedule
from kdagen.runtime.values import check_finite
from kdagen.schedule import CpuSchedule
from kdagen.state import StateType

NATIVE = "CPU backend, a native loop over states"  # what ran, in words
ON_TORCH = "CPU backend, one token after another on blocks of states"
_native: ContextVar[bool] = ContextVar("kdagen_native_decoding", default=True)

KINDS = 64  # of calls that are remembered
SHARED_BYTES = 1 << 20  # of states, which one thread updates in some 100 us: fewer are not worth waking another for
BLOCK_BYTES = 1 << 22  # of states that are updated at a time: what caches hold; the fastest in benchmarks/cpu_decode.py


class Step:
    """A step form made ready: its values by name, its expressions compiled."""

    def __init__(self, form: StepForm, state: StateType):
        from kdagen.ir.tensor import Load, Map

        self.form, self.native = form, Native(form, state)
        self.loads = [op for op in form.token if isinstance(op, Load)]
        rest = [op for op in form.token if not isinstance(op, Load)]
        self.made = [(op, self.ready(op) if isinstance(op, Map) else None) for op in rest]
        self.values = [(op.out.name, self.ready(op)) for op in form.values]

    @staticmethod
    def ready(op) -> Callable:
        """A Map as a function of the values by name."""
        from kdagen.ir.torch_expression import compiled

        run, operands = compiled(op.expr), [(v.symbol, v.name) for v, _ in op.operands]
        return lambda env: run({symbol: env[name] for symbol, name in operands})


class Alike:
    """Calls that give arguments and a pool alone: the next of the same sizes, strides and dtypes is not checked again.

    What a step of a model costs beside its arithmetic is checks, some 100 us of them (benchmarks/cpu_decode.py).
    """

    def __init__(self, op):
        self.op, self.known = op, {}

    def run(self, given: tuple):
        """The output, and states replaced; None, with nothing written, if such a call is new, or might be refused."""
        table = self.known.get(self.kind(given)) if as_usual() else None
        if table is None:
            return None
        *tensors, pool = given
        out = tensors[self.value].new_empty(table.out_shape)
        ordered = [tensors[i] for i in self.order]
        if not self.op.step.native.again(table, ordered, pool, out):
            return None
        self.op.note(out, NATIVE)
        return out

    def remember(self, given: tuple, table) -> None:
        """Calls like this one go by a table."""
        if len(self.known) >= KINDS:
            self.known.clear()
        if table is not None:
            self.known[self.kind(given)] = table

    @staticmethod
    def kind(given: tuple) -> tuple:
        """All that a table follows from."""
        import torch

        return torch.get_num_threads(), *[(x.shape, x.stride(), x.dtype) for x in given]

    @cached_property
    def value(self) -> int:
        """The place of the argument that the output is like."""
        return self.op.signature.tensors.index(self.op.signature.value)

    @cached_property
    def order(self) -> list[int]:
        """The places of the arguments that the native loop reads, in its order."""
        return [self.op.signature.tensors.index(name) for name in self.op.step.native.source.arguments]


@contextmanager
def on_torch() -> Iterator[None]:
    """Calls that this thread makes inside decode by torch's operations, as where no compiler is: to compare."""
    token = _native.set(False)
    try:
        yield
    finally:
        _native.reset(token)


def as_usual() -> bool:
    """Whether this thread's calls are neither pinned to a schedule nor to torch's operations."""
    return _native.get() and not pinned_schedule()


def run(step: Step, call, out, schedule: CpuSchedule | None = None, remember: Callable = lambda table: None) -> str:
    """Writes the output of a kdagen.runtime.decode.Decode into `out`, zero so far, and its new states into its pool.

    Says what ran. `remember` is given what calls that are alike can go by, a cpu_native.Table.
    """
    import torch

    if _native.get() and step.native.fits(call):
        remember(step.native.run(call, out, threads_of(schedule)))
        return NATIVE
    with torch.no_grad(), at_most(schedule.threads if schedule else 0):
        run_on_torch(step, call, out)
    return ON_TORCH


def threads_of(schedule: CpuSchedule | None) -> int:
    """As many as torch has, and the schedule allows."""
    import torch

    threads, most = torch.get_num_threads(), schedule.threads if schedule else 0
    return min(threads, most or threads)


def run_on_torch(step: Step, call, out) -> None:
    """The same by torch's operations."""
    tokens = Tokens(step, call)
    runs = [Run(tokens, call, group) for group in groups(call, tokens.rows)]
    found = [r.read(0) for r in runs]
    for r, reads in zip(runs, found, strict=True):
        if not math.isfinite(float(reads.sum())):
            r.check()  # what is not finite stays so in a product, even with zero; but finite ones may overflow
    for r, reads in zip(runs, found, strict=True):
        r.go(reads, out.view(-1, *out.shape[2:]))


@dataclass
class Group:
    """One sequence, or several of one token each that follow each other."""

    first: int  # row of its first token
    tokens: int  # of each sequence
    slots: list[int]
    columns: list[int]  # where the state goes after each token, -1 for nowhere; none: to its own slot, at the end


def groups(call, rows: list[range]) -> list[Group]:
    """The sequences that have a state and tokens."""
    found: list[Group] = []
    for mine, slot, columns in zip(rows, call.starts, call.slots, strict=True):
        if slot < 0 or not mine:
            continue
        last = found[-1] if found else None
        if last and len(mine) == last.tokens == call.columns == 1 and mine.start == last.first + len(last.slots):
            last.slots.append(slot)
        else:
            found.append(Group(mine.start, len(mine), [slot], columns if call.columns > 1 else []))
    return found


class Tokens:
    """What the step form makes of arguments alone, for all tokens: [tokens, HV, K, V or 1], parameters [1, HV, ...]."""

    def __init__(self, step: Step, call):
        import torch

        self.step, self.form, self.size = step, step.form, call.sizes
        self.dtype = torch.promote_types(call.like.dtype, torch.float32)
        self.env: dict = {op.out.name: self.loaded(op.argument, call.tensors) for op in step.loads}
        for op, ready in step.made:
            self.env[op.out.name] = ready(self.env) if ready else self.wide(op.a).sum(-1, keepdim=True)
        b, t = self.size["B"], self.size["T"]
        ends = [n * t for n in range(b + 1)] if call.ends is None else call.ends
        self.rows = [range(*pair) for pair in zip(ends, ends[1:])]
        self.z = torch.stack([self.wide(r.z).expand(b * t, -1, -1) for r in self.form.reads], 2)

    def loaded(self, argument, tensors: dict):
        x = tensors[argument.name]
        x = x.flatten(0, 1) if argument.per_token else x.unsqueeze(0)
        x = (x if argument.axis else x.unsqueeze(-1)).to(self.dtype)
        groups = self.size["HV"] // x.shape[1]
        return x if groups == 1 else x.repeat_interleave(groups, 1)

    def wide(self, value):
        """A value with all of its channels; one of numbers alone with all heads too."""
        return _wide(self.env[value.name], value, self.size)


class Run:
    """The states of a group, [slots, HV, K, V]: in the pool, or copies where these cannot be updated in place."""

    def __init__(self, tokens: Tokens, call, group: Group):
        self.form, self.size, self.t, self.call, self.group = tokens.form, tokens.size, tokens, call, group
        self.pool = call.inside(call.pool)
        self.in_place = self.pool.dtype == tokens.dtype and self.pool.is_contiguous() and not group.columns
        if self.in_place:
            self.states, self.slots = self.pool, tuple(group.slots)
        else:
            self.states, self.slots = (
                self.pool[group.slots].to(tokens.dtype).contiguous(),
                tuple(range(len(group.slots))),
            )

    def rows(self, token: int) -> slice:
        """Rows of each sequence's token of this number."""
        return slice(self.group.first + token, self.group.first + token + len(self.group.slots))

    def read(self, token: int):
        """S^T z for all readers, [sequences, HV, readers, V]."""
        return weighted_rows(self.states, self.slots, self.t.z[self.rows(token)])

    def check(self) -> None:
        """Refuses a state that is not finite."""
        for slot in self.group.slots:
            check_finite(self.call.signature.name, f"{self.call.pool_name}[{slot}]", self.call.pool[slot])

    def go(self, reads, out) -> None:
        """All tokens: writes their output and the states after them."""
        for token in range(self.group.tokens):
            rows = self.rows(token)
            env = self.values(rows, self.read(token) if token else reads)
            out[rows] = env[self.form.out.name]
            self.update(env)
            if self.group.columns and (slot := self.group.columns[token]) >= 0:
                self.pool[slot] = self.states[0]
        if not self.in_place and not self.group.columns:
            self.pool[self.group.slots] = self.states.to(self.pool.dtype)

    def values(self, rows: slice, reads) -> dict:
        """Values of one token, [sequences, HV, channels or 1]."""
        whole = rows.stop - rows.start == len(self.t.z)
        env = dict(self.t.env) if whole else {n: x if len(x) == 1 else x[rows] for n, x in self.t.env.items()}
        env |= {read.out.name: reads[:, :, i] for i, read in enumerate(self.form.reads)}
        for name, ready in self.t.step.values:
            env[name] = ready(env)
        return env

    def update(self, env: dict) -> None:
        """S' = decay S + sum of x p^T, a block of states after another."""
        decay = None if self.form.decay is None else self.of_all(env, self.form.decay).unsqueeze(-1)
        writes = [(self.of_all(env, w.x).unsqueeze(-1), self.of_all(env, w.p).unsqueeze(-2)) for w in self.form.writes]
        for mine, slots in blocks(self.slots, self.states[0].numel() * self.states.element_size()):
            state = self.states[slots]
            if decay is not None:
                state *= decay[mine]
            for x, p in writes:
                state.addcmul_(x[mine], p[mine])

    def of_all(self, env: dict, value):
        """[slots, HV, channels] of a value of one token."""
        return _wide(env[value.name], value, self.size).expand(len(self.slots), -1, -1)


def _wide(x, value, size: dict):
    return x.expand(*x.shape[:-2], size["HV"], size[value.dims[0]]) if value.dims else x


def blocks(slots: tuple[int, ...], size: int):
    """Sequences whose slots, of so many bytes, follow each other, as many as caches hold: these and their slots."""
    start = 0
    for i in range(1, len(slots) + 1):
        if i == len(slots) or slots[i] != slots[i - 1] + 1 or (i - start + 1) * size > BLOCK_BYTES:
            yield slice(start, i), slice(slots[start], slots[i - 1] + 1)
            start = i


def weighted_rows(states, slots: tuple[int, ...], z):
    """z @ states[slots], [slots, HV, readers, V], of `states` [any, HV, K, V] and z [slots, HV, readers, K].

    In float32 as weighted sums of a table's rows: torch does these at the speed of memory, and products of matrices of
    one or two rows at half of it.
    """
    import torch

    if states.dtype != torch.float32 or not z.numel():
        return torch.matmul(z, states[list(slots)])
    rows, ends = _bags(slots, *z.shape[1:])
    found = torch.embedding_bag(states.view(-1, states.shape[-1]), rows, ends, False, 0, False, z.reshape(-1))[0]
    return found.view(*z.shape[:3], -1)


@lru_cache(maxsize=16)
def _bags(slots: tuple[int, ...], heads: int, readers: int, k: int) -> tuple:
    """The rows of each bag, a reader of a head in a slot, and where bags begin."""
    import torch

    dtype = torch.int32 if (max(slots) + 1) * heads * readers * k < 1 << 31 else torch.int64
    first = torch.tensor(slots, dtype=dtype).view(-1, 1, 1, 1) * heads + torch.arange(heads, dtype=dtype).view(-1, 1, 1)
    rows = (first * k + torch.arange(k, dtype=dtype)).expand(-1, -1, readers, -1).reshape(-1)
    return rows, torch.arange(0, len(rows), k, dtype=dtype)
