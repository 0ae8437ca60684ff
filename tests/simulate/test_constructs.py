"""Each construct that generated kernels use, against numpy."""

import numpy as np
import pytest
from tile_kernels import bfloat16, nans, snippet

from kdagen.errors import ArgumentError, SimulationError
from kdagen.simulate.program import Simulator

TWO = 'A: T.Tensor((8, 16), "float32"), B: T.Tensor((8, 16), "float32")'


@pytest.fixture
def a():
    return np.random.default_rng(0).uniform(0.1, 2, (8, 16)).astype(np.float32)


def result(body, a, **launch):
    b = nans((8, 16))
    Simulator(snippet(TWO, body, **launch))(a, b)
    return b


def lanes(expression):
    return f"for i, j in T.Parallel(8, 16): B[i, j] = {expression}"


@pytest.mark.parametrize(
    "written, function",
    {
        "T.exp(A[i, j])": np.exp,
        "T.exp2(A[i, j])": np.exp2,
        "T.log(A[i, j])": np.log,
        "T.log2(A[i, j])": np.log2,
        "T.log1p(A[i, j])": np.log1p,
        "T.sqrt(A[i, j])": np.sqrt,
        "T.rsqrt(A[i, j])": lambda a: 1 / np.sqrt(a),
        "T.tanh(A[i, j])": np.tanh,
        "T.sigmoid(A[i, j])": lambda a: 1 / (1 + np.exp(-a)),
        "T.abs(-A[i, j])": np.abs,
        "T.pow(A[i, j], 2.5)": lambda a: a**2.5,
        "T.clamp(A[i, j], 0.5, 1.0)": lambda a: a.clip(0.5, 1),
        "T.max(A[i, j], 1.0) - T.min(A[i, j], 1.0)": lambda a: abs(a - 1),
        "T.floor(A[i, j]) + T.ceil(A[i, j])": lambda a: np.floor(a) + np.ceil(a),
        "T.cast(T.cast(A[i, j] * 10.0, 'int32'), 'float32')": lambda a: np.trunc(a * 10),
        "T.cast(T.cast(A[i, j], 'bfloat16'), 'float32')": lambda a: a.astype(bfloat16).astype(np.float32),
        "T.Select(A[i, j] > 1.0, 1.0, 0.0)": lambda a: a > 1,
        "T.if_then_else(T.And(A[i, j] > 1.0, T.Not(j == 3)), A[i, j], 0.0)": lambda a: np.where(
            (a > 1) & (np.arange(16) != 3), a, 0
        ),
        "T.if_then_else(T.isinf(A[i, j]), 1.0, T.infinity('float32'))": lambda a: a + np.inf,
        "A[i, j] / A[i, (j + 1) % 16]": lambda a: a / np.roll(a, -1, 1),
        "A[7 - i, j // 2 * 2]": lambda a: a[::-1, np.arange(16) // 2 * 2],
        "A[T.bitwise_xor(i, 1), T.shift_left(j, 1) % 16]": lambda a: a[
            np.arange(8)[:, None] ^ 1, np.arange(16) * 2 % 16
        ],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_expressions(written, function, a):
    np.testing.assert_allclose(result(lanes(written), a), function(a), rtol=1e-6)


def test_a_bound_value_keeps_what_memory_held(a):
    body = """
f = T.alloc_fragment((8, 16), "float32")
T.copy(A, f)
for i, j in T.Parallel(8, 16):
    e = f[i, j]
    f[i, j] = 0.0
    B[i, j] = e
"""
    np.testing.assert_array_equal(result(body, a), a)


def test_a_serial_loop_inside_parallel_lanes(a):
    body = """
T.copy(A, B)
for j in T.Parallel(16):
    for i in T.serial(1, 8):
        B[i, j] = B[i, j] + B[i - 1, j]
"""
    np.testing.assert_allclose(result(body, a), np.cumsum(a, 0), rtol=1e-6)


def test_a_serial_loop_whose_length_differs_by_lane(a):
    body = """
T.clear(B)
for i, j in T.Parallel(8, 16):
    for k in T.serial(i):
        B[i, j] = B[i, j] + A[k, j]
"""
    np.testing.assert_allclose(result(body, a), np.cumsum(a, 0) - a, rtol=1e-5, atol=1e-6)


def test_a_variable_of_each_lane(a):
    body = """
for j in T.Parallel(16):
    total = T.alloc_var("float32")
    total = 0.0
    for i in T.serial(8):
        total = total + A[i, j]
        B[i, j] = total
"""
    np.testing.assert_allclose(result(body, a), np.cumsum(a, 0), rtol=1e-6)


def test_a_variable_of_each_lane_is_undefined_after_the_lanes(a):
    body = """
v = T.alloc_var("float32")
for i, j in T.Parallel(8, 16):
    v = A[i, j]
for i, j in T.Parallel(8, 16):
    B[i, j] = v
"""
    assert np.isnan(result(body, a)).all()


def test_local_arrays_while_and_break(a):
    body = """
l = T.alloc_local((4,), "float32")
n = T.alloc_var("int32")
n = 0
for i in T.unroll(4):
    l[i] = A[i, 0]
while n < 3:
    n = n + 1
for i in T.serial(8):
    if i == 4:
        T.loop_break()
    B[0, i] = l[i] + T.cast(n, "float32")
"""
    b = result(body, a)
    np.testing.assert_allclose(b[0, :4], a[:4, 0] + 3)
    assert np.isnan(b[0, 4:]).all()


def test_branches_on_scalars_and_lanes(a):
    body = """
for i, j in T.Parallel(8, 16):
    if i < 4:
        B[i, j] = A[i, j]
    elif j < 8:
        B[i, j] = 1.0
    else:
        B[i, j] = 2.0
if x == 1:
    T.fill(B[0:1, 0:16], 7.0)
"""
    expected = np.where(np.arange(8)[:, None] < 4, a, np.where(np.arange(16) < 8, 1, 2))
    expected[0] = 7
    np.testing.assert_array_equal(result(body, a, grid="2"), expected)


REDUCTIONS = {"sum": np.sum, "max": np.max, "min": np.min, "abssum": lambda a, i: np.abs(a).sum(i)}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reductions(kind, axis, a):
    n = (16, 8)[axis]
    body = f"""
f, r = T.alloc_fragment((8, 16), "float32"), T.alloc_fragment(({n},), "float32")
T.copy(A, f)
T.reduce_{kind}(f, r, dim={axis})
for i in T.Parallel({n}): B[0, i] = r[i]
"""
    np.testing.assert_allclose(result(body, a)[0, :n], REDUCTIONS[kind](a, axis), rtol=1e-6)


def test_a_reduction_that_does_not_clear(a):
    body = """
f, r = T.alloc_fragment((8, 16), "float32"), T.alloc_fragment((8,), "float32")
T.copy(A, f)
T.fill(r, 1.5)
T.reduce_max(f, r, dim=1, clear=False)
for i in T.Parallel(8): B[0, i] = r[i]
"""
    np.testing.assert_array_equal(result(body, a)[0, :8], np.maximum(a.max(1), 1.5))


@pytest.mark.parametrize("reverse", [False, True])
def test_cumsum(reverse, a):
    body = f"s = T.alloc_shared((8, 16), 'float32')\nT.copy(A, s)\nT.cumsum(s, dim=1, reverse={reverse})\nT.copy(s, B)"
    turned = a[:, ::-1] if reverse else a
    expected = np.cumsum(turned, 1)[:, ::-1] if reverse else np.cumsum(turned, 1)
    np.testing.assert_allclose(result(body, a), expected, rtol=1e-6)


def test_reshape_shares_memory(a):
    body = """
s = T.alloc_shared((8, 16), "float32")
T.copy(A, s)
t = T.reshape(s, (16, 8))
for i, j in T.Parallel(16, 8): t[i, j] = t[i, j] * 2.0
T.copy(s, B)
"""
    np.testing.assert_array_equal(result(body, a), a * 2)


def test_atomic_add_over_lanes_and_blocks(a):
    b = np.zeros((8, 16), np.float32)
    body = "for i, j in T.Parallel(8, 16): T.atomic_add(B[0, j], A[i, j])"
    Simulator(snippet(TWO, body, grid="3"))(a, b)
    np.testing.assert_allclose(b[0], 3 * a.sum(0), rtol=1e-6)


def test_products_of_slices_and_transposes():
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((2, 64, 64)).astype(bfloat16), nans((64, 64)), nans((64, 64))
    params = 'A: T.Tensor((2, 64, 64), "bfloat16"), B: T.Tensor((64, 64), "float32"), C: T.Tensor((64, 64), "float32")'
    body = """
s, f = T.alloc_shared((2, 64, 64), "bfloat16"), T.alloc_fragment((64, 64), "float32")
T.copy(A, s)
T.gemm(s[0, 0:64, 0:64], s[1, 0:64, 0:64], f, transpose_A=True, clear_accum=True)
T.copy(f, B)
T.gemm(s[0, 0:64, 0:32], s[1, 0:64, 0:32], f, transpose_B=True)
T.copy(f, C)
"""
    Simulator(snippet(params, body))(a, b, c)
    wide = a.astype(np.float64)
    first = wide[0].T @ wide[1]
    np.testing.assert_allclose(b, first, atol=1e-4)
    np.testing.assert_allclose(c, first + wide[0][:, :32] @ wide[1][:, :32].T, atol=1e-4)


def test_five_dims_dynamic_sizes_and_a_size_that_is_an_expression():
    a = np.random.default_rng(0).standard_normal((2, 3, 5, 4, 8)).astype(np.float32)
    b, ends = nans(a.shape), np.arange(4, dtype=np.int32)
    params = 'A: T.Tensor((L, N, 5, H, 8), "float32"), E: T.Tensor((N + 1,), "int32"), '
    params += 'B: T.Tensor((L, N, 5, H, 8), "float32"), scale: T.float32'
    body = """
s = T.alloc_shared((5, 8), "float32")
T.copy(A[l, n, 0:5, h, 0:8], s)
for i, j in T.Parallel(5, 8): B[l, n, i, h, j] = s[i, j] * scale + T.cast(E[n + 1], "float32")
"""
    head = 'L, N, H = T.dynamic("L"), T.dynamic("N"), T.dynamic("H")'
    kernel = Simulator(snippet(params, body, "H, N, L", "h, n, l", head))
    kernel(a, ends, b, np.float32(2))
    np.testing.assert_array_equal(b, a * 2 + np.arange(1, 4, dtype=np.float32)[:, None, None, None])
    with pytest.raises(ArgumentError, match=r"E.shape\[0\] is 5, expected N \+ 1 = 4"):
        kernel(a, np.arange(5, dtype=np.int32), b, np.float32(2))


def test_an_index_of_a_thread_is_refused(a):
    with pytest.raises(SimulationError, match="'tx' has no value here"):
        result("B[0, 0] = T.cast(T.get_thread_binding(), 'float32')", a)
