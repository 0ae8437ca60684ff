"""Kernels of split sequences through TileLang and nvcc: nothing spills, and a launch covers all segments."""

import mock_driver
import pytest
from mock_driver import ops

from kdagen import zoo
from kdagen.build import adapter, toolchain
from kdagen.pipeline import compile_op
from kdagen.target import target

CALL = """
import kdagen as kg
op = kg.compile("linear_attention", head_dim=64, schedule={"split": 1})
given = [bf16(1, 150, 3, 64), bf16(1, 150, 3, 64), bf16(1, 150, 6, 64)]
o, state, *_ = op._cuda(*given, output_final_state=True, cu_seqlens=torch.tensor([0, 7, 7, 150]))
print(tuple(o.shape), o.dtype, tuple(state.shape), state.dtype)
print(*launched(), sep="\\n")
"""


def lowered(kernel, arch):
    return adapter.lower(adapter.trace(kernel.text, kernel.name, f"<{kernel.name} {arch}>"), target(arch))


def kernels(name, arch, *families, head_dim=128):
    source = compile_op(zoo.get(name), head_dim, arch=arch, schedule={"split": 8})
    return [kernel for kernel in source.kernels if kernel.family in families]


@pytest.mark.parametrize("arch", ["sm80", "sm100"])
def test_they_lower_without_wgmma(arch):
    for kernel in kernels("kda", arch, "transitions", "carry", head_dim=64):
        found = lowered(kernel, arch)
        assert "mma" in found.source and found.shared_bytes <= target(arch).shared_bytes


@pytest.mark.parametrize("arch", ["sm90", "sm80"])
@pytest.mark.parametrize("name", ["linear_attention", "mamba2"])
def test_a_state_that_is_only_scaled_is_carried_without_products(name, arch):
    for kernel in kernels(name, arch, "transitions", "carry", head_dim=64):
        assert "mma" not in lowered(kernel, arch).source.replace("gamma", "")


@pytest.mark.nvcc
@pytest.mark.parametrize(
    "family, head_dim", [("ends", 128), ("transitions", 128), ("carry", 128), ("carry", (256, 128)), ("scan", 128)]
)
def test_nothing_spills_and_no_product_waits_for_another(family, head_dim, tmp_path):
    (kernel,) = kernels("kda", "sm90", family, head_dim=head_dim)
    file, found = tmp_path / "kernel.cu", lowered(kernel, "sm90")
    file.write_text(found.source)
    report = toolchain.compile_cubin(file, "sm_90a")
    assert report["spill_stores"] == report["spill_loads"] == report["stack_bytes"] == 0
    assert report["warnings"] == [] and "wgmma" in found.source
    assert found.shared_bytes == kernel.shared_bytes <= target("sm90").shared_bytes


@pytest.mark.nvcc
def test_a_launch_has_a_block_for_each_slot_of_a_segment(tmp_path, tmp_path_factory):
    mock = mock_driver.compile_mock(tmp_path_factory.mktemp("mock"))
    results, *launches = ops.run(mock, CALL, tmp_path, KDAGEN_CACHE_DIR=str(tmp_path / "cache"))
    assert results == "(1, 150, 6, 64) torch.bfloat16 (3, 6, 64, 64) torch.float32"
    grids = [(line.split()[0].removeprefix("linear_attention_"), line.split()[1]) for line in launches]
    slots = f"grid={150 // 32 + 3},6,1"
    assert grids == [
        ("index", "grid=3,1,1"),
        ("prepare", slots),
        ("ends", slots),
        ("carry", "grid=6,6,1"),  # in tiles of 32 channels
        ("scan", slots),
    ]
