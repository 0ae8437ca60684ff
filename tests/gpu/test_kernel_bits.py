"""What must not change a single bit of a kernel's results: time, company, the future, and where memory lies."""

import pytest
import torch
from built_ops import DEVICE, draw, launch, per_token, same_bits, variants

from kdagen import zoo

pytestmark = pytest.mark.gpu
SHAPE = (3, 77, 4)
CUT = 37  # tokens that stay as they are; no multiple of a chunk size
HUGE_TOKENS, HUGE_HEADS = 65537, 130  # with two sequences, more than 2^31 elements a tensor


def same(found, expected) -> bool:
    return all(same_bits(f, e) for f, e in zip(found, expected))


@pytest.mark.parametrize("name", zoo.names())
def test_replays_are_identical(name):
    for kernels in variants(name):
        tensors, state = draw(kernels, SHAPE)
        first = launch(kernels, tensors, state)
        assert all(same(launch(kernels, tensors, state), first) for _ in range(5))


@pytest.mark.parametrize("gate", ["mild", "reset"])
@pytest.mark.parametrize("name", zoo.names())
def test_later_tokens_leave_earlier_outputs_alone(name, gate):
    for kernels in variants(name):
        tensors, state = draw(kernels, SHAPE, gate)
        later, _ = draw(kernels, SHAPE, gate, seed=1)
        changed = {n: x.clone() for n, x in tensors.items()}
        for n in (n for n in tensors if per_token(kernels, n)):
            changed[n][:, CUT:] = later[n][:, CUT:]
        (o, final), (o_changed, final_changed) = (launch(kernels, given, state) for given in (tensors, changed))
        assert same_bits(o[:, :CUT], o_changed[:, :CUT])
        assert not same_bits(o[:, CUT:], o_changed[:, CUT:]) and not same_bits(final, final_changed)


@pytest.mark.parametrize("name", zoo.names())
def test_the_length_leaves_outputs_alone(name):
    for kernels in variants(name):
        tensors, state = draw(kernels, SHAPE)
        short = {n: x[:, :CUT].contiguous() if per_token(kernels, n) else x for n, x in tensors.items()}
        assert same_bits(launch(kernels, short, state)[0], launch(kernels, tensors, state)[0][:, :CUT])


@pytest.mark.parametrize("name", zoo.names())
def test_other_sequences_leave_outputs_alone(name):
    for kernels in variants(name):
        tensors, state = draw(kernels, SHAPE)
        o, final = launch(kernels, tensors, state)
        one = {n: x[1:2] if per_token(kernels, n) else x for n, x in tensors.items()}
        assert same(launch(kernels, one, state[1:2]), (o[1:2], final[1:2]))


def test_offsets_beyond_32_bits():
    """The last heads of tensors of more than 2^31 elements (fewer on a GPU of less than 60 GB) are as when alone."""
    memory = torch.cuda.get_device_properties(DEVICE).total_memory
    heads = min(HUGE_HEADS, HUGE_HEADS * memory // (60 << 30))
    for kernels in variants("kda"):
        tokens = torch.arange(HUGE_TOKENS, device=DEVICE) % SHAPE[1]
        drawn, _ = draw(kernels, (2, SHAPE[1], heads))
        huge = {n: x.to(DEVICE).index_select(1, tokens) for n, x in drawn.items()}
        alone = {n: x[1:, :, -2:].contiguous() for n, x in huge.items()}
        o, final = results(kernels, huge)
        found = o[1:, :, -2:].clone(), final[1:, -2:].clone()
        del huge, o, final
        assert found[0].isfinite().all() and same(found, results(kernels, alone))


def results(kernels, tensors: dict) -> tuple:
    """(output, final state) of a plain launch."""
    made = kernels.launch(tensors)
    return made[kernels.by_role["out"]], made[kernels.by_role["final_state"]]
