"""What a rank computes, of every recurrence, and how ranks compose it: without processes."""

from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import foreign
import pytest
import ranks
import torch

import kdagen as kg
from kdagen.reference import recurrence_reference
from kdagen.runtime.exchange import Exchange, times
from kdagen.runtime.rank_part import Part, couples, silenced

TOKENS = (5, 1, 6)  # of each rank
OWN = {n: recurrence for n, (recurrence, *_) in foreign.CASES.items()}
UNUSUAL = [
    "decay_after_write",
    "scalar_decay_after_write_output_before",
    "bonus",
    "two_writes",
    "delta_on_undecayed_state",
    "skip",
    "value_gate",
    "steps_with_decays_between",
    "output_of_old_and_new",
    "output_between_steps",
    "preconditioned_in_its_own_norm",
    "write_by_distance",
    "forget_then_write_elsewhere",
    "write_where_recalled",
    "several_queries",
    "transposed_decay",
    "named_like_cotangents",
]


def alone(op, given: dict, state, d_out, d_state) -> list:
    """The same in one call."""
    leaves, first = [x.clone().requires_grad_() for x in given.values()], state.clone().requires_grad_()
    o, final = op(**dict(zip(given, leaves)), initial_state=first, output_final_state=True)
    return [o.detach(), final.detach(), *ranks.gradients([o, final], [d_out, d_state], [*leaves, first])]


def drawn(op, k: int, v: int, gate: str = "mild") -> tuple:
    given = kg.zoo.sample(op.form, (2, sum(TOKENS), 2, k, v), gate)
    state, d_state = torch.randn(2, 2, 2, k, v, dtype=torch.float64)
    return given, state, torch.randn(2, sum(TOKENS), 2, v, dtype=torch.float64), d_state


def off(found, expected) -> float:
    return (
        float((found - expected).norm() / expected.norm().clamp_min(1e-30)) if expected.norm() else float(found.norm())
    )


@pytest.mark.parametrize("name", [*kg.zoo.names(), *UNUSUAL])
def test_every_recurrence(name):
    torch.manual_seed(0)
    op = kg.compile(OWN.get(name, name))
    given = drawn(op, 4, 3)
    for found, expected in zip(ranks.over_ranks(op, TOKENS, *given), alone(op, *given), strict=True):
        assert off(found, expected) <= 1e-12


@pytest.mark.parametrize("gate", ["extreme", "reset"])
@pytest.mark.parametrize("name", ["gla", "kda", "rwkv7", "mamba2"])
def test_strong_gates_and_resets(name, gate):
    torch.manual_seed(0)
    op = kg.compile(name)
    given = drawn(op, 4, 3, gate)
    for found, expected in zip(ranks.over_ranks(op, TOKENS, *given), alone(op, *given), strict=True):
        assert off(found, expected) <= 1e-12


@pytest.mark.parametrize("k, v", [(4, 4), (7, 3), (3, 7), (2, 1)])
@pytest.mark.parametrize("name", ["kda", "write_by_distance"])
def test_states_of_one_width_as_kernels_take_them(name, k, v, monkeypatch):
    torch.manual_seed(0)
    op = kg.compile(OWN.get(name, name))
    monkeypatch.setattr(Part, "on_cpu", False)
    given = drawn(op, k, v)
    for found, expected in zip(ranks.over_ranks(op, TOKENS, *given), alone(op, *given), strict=True):
        assert off(found, expected) <= 1e-12


def test_what_a_rank_makes_of_a_state_is_what_the_recurrence_makes_of_it():
    op, recurrence = kg.compile("kda"), kg.load("kda")
    given, state, *_ = drawn(op, 4, 3)
    (_, (part, own), _) = ranks.parts(op, TOKENS, given, state)
    o, out, made, reads = part.linear(tuple(own), None, None)
    expected, final = recurrence_reference(recurrence, dict(zip(given, own)), state)
    assert off(o + torch.einsum("bthk,bhkv->bthv", reads, state), expected) <= 1e-12
    assert off(out + made @ state, final) <= 1e-12


def test_large_values_in_float32_take_nothing_from_the_transition():
    """Where values cannot be silenced, what they give alone is subtracted."""
    op = kg.compile(OWN["write_by_distance"])
    assert not silenced(op) and silenced(kg.compile("kda"))
    given, state, *_ = drawn(op, 4, 3)
    given = {n: 100 * x if n in ("v", "target") else x for n, x in given.items()}

    def transition(tensors: dict):
        (_, (part, own), _) = ranks.parts(op, TOKENS, tensors, state.to(tensors["v"].dtype))
        return part.linear(tuple(own), None, None)[2].double()

    assert off(transition({n: x.float() for n, x in given.items()}), transition(given)) <= 2e-6


def test_a_diagonal_transition_is_sent_as_its_diagonal():
    for name, diagonal in (("gla", True), ("mamba2", True), ("hgrn2", True), ("kda", False), ("dplr", False)):
        op = kg.compile(name)
        given, state, *_ = drawn(op, 4, 3)
        (_, (part, own), _) = ranks.parts(op, TOKENS, given, state)
        assert part.linear(tuple(own), None, None)[2].shape == (2, 2, 4, 1 if diagonal else 4)
        assert couples(op) != diagonal


# -- the exchange, by a thread for each rank


class Threads(Exchange):
    """An exchange that passes tensors from thread to thread, and counts the numbers that it sent."""

    def __init__(self, rank: int, size: int, mail: dict):
        self.rank, self.size, self.mail, self.sent = rank, size, mail, 0

    def _swap(self, mine, to, theirs, source, reverse):
        place = lambda at: self.size - 1 - at if reverse else at  # noqa: E731
        if mine is not None:
            self.sent += mine[0].numel()
            self.mail[self.rank, place(to)].put(mine)
        if theirs is not None:
            came = self.mail[place(source), self.rank].get(timeout=10)
            assert came.shape == theirs.shape and came.is_contiguous()
            theirs.copy_(came)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9])
def test_ranks_are_composed_in_order(size, diagonal, reverse):
    torch.manual_seed(size)
    mail = {(a, b): Queue() for a in range(size) for b in range(size)}
    columns = 1 if diagonal else 3
    states, transitions = torch.randn(size, 1, 3, 2, dtype=torch.float64), torch.randn(size, 1, 3, columns).double()
    threads = [Threads(rank, size, mail) for rank in range(size)]
    last = size - 1 if reverse else 0  # that nothing comes to
    with ThreadPoolExecutor(size) as pool:
        run = lambda r: threads[r].before(states[r], None if r == last else transitions[r], columns, reverse)  # noqa: E731
        found = list(pool.map(run, range(size)))
    order = list(range(size))[:: -1 if reverse else 1]
    assert found[order[0]] is None
    expected = states[order[0]]
    for rank in order[1:]:
        assert off(found[rank], expected) <= 1e-12
        expected = times(transitions[rank], expected) + states[rank]
    rounds = (size - 1).bit_length()
    assert max(rank.sent for rank in threads) <= rounds * 3 * (2 + columns)
    assert threads[order[0]].sent == rounds * 3 * 2  # the state alone
