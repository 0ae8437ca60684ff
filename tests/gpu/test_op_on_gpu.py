"""The op as people call it on CUDA tensors: torch's streams, graphs, devices and compiler."""

import pytest
import torch
from built_ops import DEVICE, draw, op, same_bits, variants

pytestmark = pytest.mark.gpu
NAMES = ("kda", "gated_deltanet", "linear_attention")
SHAPE = (2, 200, 5)
SLEEP = 100_000_000  # clock cycles: some 50 ms


def inputs(name: str, seed: int = 0, device: str = DEVICE) -> dict:
    """Arguments and initial state on a GPU."""
    tensors, state = draw(variants(name)[0], SHAPE, seed=seed)
    return {n: x.to(device) for n, x in {**tensors, "initial_state": state}.items()}


def call(name: str, given: dict) -> tuple:
    return op(name)(**given, output_final_state=True)


def same(found, expected) -> bool:
    return all(same_bits(f.cpu(), e.cpu()) for f, e in zip(found, expected))


@pytest.mark.parametrize("name", NAMES)
def test_a_launch_waits_for_what_its_stream_does_before(name):
    given = inputs(name)
    expected = call(name, given)
    late = {n: torch.full_like(x, float("nan")) for n, x in given.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(SLEEP)
        for n, x in given.items():
            late[n].copy_(x)
        found = call(name, late)
    torch.cuda.synchronize()
    assert same(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_two_streams_at_once(name):
    given = [inputs(name, seed) for seed in range(2)]
    expected = [call(name, g) for g in given]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in given], []
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append((i, call(name, given[i])))
    torch.cuda.synchronize()
    assert all(same(results, expected[i]) for i, results in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_replays_on_new_inputs(name):
    static, fresh = inputs(name), inputs(name, seed=1)
    expected = call(name, fresh)
    call(name, static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(name, static)
    for n, x in fresh.items():
        static[n].copy_(x)
    for _ in range(3):
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_of_a_ragged_batch_replays_on_other_lengths(name):
    given = inputs(name)
    state = given.pop("initial_state").repeat_interleave(2, 0)[:3].contiguous()
    packed = {n: x.flatten(0, 1)[None] if x.dim() > 2 else x for n, x in given.items()}
    packed |= {"initial_state": state, "cu_seqlens": torch.tensor([0, 100, 250, 400], device=DEVICE)}
    call(name, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(name, packed)
    for ends in ([0, 0, 399, 400], [0, 7, 7, 300]):
        packed["cu_seqlens"].copy_(torch.tensor(ends))
        graph.replay()
        torch.cuda.synchronize()
        assert same(captured, call(name, {**packed, "cu_seqlens": torch.tensor(ends, device=DEVICE)}))


@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_of_decoding_replays_on_other_slots(name):
    given = inputs(name)
    state = given.pop("initial_state")
    tokens = {n: x[:, :1].contiguous() if x.dim() > 2 else x for n, x in given.items()}
    pool = state.repeat(3, 1, 1, 1)
    before, slots = pool.clone(), torch.tensor([0, 1], device=DEVICE)
    op(name).decode(**tokens, state_pool=pool, state_indices=slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(name).decode(**tokens, state_pool=pool, state_indices=slots)
    for chosen in ([5, 2], [3, -1]):
        pool.copy_(before)
        slots.copy_(torch.tensor(chosen))
        graph.replay()
        torch.cuda.synchronize()
        expected = before.clone()
        o = op(name).decode(**tokens, state_pool=expected, state_indices=torch.tensor(chosen, device=DEVICE))
        assert same((captured, pool), (o, expected))


def test_every_gpu_whichever_is_current():
    expected = call("kda", inputs("kda"))
    for index in range(torch.cuda.device_count()):
        o, state = call("kda", inputs("kda", device=f"cuda:{index}"))
        assert o.device.index == state.device.index == index
        assert same((o, state), expected)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_traced_without_a_break(name):
    given, built = inputs(name), op(name)
    expected = call(name, given)
    traced = torch.compile(lambda **g: built(**g, output_final_state=True), fullgraph=True, backend="aot_eager")
    assert same(traced(**given), expected)


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_other_layouts_give_the_same(name):
    given = inputs(name)
    turned = {n: x.transpose(0, 1).contiguous().transpose(0, 1) for n, x in given.items()}
    assert same(call(name, turned), call(name, given))


def test_memory_is_returned():
    given = inputs("kda")
    call("kda", given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        call("kda", given)
    assert torch.cuda.memory_allocated() == before
