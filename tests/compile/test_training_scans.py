"""The scans of training through TileLang and nvcc: they lower for each kind of target and stay in registers."""

import re

import pytest
from scans import generated

from kdagen import zoo
from kdagen.build import adapter, toolchain
from kdagen.target import target


def lowered(source, arch):
    return adapter.lower(adapter.trace(source.text, source.name, f"<{source.name}>"), target(arch))


@pytest.mark.parametrize("arch", ["sm90", "sm80"])
@pytest.mark.parametrize("name", ["kda", "deltaproduct"])
def test_reverse_scans_lower(name, arch):
    _, sources = generated(zoo.get(name), 128, arch, chunk_size=32, segment=8)
    found = lowered(sources["reverse"], arch)
    chunks = r"\(\(length\w* \+ 31\) >> 5\)"  # of a block's sequence
    assert re.search(rf"if \(\(n == 0\) \| \(\(\({chunks} - n\) % 8\) == 0\)\)", found.source)
    assert ("wgmma" in found.source) == (arch == "sm90")
    stores = [line for line in found.source.splitlines() if "(d_S_w + " in line]
    assert stores and all("((int64_t)((int)blockIdx.y)) * ((int64_t)NG)" in line for line in stores)  # beyond 2^31


@pytest.mark.nvcc
@pytest.mark.parametrize("kernel", ["scan", "replay", "reverse"])
def test_nothing_spills_and_no_product_waits_for_another(kernel, tmp_path):
    _, sources = generated(zoo.get("kda"), 128)
    file = tmp_path / f"{kernel}.cu"
    file.write_text(lowered(sources[kernel], "sm90").source)
    report = toolchain.compile_cubin(file, "sm_90a")
    assert report["spill_stores"] == report["spill_loads"] == report["stack_bytes"] == 0
    assert report["warnings"] == []
