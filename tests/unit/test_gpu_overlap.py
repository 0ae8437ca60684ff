"""benchmarks/gpu_overlap.py on simulated streams: segments leave the bits of the whole, whatever order they run in."""

from pathlib import Path

import packages
import pytest
import simulated_gpu
import torch

from kdagen import zoo
from kdagen.pipeline import compile_op
from kdagen.runtime.loader import load_op

TOKENS, HEADS = 128, 2


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    place = tmp_path_factory.mktemp("overlap")
    return load_op(packages.write(place / "default", compile_op(zoo.get("gated_deltanet"), 64), place))


@pytest.fixture
def whole(monkeypatch, kernels):
    """A launch of all tokens."""
    from kdagen.autotune import launches

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    simulated_gpu.install(monkeypatch)
    given = launches.arguments(kernels, (1, TOKENS, HEADS))
    memory = launches.memory(kernels, {"arguments": given})
    launches.pass_call(kernels, "forward")(memory)
    return given, {role: memory[kernels.by_role[role]] for role in ("out", "final_state")}


def same(found: dict, expected: dict) -> bool:
    return all(torch.equal(found[role], x) for role, x in expected.items())


@pytest.mark.parametrize("way", ["in_turn", "side_by_side"])
def test_segments_leave_the_bits_of_the_whole(monkeypatch, kernels, whole, way):
    import gpu_overlap

    assert gpu_overlap.pieces_of(kernels, TOKENS) == [n for n in (2, 4, 8) if TOKENS // n >= kernels.plan["chunk_size"]]
    given, expected = whole
    for seed in range(4):
        segments = gpu_overlap.cut(kernels, given, 4)
        with simulated_gpu.streams(monkeypatch, seed):
            getattr(gpu_overlap, way)(kernels)(segments)
        assert same(segments.results, expected)


def test_workspaces_are_used_in_turn(kernels, whole):
    import gpu_overlap

    parts = gpu_overlap.cut(kernels, whole[0], 4).parts
    names = [n for n, spec in kernels.plan["tensors"].items() if spec["role"] == "workspace"]
    places = [{name: part[name].data_ptr() for name in names} for part in parts]
    assert names and places[0] == places[2] != places[1] == places[3]


def test_what_reads_no_state_runs_ahead(kernels, whole):
    import gpu_overlap

    assert [len(launches) for launches in gpu_overlap.stages(kernels)] == [2, 1]


@pytest.mark.parametrize("forgotten", ["prepared", "scanned"])
def test_a_wait_that_is_missing_moves_bits(monkeypatch, kernels, whole, forgotten):
    """So the simulation sees what it is for."""
    import gpu_overlap

    given, expected = whole
    first, wait = {"prepared": 2, "scanned": 1}[forgotten], simulated_gpu.Stream.wait_event
    who = lambda stream: simulated_gpu.Stream.every.index(stream) == first  # noqa: E731
    monkeypatch.setattr(simulated_gpu.Stream, "wait_event", lambda s, event: None if who(s) else wait(s, event))
    found = []
    for seed in range(8):
        segments = gpu_overlap.cut(kernels, given, 4)
        try:
            with simulated_gpu.streams(monkeypatch, seed):
                gpu_overlap.side_by_side(kernels)(segments)
        except AssertionError:
            found.append(False)
        else:
            found.append(same(segments.results, expected))
    assert not all(found)
