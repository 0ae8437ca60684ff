"""What must not change a single bit of gradients: time, what the forward kept, company, and where memory lies."""

import pytest
import torch
from built_ops import DEVICE, by_policy, draw, draw_cotangents, same_bits, train, trained

from kdagen import zoo

pytestmark = pytest.mark.gpu
SHAPE = (3, 277, 4)  # two segments of 8 chunks of 32, the second of one
REPLAYS = 5
HUGE_TOKENS, HUGE_HEADS = 32769, 65  # with two sequences, the states of all chunks of 32 are more than 2^31 elements


def drawn(kernels, gate: str = "mild") -> tuple:
    """Arguments and the rest of what `train` takes."""
    tensors, state = draw(kernels, SHAPE, gate)
    return tensors, state, *draw_cotangents(kernels, SHAPE)


def differing(a: dict, b: dict) -> list[str]:
    """Names of results that are not the same bits."""
    assert a.keys() == b.keys()
    return [name for name in a if not same_bits(a[name], b[name])]


@pytest.mark.parametrize("name", zoo.names())
def test_replays_are_identical(name):
    for kernels in trained(name):
        given = drawn(kernels)
        first = train(kernels, *given).results()
        changed = [differing(train(kernels, *given).results(), first) for _ in range(REPLAYS)]
        assert not any(changed), changed


@pytest.mark.parametrize("gate", ["mild", "reset"])
def test_policies_agree(gate):
    """What is computed again is computed as it was the first time."""
    inputs, states, everything = (train(k, *drawn(k, gate)).results() for k in by_policy("kda").values())
    assert not differing(inputs, states) and not differing(everything, states)


@pytest.mark.parametrize("name", zoo.names())
def test_other_sequences_leave_gradients_alone(name):
    """But for those of a head's parameters, which are sums over sequences."""
    for kernels in trained(name):
        tensors, *others = drawn(kernels)
        every_token = {n for n in tensors if "T" in kernels.plan["tensors"][n]["shape"]}
        one = {n: x[1:2] if n in every_token else x for n, x in tensors.items()}
        alone = train(kernels, one, *(x[1:2] for x in others))
        together = train(kernels, tensors, *others)
        for n in (*every_token, "initial_state"):
            assert same_bits(alone.gradients[n], together.gradients[n][1:2]), f"d_{n}"


def test_offsets_beyond_32_bits():
    """Gradients of the last heads, with states of more than 2^31 elements kept, are as when these are alone."""
    kernels = by_policy("kda")["states"]
    tokens = torch.arange(HUGE_TOKENS, device=DEVICE) % SHAPE[1]
    few, _ = draw(kernels, (2, SHAPE[1], HUGE_HEADS))
    d_out = draw_cotangents(kernels, (2, SHAPE[1], HUGE_HEADS))[0].to(DEVICE).index_select(1, tokens)
    huge = {n: x.to(DEVICE).index_select(1, tokens) for n, x in few.items()}
    part = lambda x: x[1:, :, -2:].contiguous()  # noqa: E731
    found = {n: part(x) for n, x in gradients(kernels, huge, d_out).items()}
    alone = gradients(kernels, {n: part(x) for n, x in huge.items()}, part(d_out))
    assert all(x.isfinite().all() for x in found.values()) and not differing(found, alone)


def gradients(kernels, tensors: dict, d_out) -> dict:
    """Of the arguments, by plain launches."""
    forward = kernels.launch(tensors)
    kept = {name: forward[name] for name in kernels.kept}
    del forward
    return kernels.gradients(kernels.launch({**tensors, **kept, kernels.by_role["d_out"]: d_out}, "backward"))
