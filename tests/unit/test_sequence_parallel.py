"""The op over real processes: outputs, states and gradients are those of one process, and of the float64 recurrence.

Which recurrences there are is for test_rank_part to go through, without processes.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import foreign
import pytest
import ranks
import torch
import torch.distributed as dist

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.reference import recurrence_reference
from kdagen.runtime.sequence_parallel import part_of

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}  # against one process
ROUNDED = 8e-3  # where states are rounded to bfloat16 at each rank's end
ORACLE = {torch.float64: 1e-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """A recurrence on (B, T, HV, K, V), its tokens split over ranks; `ends` of sequences behind each other."""

    name: str
    tokens: tuple[int, ...]  # of each rank
    shape: tuple[int, int, int, int] = (2, 2, 4, 3)  # B, HV, K, V
    groups: int = 1
    gate: str = "mild"
    dtype: torch.dtype = torch.float64
    ends: tuple[int, ...] | None = None
    layout: str = "KV"
    states: str = "float32"
    initial: bool = True
    everywhere: bool = True  # whether all ranks are given the initial state, which the first alone reads
    final: bool = True
    by_output: bool = True  # whether the loss asks for anything of outputs

    @property
    def recurrence(self):
        return foreign.CASES[self.name][0] if self.name in foreign.CASES else kg.load(self.name)

    @property
    def op(self):
        return kg.compile(self.recurrence, state_layout=self.layout, state_dtype=self.states)

    @property
    def form(self):
        return canonical(self.recurrence)

    @property
    def per_token(self) -> set:
        return {a.name for a in self.form.arguments if a.per_token}

    @property
    def cu_seqlens(self):
        return None if self.ends is None else torch.tensor(self.ends)

    def drawn(self) -> tuple:
        """Arguments, initial state, cotangents of output and final state, of the whole."""
        b, hv, k, v = self.shape
        t = sum(self.tokens)
        keys = {a.name for a in self.form.arguments if self.form.heads(a) == "H"}
        given = kg.zoo.sample(self.form, (b, t, hv, k, v), self.gate)
        given = {n: (x[:, :, :: self.groups] if n in keys else x).to(self.dtype) for n, x in given.items()}
        draw = torch.Generator().manual_seed(1)
        states = b if self.ends is None else len(self.ends) - 1
        dims = (k, v) if self.layout == "KV" else (v, k)
        full = torch.promote_types(self.dtype, torch.float32) if self.states == "float32" else torch.bfloat16
        state, d_state = (torch.randn(states, hv, *dims, generator=draw, dtype=torch.float64).to(full) for _ in "ab")
        d_out = torch.randn(b, t, hv, v, generator=draw, dtype=torch.float64).to(self.dtype)
        return given, state, d_out, d_state


CASES = {
    "kda": Case("kda", (9, 7, 5)),
    "kda over two ranks": Case("kda", (9, 7)),
    "kda through chunks": Case("kda", (40, 70, 33), (1, 2, 16, 16)),
    "kda in float32": Case("kda", (70, 100, 20), (2, 2, 16, 16), dtype=torch.float32),
    "kda in bfloat16": Case("kda", (30, 20, 30), (1, 2, 16, 16), dtype=torch.bfloat16),
    "kda of the release": Case("kda_softplus", (4, 9, 5), (1, 3, 4, 5)),
    "grouped heads": Case("kda", (4, 9, 5), (1, 4, 4, 5), groups=2),
    "resets": Case("kda", (9, 17, 6), gate="reset"),
    "states [V, K]": Case("kda", (5, 6, 3), layout="VK"),
    "states in bfloat16": Case("kda", (5, 6, 3), dtype=torch.float32, states="bfloat16"),
    "initial state on the first rank alone": Case("kda", (5, 6), everywhere=False),
    "no initial state": Case("gated_deltanet", (5, 6, 3), initial=False),
    "no final state": Case("gated_deltanet", (5, 6, 3), final=False),
    "final state alone": Case("gated_deltanet", (5, 6, 3), by_output=False),
    "no tokens": Case("kda", (0, 6, 0)),
    "no tokens within": Case("mamba2", (5, 0, 7)),
    "gated_deltanet": Case("gated_deltanet", (5, 9, 4)),
    "mamba2": Case("mamba2", (5, 9, 4)),
    "rwkv7": Case("rwkv7", (5, 9, 4)),
    "values in the rate": Case("write_by_distance", (5, 9, 4)),
    "ends within ranks": Case("kda", (9, 7, 8), (1, 2, 4, 3), ends=(0, 4, 13, 13, 24)),
    "one sequence through": Case("kda", (6, 7, 8), (1, 2, 4, 3), ends=(0, 2, 18, 21)),
    "begins with a rank": Case("gla", (6, 7, 8), (1, 2, 4, 3), ends=(0, 6, 13, 21)),
    "ragged, no tokens": Case("kda", (6, 0, 8), (1, 2, 4, 3), ends=(0, 3, 14)),
    "ragged, values in the rate": Case("write_by_distance", (6, 7, 4), (1, 2, 4, 3), ends=(0, 4, 9, 17)),
    "ragged, [V, K]": Case("rwkv7", (6, 7, 4), (1, 2, 4, 3), ends=(0, 4, 15, 17), layout="VK"),
}
"""What every rank runs."""


def split(case: Case, rank: int) -> tuple[int, int]:
    """The tokens of a rank."""
    return list(pairwise([0, *accumulate(case.tokens)]))[rank]


def run(op, given: dict, state, cu_seqlens, d_out, d_state) -> dict:
    """Results and gradients of a call, without those that are not asked for."""
    leaves = {n: x.clone().requires_grad_() for n, x in given.items()}
    first = None if state is None else state.clone().requires_grad_()
    options = {"initial_state": first, "output_final_state": d_state is not None, "cu_seqlens": cu_seqlens}
    o, final = op(**leaves, **options)
    pairs = [(x, d) for x, d in ((o, d_out), (final, d_state)) if d is not None]
    torch.autograd.backward([x for x, _ in pairs], [d for _, d in pairs])
    with torch.no_grad():
        plain, _ = op(**given, **{**options, "initial_state": state})
    found = {"o": o, "state": final, "inference": plain, "d_initial_state": first if first is None else first.grad}
    found |= {f"d_{n}": x.grad if x.grad is not None else torch.zeros_like(x) for n, x in leaves.items()}
    return {n: x.detach() for n, x in found.items() if x is not None}


def on_rank(rank: int, names: list[str]) -> dict:
    """Every case, by this rank's part of it."""
    two = dist.new_group([0, 1])
    found = {}
    for name in names:
        case = CASES[name]
        if rank >= len(case.tokens):
            continue
        start, end = split(case, rank)
        given, state, d_out, d_state = case.drawn()
        given = {n: x[:, start:end] if n in case.per_token else x for n, x in given.items()}
        cu_seqlens, d_out = case.cu_seqlens, d_out[:, start:end]
        if cu_seqlens is not None:
            cu_seqlens, mine = part_of(cu_seqlens, start, end)
            state = state[mine]
            d_state = d_state[mine]
            if rank + 1 < len(case.tokens):  # the last piece's state is not final: no loss asks for it
                d_state = torch.cat([d_state[:-1], torch.zeros_like(d_state[-1:])])
        elif rank:
            d_state = torch.zeros_like(d_state)  # each rank's loss counts: the final state's on one alone
            state = state if case.everywhere else None
        op = kg.sequence_parallel(case.op, two if len(case.tokens) == 2 else None)
        found[name] = run(op, given, *asked(case, state, cu_seqlens, d_out, d_state))
    return found


def asked(case: Case, state, cu_seqlens, d_out, d_state) -> tuple:
    """What a case gives and asks for."""
    return (
        state if case.initial else None,
        cu_seqlens,
        d_out if case.by_output else None,
        d_state if case.final else None,
    )


@pytest.fixture(scope="module")
def found():
    return ranks.on_ranks(on_rank, 3, list(CASES))


def joined(case: Case, parts: list[dict]) -> dict:
    """What the ranks found, put together."""
    whole = {}
    for name in parts[0]:
        xs = [part[name] for part in parts if name in part]
        if name in ("o", "inference") or name.removeprefix("d_") in case.per_token:
            whole[name] = torch.cat(xs, 1)
        elif case.ends is not None and name in ("state", "d_initial_state"):
            pieces = [part_of(case.cu_seqlens, *split(case, rank))[1] for rank in range(len(parts))]
            whole[name] = torch.stack([
                next(x[n - at.start] for x, at in ordered(xs, pieces, name) if at.start <= n < at.stop)
                for n in range(len(case.ends) - 1)
            ])  # fmt: skip
        elif name == "state":
            assert all(torch.equal(x, xs[0]) for x in xs)
            whole[name] = xs[0]
        else:
            whole[name] = sum(xs)  # parameters of the head, and initial states
    return whole


def ordered(xs: list, pieces: list, name: str) -> list:
    """Ranks from that which a sequence begins on, or for its final state from that which it ends on."""
    pairs = list(zip(xs, pieces))
    return pairs if name == "d_initial_state" else pairs[::-1]


def off(found, expected) -> float:
    """Relative error; of what is zero, the error."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / (expected.norm() if expected.norm() > 1e-30 else 1.0))


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name, found):
    case = CASES[name]
    mine = joined(case, [part[name] for part in found if name in part])
    given, state, d_out, d_state = case.drawn()
    whole = run(case.op, given, *asked(case, state, case.cu_seqlens, d_out, d_state))
    errors = {n: off(mine[n], x) for n, x in whole.items()}
    assert max(errors.values()) <= (TOLERANCE[case.dtype] if case.states == "float32" else ROUNDED), errors


@pytest.mark.parametrize(
    "name",
    [n for n, c in CASES.items() if c.ends is None and c.dtype in ORACLE and c.by_output and c.states == "float32"],
)
def test_equals_the_recurrence(name, found):
    case = CASES[name]
    mine = joined(case, [part[name] for part in found if name in part])
    given, state, d_out, d_state = case.drawn()
    turned = (lambda x: x) if case.layout == "KV" else (lambda x: x.mT)
    leaves = {n: x.double().requires_grad_() for n, x in given.items()}
    first = state.double().requires_grad_()
    o, final = recurrence_reference(case.recurrence, leaves, turned(first) if case.initial else None)
    pairs = [(o, d_out)] + ([(turned(final), d_state)] if case.final else [])
    torch.autograd.backward([x for x, _ in pairs], [d.double() for _, d in pairs])
    expected = {"o": o, "inference": o, **{f"d_{n}": x.grad for n, x in leaves.items()}}
    expected |= {"state": turned(final)} if case.final else {}
    expected |= {"d_initial_state": first.grad} if case.initial else {}
    errors = {n: off(mine[n], x.detach()) for n, x in expected.items()}
    assert max(errors.values()) <= ORACLE[case.dtype], errors
