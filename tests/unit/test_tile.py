"""Tile IR: legality, waits, cost; and what lowering chooses."""

import dataclasses
import math

import pytest
import sympy

from kdagen import zoo
from kdagen.derive.canonical import canonical
from kdagen.derive.chunk import chunk_form
from kdagen.errors import KdagenError, RecurrenceError
from kdagen.ir.tile import Buffer, Copy, Gemm, Kernel, Map, Wait, show, verify
from kdagen.ir.tile_cost import bytes_a_token, chunk_flops
from kdagen.lower.asynchronous import insert_waits
from kdagen.lower.decay import decay_form, factored_rows
from kdagen.lower.expression import tile_text
from kdagen.lower.workspace import Workspace
from kdagen.schedule import DecayForm

A = Buffer("a_s", (16, 64), "bfloat16", "shared")
ROWS = Buffer("rows", ("N1",), "int32", "global", "cu_seqlens")
ACC = Buffer("acc_f", (16, 16), "float32", "fragment")
SRC = Buffer("src_in", ("HV", "NC", 64), "bfloat16", "global", "argument")


def kernel(*body, buffers=(A, ACC, SRC, ROWS), **fields):
    return Kernel("k", "prepare", "prepare", (("n", "NC"),), 64, 1, buffers, (), body, (), chunk_size=16, **fields)


PRODUCT = Gemm("acc_f", "a_s", "a_s", (16, 16, 64), trans_b=True, clear=True, eq="G = A A^T")


def test_a_legal_kernel_passes_and_prints():
    legal = kernel(
        Copy("a_s", "src_in[h, n, 0:64]"), PRODUCT, lets=(("start", "rows[n]"),), chunk_lets=(("m", "start + n"),)
    )
    assert verify(legal) == legal
    assert "acc_f = a_s @ a_s.T    # G = A A^T" in show(legal)
    assert "  let start = rows[n]\n  let m = start + n\n" in show(legal)


@pytest.mark.parametrize(
    "broken, message",
    [
        (kernel(Copy("a_s", "b_s")), "uses 'b_s', which is no buffer"),
        (kernel(Map((("i", 16),), (("a_s[i]", "0.0"),))), "gives 1 indices to a_s"),
        (kernel(dataclasses.replace(PRODUCT, size=(16, 16, 60))), "k of 8"),
        (kernel(dataclasses.replace(PRODUCT, size=(32, 16, 64))), "needs an fp32 fragment"),
        (kernel(dataclasses.replace(PRODUCT, acc="a_s")), "needs an fp32 fragment"),
        (kernel(buffers=(A, A)), "declared twice"),
        (
            kernel(lets=(("start", "cu_seqlens[b]"),)),
            "'start = cu_seqlens\\[b\\]' uses 'cu_seqlens', which is no buffer",
        ),
        (kernel(chunk_lets=(("row", "rows[n, 0]"),)), "gives 2 indices to rows"),
    ],
)
def test_illegal_kernels_are_refused(broken, message):
    with pytest.raises(KdagenError, match=message):
        verify(broken)


def test_traffic_counts_slices_and_elements():
    moved = kernel(
        Copy("a_s", "src_in[h, n * 2:n * 2 + 2, 0:64]"),
        Map((("i", 16), ("j", 64)), (("a_s[i, j]", "src_in[h, n, j] + src_in[h, n, j]"),)),
    )
    assert bytes_a_token(moved) == (2 * 64 * 2 + 64 * 2) / 16


def test_flops_count_every_v_tile():
    tiled = dataclasses.replace(kernel(PRODUCT), grid=(("tile_b", "2 * N"), ("h", "HV")))
    assert chunk_flops(tiled) == 2 * chunk_flops(kernel(PRODUCT)) == 2 * 2 * 16 * 16 * 64


def test_waits_stand_where_a_result_is_needed_and_no_earlier():
    first = Gemm("r_f", "sb_f", "z_s", (64, 16, 64), clear=True)
    other = Gemm("o_f", "sb_f", "q_s", (64, 16, 64), clear=True)
    use = Copy("rb_f", "r_f")
    body = insert_waits((first, other, use, Gemm("o_f", "rb_f", "m_s", (64, 16, 16))))
    assert [s.pending if isinstance(s, Wait) else "-" for s in body] == ["-", "-", 1, "-", "-", 0]


def test_overwriting_an_operand_in_use_waits():
    product = Gemm("r_f", "sb_f", "z_s", (64, 16, 64), clear=True)
    assert insert_waits((product, Copy("sb_f", "s_f")))[1] == Wait(0)


def test_statements_that_touch_nothing_in_flight_do_not_wait():
    product = Gemm("r_f", "sb_f", "z_s", (64, 16, 64), clear=True)
    scale = Map((("i", 64),), (("s_f[i]", "s_f[i] * 0.5"),))
    assert insert_waits((product, scale)) == (product, scale, Wait(0))


x, y = sympy.symbols("x y", real=True)


@pytest.mark.parametrize(
    "expression, text",
    [
        (x * y, "X*Y"),
        (x**2 / 2, "((X) * (X))/2.0"),
        (x * (y + 1e-6) ** sympy.Rational(-1, 2), "X/T.sqrt(Y + 1e-06)"),
        (sympy.Max(x, 0), "T.max(0.0, X)"),
        (sympy.pi * x, "3.141592653589793*X"),
        (x * sympy.KroneckerDelta(sympy.Symbol("i"), sympy.Symbol("j")), "X*T.if_then_else(i == j, 1.0, 0.0)"),
    ],
)
def test_expressions_as_text(expression, text):
    accesses = {x: "X", y: "Y", sympy.Symbol("i"): "i", sympy.Symbol("j"): "j"}
    assert tile_text(expression, accesses) == text


def test_a_function_without_gpu_form_is_named():
    with pytest.raises(RecurrenceError, match="gamma.* has no GPU form: expected functions among exp"):
        tile_text(sympy.gamma(x), {x: "X"})


def test_decay_form_follows_from_the_bound():
    bounded, unbounded = canonical(zoo.get("kda_bounded")), canonical(zoo.get("kda"))
    assert decay_form(bounded, 16)[0] == DecayForm.FACTORED
    assert decay_form(bounded, 32)[0] == DecayForm.TREE
    assert decay_form(bounded, 16, "float16")[0] == DecayForm.TREE
    assert decay_form(bounded, 16, training=True)[0] == DecayForm.TREE
    assert decay_form(unbounded, 16)[0] == DecayForm.TREE
    assert decay_form(canonical(zoo.get("gated_deltanet")), 64)[0] == DecayForm.SCALAR
    assert decay_form(canonical(zoo.get("deltanet")), 64)[0] == DecayForm.NONE


@pytest.mark.parametrize("bound", [-0.5, -2.0, -5.0, -20.0])
def test_factored_rows_keep_exponents_in_range(bound):
    for training, most in ((False, 126), (True, 63)):
        rows, rate = factored_rows(bound, training=training), abs(bound) * math.log2(math.e)
        assert rows * rate <= most < (rows + 1) * rate


@pytest.mark.parametrize("name", zoo.names())
def test_packed_operands_do_not_overlap(name):
    workspace = Workspace(chunk_form(canonical(zoo.get(name))), 16, {"K": 64, "V": 64}, "bfloat16")
    for buffer, height in workspace.heights.items():
        places = sorted((p.row, p.rows) for p in workspace.packed.values() if p.buffer == buffer)
        ends = [row + rows for row, rows in places]
        assert [row for row, _ in places] == [0, *ends[:-1]] and ends[-1] == height
