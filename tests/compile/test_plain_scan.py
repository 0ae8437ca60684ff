"""Skeletons of the scan as TileLang lowers them: who fetches, and how many threads a block has."""

import pytest

from kdagen import zoo
from kdagen.build import adapter
from kdagen.pipeline import compile_op
from kdagen.target import target


@pytest.mark.nvcc
@pytest.mark.parametrize(
    "skeleton, roles", [("scan_specialised", True), ("scan_pipelined", True), ("scan_plain", False)]
)
def test_a_producer_is_there_only_where_warps_have_roles(skeleton, roles):
    source = compile_op(zoo.get("linear_attention"), 64, schedule={"scan_skeleton": skeleton, "stages": 1})
    (kernel,) = (k for k in source.kernels if k.family == "scan")
    found = adapter.lower(adapter.trace(kernel.text, kernel.name, f"{kernel.name}.py"), target("sm90"))
    assert int(found.threads[0]) == kernel.threads + 128 * roles
    assert bool(found.descriptors) == ("tma_load" in found.source) == roles
    assert ("cp_async" in found.source) == (not roles) and "wgmma" in found.source
