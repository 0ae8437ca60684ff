"""Ops to the driver: kernels built just in time, found again without a compiler, launched on the mock.

What KDA's kernels are launched on is tested where they are built, in test_build_command.py.
"""

from pathlib import Path

import mock_driver
import pytest
from mock_driver import ops

pytestmark = pytest.mark.nvcc
CALL = """
import logging
logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO, stream=sys.stdout)
import kdagen as kg
op = kg.compile("linear_attention", head_dim=64)
given = [bf16(2, 37, 3, 64), bf16(2, 37, 3, 64), bf16(2, 37, 6, 64)]
o, state, *_ = op._cuda(*given, output_final_state=True)
print(tuple(o.shape), o.dtype, tuple(state.shape), state.dtype)
print(*launched(), sep="\\n")
"""
TRAIN = """
from kdagen import zoo
from kdagen.build.builder import build_cached
from kdagen.pipeline import compile_training
source = compile_training(zoo.get("retnet"), 64, schedule={"segment": 2})
op = loader.load_op(build_cached(source))
given = {"q": bf16(2, 150, 3, 64), "k": bf16(2, 150, 3, 64), "v": bf16(2, 150, 6, 64), "gamma": torch.ones(6)}
given |= {"cu_seqlens": torch.tensor([0, 7, 7, 300])} if RAGGED else {}
given = {n: x.view(1, 300, *x.shape[2:]) if RAGGED and x.dim() == 4 else x for n, x in given.items()}
made = op.launch(given)
kept = {name: made[name] for name in op.kept}
print(*(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in kept.items()))
found = op.launch(given | kept, "backward")
print(*(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in op.gradients(found).items()), sep=", ")
print(*launched(), sep="\\n")
"""
SEGMENTS = """
import simulated_gpu
import gpu_overlap
from kdagen import zoo
from kdagen.autotune import launches
from kdagen.build.builder import build_cached
from kdagen.pipeline import compile_op
open_libraries = loader.LoadedOp.functions
faked = lambda function: lambda *given: on_gpu(function, given)
loader.LoadedOp.functions = lambda self: {name: faked(f) for name, f in open_libraries(self).items()}
op = loader.load_op(build_cached(compile_op(zoo.get("linear_attention"), 64)))
given = launches.arguments(op, (1, 256, 3))
for way in (gpu_overlap.in_turn, gpu_overlap.side_by_side):
    with simulated_gpu.streams(type("Patch", (), {"setattr": staticmethod(setattr)})):
        way(op)(gpu_overlap.cut(op, given, 2))
    print(*launched(), sep=", ")
"""


@pytest.fixture(scope="module")
def mock(tmp_path_factory):
    return mock_driver.compile_mock(tmp_path_factory.mktemp("mock"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def kernels(lines: list[str]) -> list[str]:
    """The kernels and grids that the driver was asked for, after a look at the results."""
    results, *launches = lines
    assert results == "(2, 37, 6, 64) torch.bfloat16 (2, 6, 64, 64) torch.float32"
    return launches


def test_kernels_are_built_just_in_time_then_found_without_a_compiler(mock, cache, tmp_path):
    before, after, ran, *rest = ops.run(mock, CALL, tmp_path, KDAGEN_CACHE_DIR=str(cache))
    assert before.startswith("WARNING linear_attention for sm90-bf16-64x64: not built yet")
    assert after.startswith("INFO linear_attention for sm90-bf16-64x64: compiled in ")
    assert ran.startswith(f"INFO linear_attention: bfloat16 tensors on cpu: kernels in {cache / 'ops'}")
    index, prepare, scan = kernels(rest)
    assert index == "linear_attention_index grid=2,1,1"
    assert prepare == "linear_attention_prepare grid=4,6,1"  # 74 tokens in chunks of 32, and one for each sequence
    assert scan.startswith("linear_attention_scan grid=2,6,1")
    again, *rest = ops.run(mock, CALL, tmp_path, KDAGEN_CACHE_DIR=str(cache), PATH="", CUDA_HOME="")
    assert again == ran
    assert kernels(rest) == [index, prepare, scan]


@pytest.mark.parametrize("ragged", [False, True])
def test_both_passes_of_training_launch_their_kernels_in_order(mock, cache, tmp_path, ragged):
    code = f"RAGGED = {ragged}\n{TRAIN}"
    kept, gradients, *launched = ops.run(mock, code, tmp_path, KDAGEN_CACHE_DIR=str(cache))
    sequences, lead = (3, "1, 300") if ragged else (2, "2, 150")
    chunks, segments = 300 // 32 + sequences, 300 // 64 + sequences
    assert kept == f"S_w (6, {chunks}, 64, 64) torch.bfloat16"
    heads = {"q": 3, "k": 3, "v": 6}
    vectors = [f"{name} ({lead}, {n}, 64) torch.bfloat16" for name, n in heads.items()]
    assert gradients == ", ".join([*vectors, "gamma (6,) torch.float32"])
    names = [line.split()[0].removeprefix("retnet_") for line in launched]
    assert names == ["index", "prepare", "scan", "index", "prepare", "reverse", "gradients"]
    grids = {name: line.split()[1] for name, line in zip(names, launched)}
    assert grids["index"] == f"grid={sequences},1,1"
    assert (grids["prepare"], grids["gradients"]) == (f"grid={chunks},6,1", f"grid={segments},6,1")


def test_segments_of_a_sequence_are_calls_of_the_same_kernels(mock, cache, tmp_path):
    """benchmarks/gpu_overlap.py: each of 128 tokens in chunks of 32, prepared ahead of its scan."""
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    lines = ops.run(mock, f"sys.path.insert(0, {str(benchmarks)!r})\n{SEGMENTS}", tmp_path, KDAGEN_CACHE_DIR=str(cache))
    kernels = ["index grid=1,1,1", "prepare grid=5,3,1", "scan grid=1,3,1"]
    expected = ", ".join(f"linear_attention_{kernel}" for kernel in kernels * 2)
    assert lines == [expected, expected]
