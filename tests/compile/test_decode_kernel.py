"""Decode kernels through TileLang and nvcc, and onto the mock driver: memory in vectors, nothing but registers."""

import re
import time

import mock_driver
import pytest
from mock_driver import ops

from kdagen import zoo
from kdagen.build import adapter, builder, toolchain
from kdagen.pipeline import compile_decode
from kdagen.state import StateType
from kdagen.target import target

VECTORS = {"float32": "float4", "bfloat16": "uint4"}  # 16 bytes
LAUNCH = """
from kdagen import zoo
from kdagen.build.builder import build_cached
from kdagen.pipeline import compile_decode
op = loader.load_op(build_cached(compile_decode(zoo.get("kda"))))
given = {name: bf16(1, 9, heads, 128) for name, heads in (("q", 2), ("k", 2), ("v", 4), ("g", 4))}
given |= {"beta": bf16(1, 9, 4), "cu_seqlens": torch.tensor([0, 2, 2, 7]), "state_pool": torch.zeros(5, 4, 128, 128)}
made = op.launch(given | {"state_indices": torch.tensor([4, 0, 2])}, "decode", scalars={"null_below": 1})
print(op.purpose, tuple(made["o_out"].shape))
print(*launched(), sep="\\n")
"""


def lowered(recurrence, arch="sm90", **choices):
    (kernel,) = compile_decode(recurrence, arch=arch, **choices).kernels
    return adapter.lower(adapter.trace(kernel.text, kernel.name, f"<{kernel.name}>"), target(arch))


@pytest.mark.parametrize("layout", ["KV", "VK"])
@pytest.mark.parametrize("dtype", VECTORS)
def test_the_state_moves_in_vectors_of_16_bytes_and_offsets_have_64_bits(layout, dtype):
    text = lowered(zoo.get("kda"), state=StateType(layout, dtype)).source
    moves = [line for line in text.splitlines() if re.search(r"state_pool \+|state_pool\[", line)]
    assert len(moves) == 3  # the load, and a store in each of two places
    for line in moves:
        assert line.count(f"*({VECTORS[dtype]}*)") == 2 and "((int64_t)HV)" in line


def test_every_warp_sums_key_channels_by_itself():
    text = lowered(zoo.get("kda_softplus"), state=StateType("VK")).source
    assert "AllReduce<tl::SumOp, 32, 1" in text and "AllReduce<tl::SumOp, 128" not in text
    assert "__syncthreads" not in text


@pytest.mark.parametrize("arch", ["sm80", "sm100", "gfx942"])
def test_other_targets(arch):
    assert "__global__" in lowered(zoo.get("kda_softplus"), arch).source


@pytest.mark.nvcc
@pytest.mark.parametrize("head_dim", [(128, 128), (256, 256)])
@pytest.mark.parametrize("name, layout, dtype", [("rwkv7", "KV", "float32"), ("dplr", "VK", "bfloat16")])
def test_nothing_spills(name, layout, dtype, head_dim, tmp_path):
    file = tmp_path / f"{name}.cu"
    file.write_text(lowered(zoo.get(name), head_dim=head_dim, state=StateType(layout, dtype)).source)
    report = toolchain.compile_cubin(file, "sm_90a")
    assert report["spill_stores"] == report["spill_loads"] == report["stack_bytes"] == 0
    assert report["warnings"] == []


@pytest.mark.nvcc
def test_kda_is_built_within_a_minute_and_launched(tmp_path, monkeypatch):
    monkeypatch.setenv("KDAGEN_CACHE_DIR", str(tmp_path / "cache"))
    started = time.perf_counter()
    (op,) = builder.build([compile_decode(zoo.get("kda"))], tmp_path / "out", jobs=2)
    assert time.perf_counter() - started < 60
    (kernel,) = op.kernels
    assert kernel["spill_stores"] == kernel["spill_loads"] == kernel["stack_bytes"] == 0
    assert kernel["registers"] <= 128 and kernel["block"] == [128, 1, 1]
    mock = mock_driver.compile_mock(tmp_path)
    said, *launched = ops.run(mock, LAUNCH, tmp_path, KDAGEN_CACHE_DIR=str(tmp_path / "cache"))
    assert said == "decode (1, 9, 4, 128)"
    assert launched == ["kda_decode grid=12,4,1"]  # 3 sequences, 4 tiles of V each
