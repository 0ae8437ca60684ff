"""Kernels whose products are of uneven sizes get through TileLang: three steps a token make 48 x 48 solves."""

from foreign import CASES

from kdagen.build import adapter
from kdagen.pipeline import compile_op
from kdagen.target import target


def test_the_prepare_kernel_of_three_steps_lowers():
    (kernel,) = (k for k in compile_op(CASES["householder"][0], 64).kernels if k.family == "prepare")
    assert "__global__" in adapter.lower(adapter.trace(kernel.text, kernel.name, "<steps>"), target("sm90")).source
