"""An op in training, as people call it on CUDA tensors: torch's autograd, streams, checkpoints, graphs and compiler."""

import pytest
import torch
from built_ops import DEVICE, draw, draw_cotangents, op, same_bits, train, trained
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.gpu
NAMES = ("kda", "kda_softplus", "gated_deltanet", "linear_attention")
SHAPE = (2, 300, 3)
SLEEP = 100_000_000  # clock cycles: some 50 ms


def leaves(name: str, device: str = DEVICE) -> dict:
    """Arguments and initial state on a GPU, gradients wanted of all."""
    tensors, state = draw(trained(name)[0], SHAPE)
    return {n: x.to(device).requires_grad_() for n, x in {**tensors, "initial_state": state}.items()}


def cotangents(name: str, device: str = DEVICE) -> tuple:
    return tuple(x.to(device) for x in draw_cotangents(trained(name)[0], SHAPE))


def gradients(function, given: dict, d: tuple) -> dict:
    """Of all leaves, through the output and the final state of a call."""
    results = function(**given, output_final_state=True)
    return dict(zip(given, torch.autograd.grad(results, list(given.values()), d)))


def same(found: dict, expected: dict) -> bool:
    return all(same_bits(found[n].cpu(), expected[n].cpu()) for n in expected)


@pytest.mark.parametrize("name", NAMES)
def test_autograd_gives_what_the_kernels_give(name):
    kernels = trained(name)[0]
    tensors, state = draw(kernels, SHAPE)
    expected = train(kernels, tensors, state, *draw_cotangents(kernels, SHAPE)).gradients
    assert same(gradients(op(name), leaves(name), cotangents(name)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_waits_for_what_its_stream_does_before(name):
    given, d = leaves(name), cotangents(name)
    expected = gradients(op(name), given, d)
    late = [torch.full_like(x, float("nan")) for x in d]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        results = op(name)(**given, output_final_state=True)
        torch.cuda._sleep(SLEEP)
        for to, x in zip(late, d):
            to.copy_(x)
        found = dict(zip(given, torch.autograd.grad(results, list(given.values()), late)))
    torch.cuda.synchronize()
    assert same(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_traced_without_a_break(name):
    given, d = leaves(name), cotangents(name)
    traced = torch.compile(op(name), fullgraph=True, backend="aot_eager")
    assert same(gradients(traced, given, d), gradients(op(name), given, d))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_same(name):
    given, d = leaves(name), cotangents(name)
    again = lambda **named: checkpoint(op(name), **named, use_reentrant=False)  # noqa: E731
    assert same(gradients(again, given, d), gradients(op(name), given, d))


@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_of_both_passes_replays(name):
    given, d = leaves(name), cotangents(name)
    expected = gradients(op(name), given, d)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients(op(name), given, d)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = gradients(op(name), given, d)
    for _ in range(2):
        for x in captured.values():
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, expected)


def test_every_gpu_whichever_is_current():
    expected = gradients(op("kda"), leaves("kda"), cotangents("kda"))
    for index in range(torch.cuda.device_count()):
        place = f"cuda:{index}"
        assert same(gradients(op("kda"), leaves("kda", place), cotangents("kda", place)), expected)


def test_memory_is_returned():
    given, d = leaves("kda"), cotangents("kda")
    gradients(op("kda"), given, d)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        gradients(op("kda"), given, d)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
