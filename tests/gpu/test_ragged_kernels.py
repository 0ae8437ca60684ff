"""Ragged batches on a GPU: sequences of any lengths, one behind the other, and states on the way.

What a sequence gives must not depend on its company, down to the bit, so sequences alone (test_kernels) say what is
right; some batches are also compared with the recurrence in float64.
"""

import pytest
import torch
from built_ops import (
    DEVICE,
    Guarded,
    draw,
    draw_cotangents,
    errors,
    launch,
    same_bits,
    sequences,
    tolerance,
    train,
    trained,
    variants,
)

from kdagen import zoo

pytestmark = pytest.mark.gpu
LENGTHS = {
    "of requests": [1300, 547, 2048, 963, 271, 3063],
    "equal": [1024] * 8,
    "short and empty": [0, 1, 0, 33, 16, 1, 0, 15, 64],
}
NAMES = ("kda", "kda_softplus", "gated_deltanet", "linear_attention")
HEADS, GROUP, PADDING = 4, 2, 5
MANY = 70_000  # sequences: more than a grid's short axes take
BAD_ENDS = ([0, 70, 30, 75], [9, 4, 10**6, -4], [-5, -1, 2**31 - 1, 0], [75, 75, 75, 75], [0, 0, 2**31 - 1, 2**31 - 1])


def ends_of(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def batch(kernels, lengths: list[int], gate: str = "mild", padding: int = PADDING) -> tuple[dict, torch.Tensor, list]:
    """Arguments, initial states and ends of sequences of these lengths."""
    ends = ends_of(lengths)
    tensors, _ = draw(kernels, (1, ends[-1] + padding, HEADS), gate, group=GROUP)
    _, state = draw(kernels, (len(lengths), 1, HEADS))
    return tensors, state, ends


def with_ends(tensors: dict, ends: list[int], dtype=torch.int32) -> dict:
    return {**tensors, "cu_seqlens": torch.tensor(ends, dtype=dtype)}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_against_the_recurrence(name, lengths):
    for kernels in variants(name):
        tensors, state, ends = batch(kernels, LENGTHS[lengths])
        found = launch(kernels, with_ends(tensors, ends), state)
        wrong = errors(name, kernels, found, tensors, state, ends)
        assert all(w <= tolerance(kernels) for w in wrong), f"{kernels.folder}: output, state off by {wrong}"
        assert not found[0][:, ends[-1] :].any()  # padding


@pytest.mark.parametrize("gate", ["mild", "reset"])
@pytest.mark.parametrize("name", zoo.names())
def test_a_sequence_alone_is_the_same(name, gate):
    for kernels in variants(name):
        tensors, state, ends = batch(kernels, LENGTHS["short and empty"], gate)
        out, final = launch(kernels, with_ends(tensors, ends, torch.int64), state)
        for s, one in enumerate(sequences(kernels, tensors, ends)):
            if ends[s] == ends[s + 1]:
                assert same_bits(final[s].cpu(), state[s])
                continue
            alone = launch(kernels, one, state[s : s + 1])
            assert same_bits(alone[0], out[:, ends[s] : ends[s + 1]]) and same_bits(alone[1], final[s : s + 1])


@pytest.mark.parametrize("name", NAMES)
def test_states_on_the_way_are_final_states_of_what_comes_before(name):
    for kernels in variants(name):
        every = 2 * kernels.plan["chunk_size"]
        tensors, state, ends = batch(kernels, [2 * every + 3, 1, every, 3 * every])
        _, _, states = launch(kernels, with_ends(tensors, ends), state, every=2)
        written = set()
        for s, (start, end) in enumerate(zip(ends, ends[1:])):
            for i in range((end - start) // every):
                slot, cut = start // every + i, start + (i + 1) * every
                before = {n: x[:, start:cut] if x.dim() > 2 else x for n, x in tensors.items()}
                _, expected = launch(kernels, {n: x.contiguous() for n, x in before.items()}, state[s : s + 1])
                assert same_bits(states[:, slot], expected)
                written.add(slot)
        assert not states[:, [slot for slot in range(states.shape[1]) if slot not in written]].any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_sequence_alone_are_the_same(name):
    for kernels in trained(name):
        tensors, state, ends = batch(kernels, LENGTHS["short and empty"])
        d_out, d_final = draw_cotangents(kernels, (1, ends[-1] + PADDING, HEADS), sequences=len(ends) - 1)
        together = train(kernels, with_ends(tensors, ends), state, d_out, d_final).gradients
        total = {n: 0 for n, x in tensors.items() if x.dim() < 3}
        for s, one in enumerate(sequences(kernels, tensors, ends)):
            rows = slice(ends[s], ends[s + 1])
            if ends[s] == ends[s + 1]:
                assert same_bits(together["initial_state"][s].cpu(), d_final[s])
                continue
            alone = train(kernels, one, state[s : s + 1], d_out[:, rows], d_final[s : s + 1]).gradients
            assert same_bits(alone["initial_state"], together["initial_state"][s : s + 1])
            for n in (n for n in alone if n in tensors and n not in total):
                assert same_bits(alone[n], together[n][:, rows].contiguous()), f"d_{n}"
            total = {n: x + alone[n] for n, x in total.items()}
        assert all(torch.allclose(total[n], together[n], rtol=1e-4, atol=1e-5) for n in total)
        padding = [x[:, ends[-1] :] for n, x in together.items() if x.dim() > 2 and n != "initial_state"]
        assert not any(x.any() for x in padding)


def test_more_sequences_than_a_grid_has_rows():
    for kernels in variants("linear_attention"):
        tensors, state = draw(kernels, (MANY, 1, 1))
        packed = {n: x.view(1, MANY, *x.shape[2:]) for n, x in tensors.items()}
        found = launch(kernels, with_ends(packed, list(range(MANY + 1))), state)
        expected = launch(kernels, tensors, state)
        assert same_bits(found[0].view(expected[0].shape), expected[0]) and same_bits(found[1], expected[1])


@pytest.mark.parametrize("ends", BAD_ENDS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_ends_that_are_wrong_lead_nowhere_outside(name, ends):
    """Nobody checked them: results may be anything, but nothing else is written."""
    for kernels, which in [(k, "forward") for k in variants(name)] + [(k, "backward") for k in trained(name)]:
        tensors, state, _ = batch(kernels, [75], padding=0)
        memory = Guarded(DEVICE)
        given = {n: memory.copy(x) for n, x in with_ends(tensors, ends).items()}
        given["initial_state"] = memory.copy(state.expand(3, *state.shape[1:]))
        before = {n: x.clone() for n, x in given.items()}
        made = kernels.launch(given, "forward", memory.allocate, {"every": 1} if which == "forward" else None)
        if which == "backward":
            kernels.launch({**given, **{n: made[n] for n in kernels.kept}}, which, memory.allocate)
        torch.cuda.synchronize()
        assert not memory.broken() and all(same_bits(given[n], x) for n, x in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_serves_all_lengths(name):
    """Captured with some ends of sequences, replayed with others that were put in their place."""
    for kernels in variants(name):
        tensors, state, _ = batch(kernels, [40, 20, 15], padding=0)
        given = {n: x.to(DEVICE) for n, x in with_ends(tensors, [0, 40, 60, 75]).items()}
        given["initial_state"] = state.to(DEVICE)
        kernels.launch(given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = kernels.launch(given)
        found = [made[kernels.by_role[role]] for role in ("out", "final_state")]
        for ends in ([0, 1, 60, 75], [0, 0, 0, 33], [0, 25, 50, 75]):
            given["cu_seqlens"].copy_(torch.tensor(ends))
            graph.replay()
            torch.cuda.synchronize()
            expected = launch(kernels, with_ends(tensors, ends), state)
            assert all(same_bits(f, e) for f, e in zip(found, expected)), ends
