"""Addresses in generated kernels: 64 bits where dimensions are multiplied, for tensors of more than 2^31 elements."""

import re
from functools import cache
from types import SimpleNamespace

import pytest
import toy

from kdagen import zoo
from kdagen.build import adapter
from kdagen.errors import ToolchainError
from kdagen.pipeline import compile_decode, compile_op
from kdagen.target import target

pytestmark = pytest.mark.nvcc
COPY = """import tilelang.language as T

def copy():
    tokens, HV = T.dynamic("T"), T.dynamic("HV")

    @T.prim_func
    def copy(x: T.Tensor((tokens, HV, 64), "float32"), o: T.Tensor((tokens, HV, 64), "float32")):
        with T.Kernel(tokens, HV, threads=64) as (t, h):
            for k in T.Parallel(64):
                o[t, h, k] = x[t, h, k]

    return copy
"""


@cache
def lowered(kernel, arch: str = "sm90") -> adapter.Lowered:
    return adapter.lower(adapter.trace(kernel.text, kernel.name, f"{kernel.name}.py"), target(arch))


def test_a_dynamic_dimension_is_multiplied_in_64_bits():
    source = adapter.lower(adapter.trace(COPY, "copy", "copy.py"), target("sm90")).source
    assert re.search(r"o\[.*\(int64_t\)\(\(int\)blockIdx\.x\)\) \* \(\(int64_t\)HV\)", source)
    assert not re.search(r"(?<!int64_t\))\bHV\) \*|\* HV\b", source)


def test_32_bits_are_found_and_refused():
    """In `load x[n * 64]`, n of 32 bits; `load x[n + 64]` cannot overflow."""
    import tilelang  # noqa: F401  (puts its TVM on the path)
    from tvm import tirx

    n, x = tirx.Var("n", "int32"), tirx.decl_buffer((1 << 30,), "float32", name="x")

    def loading(index):
        device = SimpleNamespace(params=[x.data, n], body=tirx.Evaluate(tirx.BufferLoad(x, [index])))
        return SimpleNamespace(kernel="toy_kernel", device_module=SimpleNamespace(functions={"toy": device}))

    adapter._check_offsets(loading(n + 64))
    adapter._check_offsets(loading(tirx.Cast("int64", n) * 64))
    with pytest.raises(
        ToolchainError, match="toy_kernel: addresses of x are computed in 32 bits, so that large tensors"
    ):
        adapter._check_offsets(loading(n * 64))


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_no_kernel_multiplies_dimensions_in_32_bits(arch):
    """Lowering checks this too, of every kernel that is ever built."""
    for kernel in (*compile_op(zoo.get("linear_attention"), 64, arch=arch).kernels, *toy.toy(stages=1).kernels):
        assert adapter.narrow_offsets(lowered(kernel, arch)) == set()


@pytest.mark.parametrize("make", [compile_op, compile_decode])
def test_sequences_and_chunks_are_on_the_long_axis_of_a_grid(make):
    """That has 2^31 - 1 blocks, the others 65,535."""
    for kernel in make(zoo.get("linear_attention"), 64).kernels:
        x, y, z = lowered(kernel).grid
        assert re.search(r"\b(NC|NG|N|N1)\b", x) and y in ("HV", "1") and z == "1"


def test_integers_by_value_keep_their_place():
    scan = lowered(toy.toy().kernels[-1])
    assert [a.name for a in scan.arguments] == [p.name for p in toy.SCANNED]
    assert scan.arguments[3] == adapter.Scalar("every", "int32")
    assert [t.name for t in scan.tensors] == [p.name for p in toy.SCANNED if p is not toy.EVERY]
