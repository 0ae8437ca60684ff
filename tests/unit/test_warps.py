"""Whether warps can share a product, against TileLang's own verdict."""

import pytest

from kdagen.build import adapter
from kdagen.errors import ToolchainError
from kdagen.lower.warps import divides
from kdagen.target import target

PRODUCT = """
import tilelang.language as T


def product():
    @T.prim_func
    def product(a: T.Tensor(({m}, 64), "bfloat16"), b: T.Tensor(({n}, 64), "bfloat16"), c: T.Tensor(({m}, {n}))):
        with T.Kernel(1, threads={threads}) as block:
            a_s = T.alloc_shared(({m}, 64), "bfloat16")
            b_s = T.alloc_shared(({n}, 64), "bfloat16")
            c_f = T.alloc_fragment(({m}, {n}), "float32")
            T.copy(a, a_s)
            T.copy(b, b_s)
            T.gemm(a_s, b_s, c_f, transpose_B=True, clear_accum=True, policy=T.GemmWarpPolicy.Square)
            T.copy(c_f, c)

    return product
"""


def lowers(m, n, threads, arch):
    text = PRODUCT.format(m=m, n=n, threads=threads)
    try:
        adapter.lower(adapter.trace(text, "product", f"<product {m} {n} {threads}>"), target(arch))
    except ToolchainError as e:
        assert "No valid warp partition" in str(e)
        return False
    return True


@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize(
    "m, n, threads", [(48, 32, 128), (48, 48, 128), (80, 64, 128), (80, 80, 128), (96, 96, 128), (80, 80, 64)]
)
def test_divides_says_what_tilelang_says(m, n, threads, arch):
    assert divides(m, n, threads, target(arch)) == lowers(m, n, threads, arch)
