"""The kernel that decodes, on a GPU: a token or several, slots of a pool, speculation; against the recurrence."""

import pytest
import torch
from built_ops import (
    DEVICE,
    decode,
    decoding,
    draw,
    draw_states,
    errors,
    plain,
    reference,
    same_bits,
    sequences,
    tolerance,
)

from kdagen import zoo

pytestmark = pytest.mark.gpu
NAMES = ("kda", "kda_softplus", "gated_deltanet", "dplr")
BATCHES = (1, 2, 7, 32, 129, 256)
SLOTS, HEADS = 11, 4
POOL_ELEMENTS = 2**31 + 2**20
WRONG = {
    "slots": {"state_indices": torch.tensor([-1, 11, 2**31 - 1, -(2**31)])},
    "slots of 64 bits": {"state_indices": torch.tensor([2**40, -(2**40), 2**32, 2**63 - 1])},
    "counts": {
        "state_indices": torch.zeros(4, 3, dtype=torch.int32),
        "num_accepted_tokens": torch.tensor([0, 4, -9, 99]),
    },
    "ends": {"cu_seqlens": torch.tensor([5, -3, 99, 2])},
}


def drawn(kernels, shape=(4, 1, HEADS), gate: str = "mild", slots: int = SLOTS, **more) -> tuple[dict, torch.Tensor]:
    """Arguments and a pool of states."""
    return draw(kernels, shape, gate, **more)[0], draw_states(kernels, slots, shape[2], seed=1)


def check(name: str, kernels, found: tuple, tensors: dict, state: torch.Tensor) -> None:
    wrong = errors(name, kernels, found, tensors, state)
    assert all(w <= tolerance(kernels) for w in wrong), f"{kernels.folder}: output, state off by {wrong}"


@pytest.mark.parametrize("name", zoo.names())
@pytest.mark.parametrize("tokens", [1, 5])
def test_against_the_recurrence(name, tokens):
    for kernels in decoding(name):
        for gate in ("mild", "reset"):
            tensors, pool = drawn(kernels, (3, tokens, 2 * HEADS), gate, slots=3, group=2)
            check(name, kernels, decode(kernels, tensors, pool), tensors, pool)


@pytest.mark.parametrize("batch", BATCHES)
def test_every_batch(batch):
    for kernels in decoding("kda"):
        tensors, pool = drawn(kernels, (batch, 1, 3), slots=batch)
        check("kda", kernels, decode(kernels, tensors, pool), tensors, pool)


@pytest.mark.parametrize("name", NAMES)
def test_slots_are_updated_and_all_others_left_alone(name):
    for kernels in decoding(name):
        tensors, pool = drawn(kernels)
        slots = torch.tensor([7, 0, 10, 3])
        out, after = decode(kernels, tensors, pool, state_indices=slots)
        check(name, kernels, (out, after[slots.to(DEVICE)]), tensors, pool[slots])
        others = [s for s in range(SLOTS) if s not in slots.tolist()]
        assert same_bits(after[others].cpu(), pool[others])


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_alone_is_the_same(name):
    for kernels in decoding(name):
        tensors, pool = drawn(kernels, (6, 2, HEADS))
        out, after = decode(kernels, tensors, pool)
        for s, one in enumerate(sequences(kernels, tensors)):
            alone, pool_after = decode(kernels, one, pool, state_indices=torch.tensor([s], dtype=torch.int32))
            assert same_bits(alone, out[s : s + 1]) and same_bits(pool_after[s], after[s])


@pytest.mark.parametrize("name", NAMES)
def test_ragged_decoding_is_that_of_each_sequence(name):
    for kernels in decoding(name):
        tensors, pool = drawn(kernels, (1, 12, HEADS))
        ends = [0, 1, 1, 6, 10]
        out, after = decode(kernels, tensors, pool, cu_seqlens=torch.tensor(ends))
        expected, finals = reference(name, kernels, tensors, pool[:4], ends)
        assert float((out.cpu().double() - expected).norm() / expected.norm()) <= tolerance(kernels)
        found = plain(kernels, after[:4].cpu())
        assert float((found - finals).norm() / finals.norm()) <= tolerance(kernels)
        assert same_bits(after[1].cpu(), pool[1])


@pytest.mark.parametrize("null_below", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_null_slots_give_zero_and_touch_nothing(name, null_below):
    for kernels in decoding(name):
        tensors, pool = drawn(kernels)
        slots = torch.tensor([0, -1, 5, SLOTS])
        out, after = decode(kernels, tensors, pool, state_indices=slots, null_below=null_below)
        null = [1, 3] if null_below == 0 else [0, 1, 3]
        assert not out[null].any() and out[2].any()
        written = {0, 5} - ({0} if null_below else set())
        changed = {s for s in range(SLOTS) if not same_bits(after[s].cpu(), pool[s])}
        assert changed == written


@pytest.mark.parametrize("name", NAMES)
def test_speculation_starts_at_what_was_accepted_and_stores_a_state_a_token(name):
    for kernels in decoding(name):
        tensors, pool = drawn(kernels, (3, 2, HEADS))
        slots = torch.tensor([[0, 1, 2], [3, -1, 4], [7, 8, 9]], dtype=torch.int32)
        accepted = torch.tensor([1, 3, 2], dtype=torch.int32)
        out, after = decode(kernels, tensors, pool, state_indices=slots, num_accepted_tokens=accepted)
        first = slots.gather(1, accepted[:, None].long() - 1)[:, 0].long()
        expected, _ = reference(name, kernels, tensors, pool[first])
        assert float((out.cpu().double() - expected).norm() / expected.norm()) <= tolerance(kernels)
        for token in range(2):
            part = {n: x[:, : token + 1] if x.dim() > 2 else x for n, x in tensors.items()}
            _, states = reference(name, kernels, part, pool[first])
            for s, slot in enumerate(slots[:, token].tolist()):
                if slot >= 0:
                    found = plain(kernels, after[slot].cpu())
                    assert float((found - states[s]).norm() / states[s].norm()) <= tolerance(kernels)
        untouched = [s for s in range(SLOTS) if s not in slots[:, :2].flatten().tolist()]
        assert same_bits(after[untouched].cpu(), pool[untouched])


def test_a_pool_beyond_32_bits():
    """Its last slots are as the first ones of a small pool."""
    for kernels in decoding("kda"):
        tensors, pool = drawn(kernels, (2, 1, HEADS), slots=2)
        given = {n: x.to(DEVICE) for n, x in tensors.items()}
        slots = POOL_ELEMENTS // pool[0].numel()
        huge = torch.zeros(slots, *pool.shape[1:], dtype=pool.dtype, device=DEVICE)
        huge[-2:] = pool.to(DEVICE)
        last = torch.tensor([slots - 2, slots - 1], device=DEVICE)
        made = kernels.launch({**given, "state_pool": huge, "state_indices": last}, "decode")
        out, after = decode(kernels, tensors, pool)
        assert same_bits(made[kernels.by_role["out"]], out) and same_bits(huge[-2:], after)
        assert not huge[:-2].any()


@pytest.mark.parametrize("name", NAMES)
def test_replays_are_identical(name):
    for kernels in decoding(name):
        tensors, pool = drawn(kernels, (9, 3, HEADS))
        first = decode(kernels, tensors, pool)
        assert all(all(map(same_bits, decode(kernels, tensors, pool), first)) for _ in range(5))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_leads_nowhere_outside(name, wrong):
    """Nobody checked it: nothing but output and pool is written (`decode` sees to it), and no slot but those named."""
    for kernels in decoding(name):
        given = WRONG[wrong]
        shape = (1, 4, HEADS) if "cu_seqlens" in given else (4, 1, HEADS)
        tensors, pool = drawn(kernels, shape)
        _, after = decode(kernels, tensors, pool, may_be_unwritten=True, **given)
        named = given.get("state_indices", torch.arange(3)).flatten().tolist()
        others = [s for s in range(SLOTS) if s not in named]
        assert same_bits(after[others].cpu(), pool[others])


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_serves_all_slots(name):
    """Captured with some slots, replayed with others that were put in their place, on the states that these left."""
    for kernels in decoding(name):
        tensors, pool = drawn(kernels)
        given = {n: x.to(DEVICE) for n, x in tensors.items()}
        given |= {"state_pool": pool.to(DEVICE), "state_indices": torch.arange(4, device=DEVICE)}
        kernels.launch(given, "decode")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = kernels.launch(given, "decode")
        given["state_pool"].copy_(pool)
        for slots in ([9, 2, 0, 4], [2, 9, -1, 10]):
            indices = torch.tensor(slots)
            expected, pool = decode(kernels, tensors, pool, state_indices=indices)
            given["state_indices"].copy_(indices)
            graph.replay()
            torch.cuda.synchronize()
            assert same_bits(made[kernels.by_role["out"]], expected) and same_bits(given["state_pool"], pool)
