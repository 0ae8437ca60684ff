"""The simulator executes kernels as the GPU would: against float64, with the GPU's rounding and bounds."""

import warnings

import numpy as np
import pytest
from tile_kernels import Scan, bfloat16, gemm, nans, packed, prepare, relative, scan_state_kv, snippet, tokens

from kdagen.errors import SimulationError
from kdagen.simulate.program import Simulator


def run(params, body, *arrays, seed=None, **launch):
    """Runs a snippet in place and returns its statistics."""
    simulator = Simulator(snippet(params, body, **launch), seed=seed)
    simulator(*arrays)
    return simulator.statistics


def test_gemm_with_a_dynamic_partial_tile():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((300, 256)).astype(bfloat16), rng.standard_normal((256, 256)).astype(bfloat16)
    c = nans((300, 256))
    Simulator(gemm())(a, b, c)
    assert relative(c, a.astype(np.float64) @ b.astype(np.float64)) < 1e-6


@pytest.mark.parametrize("chunk", [16, 32])
@pytest.mark.parametrize("seed", [None, 1])
def test_scan_with_state_k_by_v(chunk, seed):
    scan = Scan(chunk, 64, 128, B=2)
    inputs = [tokens(a) for a in (scan.Q, scan.Z, scan.X, scan.Y, scan.INV, scan.A)]
    out, state = nans(inputs[3].shape, bfloat16), nans(scan.S0.shape)
    gates = np.ascontiguousarray(scan.G.swapaxes(1, 2))
    Simulator(scan_state_kv(chunk), seed=seed)(*inputs, gates, scan.S0, out, state)
    expected, expected_state = scan.expected()
    assert relative(out, tokens(expected)) < 5e-3
    assert relative(state, expected_state) < 5e-3


@pytest.mark.parametrize("schedule", ["explicit", "automatic"])
def test_packed_scan_with_transposed_state(schedule):
    scan = Scan(32, 64, 64)
    arrays = scan.packed()
    Simulator(packed(schedule))(*arrays)
    expected, expected_state = scan.expected()
    assert relative(arrays[6], tokens(expected)[0]) < 5e-3
    assert relative(arrays[7].swapaxes(-1, -2), expected_state[0]) < 5e-3


def test_prepare_inverts_the_triangle():
    rng = np.random.default_rng(0)
    C, K, NC = 16, 64, 3
    k = rng.standard_normal((1, NC * C, 2, K)).astype(bfloat16)
    g, beta = -rng.random(k.shape).astype(np.float32), rng.random((1, NC * C, 2)).astype(np.float32)
    inverse = nans((1, NC, 2, C, C), bfloat16)
    Simulator(prepare(C, K))(k, g, beta, inverse)
    for n in range(NC):
        chunk = slice(n * C, (n + 1) * C)
        keys, sums, b = (
            k[0, chunk, 1].astype(np.float64),
            g[0, chunk, 1].astype(np.float64).cumsum(0),
            beta[0, chunk, 1],
        )
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        decays = np.exp2(sums[:, None] - sums)
        lower = np.tril(np.einsum("ik,jk,ijk->ij", keys, keys, decays) * b[:, None], -1)
        assert relative(inverse[0, n, 1], np.linalg.inv(np.eye(C) + lower) * b) < 5e-3


ONE = 'A: T.Tensor((64,), "float32"), B: T.Tensor((64,), "{}")'


def test_a_store_rounds_to_bfloat16_nearest_even():
    a, b = np.zeros(64, np.float32), np.zeros(64, bfloat16)
    a[:4] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.4e38]
    run(ONE.format("bfloat16"), "for i in T.Parallel(64): B[i] = A[i]", a, b)
    assert b[:4].astype(float).tolist() == [1, 1 + 2**-6, 1 + 2**-7, -np.inf]


def test_a_copy_rounds_to_float16_and_overflows_to_infinity():
    a, b = np.zeros(64, np.float32), np.zeros(64, np.float16)
    a[:3] = [1 + 2**-11, 1 + 3 * 2**-11, 1e6]
    run(ONE.format("float16"), "f = T.alloc_fragment((64,), 'float16')\nT.copy(A, f)\nT.copy(f, B)", a, b)
    assert b[:3].tolist() == [1, 1 + 2**-9, np.inf]


def test_arithmetic_of_half_floats_rounds_each_result():
    a, b = np.full(64, 256, bfloat16), np.zeros(64, np.float32)
    params = 'A: T.Tensor((64,), "bfloat16"), B: T.Tensor((64,), "float32")'
    run(params, "for i in T.Parallel(64): B[i] = (A[i] + T.bfloat16(1.0)) + T.bfloat16(1.0)", a, b)
    assert b[0] == 256  # 257 is not a bfloat16


@pytest.mark.parametrize("tf32", [True, False])
def test_float32_products_drop_the_low_bits_of_operands(tf32):
    a, c = np.zeros((64, 16), np.float32), nans((64, 16))
    a[0, 0] = 1 + 2**-11
    b = np.eye(16, dtype=np.float32)
    params = 'A: T.Tensor((64, 16), "float32"), B: T.Tensor((16, 16), "float32"), C: T.Tensor((64, 16), "float32")'
    body = """
a, b = T.alloc_shared((64, 16), "float32"), T.alloc_shared((16, 16), "float32")
c = T.alloc_fragment((64, 16), "float32")
T.copy(A, a)
T.copy(B, b)
T.gemm(a, b, c, clear_accum=True)
T.copy(c, C)
"""
    Simulator(snippet(params, body), tf32=tf32)(a, b, c)
    assert c[0, 0] == (1 if tf32 else 1 + 2**-11)


def test_reset_gates_of_minus_infinity_give_zero_without_a_warning():
    a, b = np.full(64, -np.inf, np.float32), nans(64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ONE.format("float32"), "for i in T.Parallel(64): B[i] = T.exp2(A[i]) + T.exp(T.min(A[i], 0.0))", a, b)
    assert not b.any()


def test_a_difference_of_resets_is_nan_and_max_does_not_hide_it():
    a, b = np.full(64, -np.inf, np.float32), np.zeros(64, np.float32)
    run(ONE.format("float32"), "for i in T.Parallel(64): B[i] = T.max(A[i] - A[0], 0.0)", a, b)
    assert np.isnan(b).all()


@pytest.mark.parametrize("scope", ["shared", "fragment"])
def test_memory_starts_poisoned(scope):
    a, b = np.zeros(64, np.float32), np.zeros(64, np.float32)
    body = f"s = T.alloc_{scope}((64,), 'float32')\nT.copy(A[0:32], s[0:32])\nT.copy(s, B)"
    run(ONE.format("float32"), body, a, b)
    assert not b[:32].any()
    assert np.isnan(b[32:]).all()


PADDED = 'A: T.Tensor((100,), "float32"), B: T.Tensor((100,), "float32")'


def test_boxes_out_of_bounds_read_zero_and_write_nothing():
    a, b = np.ones(100, np.float32), np.zeros(100, np.float32)
    body = """
s = T.alloc_shared((64,), "float32")
T.copy(A[x * 64 : x * 64 + 64], s)
for i in T.Parallel(64): s[i] = s[i] + 1.0
T.copy(s, B[x * 64 : x * 64 + 64])
"""
    statistics = run(PADDED, body, a, b, grid="2")
    assert (b == 2).all()
    assert (statistics.reads_out_of_bounds, statistics.writes_out_of_bounds) == (28, 28)
    assert (statistics.traffic["A"].read, statistics.traffic["B"].written) == (400, 400)


def test_elements_out_of_bounds_read_zero_and_write_nothing():
    a, b = np.ones(100, np.float32), np.full(100, 5, np.float32)
    body = "for i in T.Parallel(64): B[x * 64 + i] = A[x * 64 + i - 10]"
    statistics = run(PADDED, body, a, b, grid="2")
    assert b.tolist() == [0] * 10 + [1] * 90
    assert (statistics.reads_out_of_bounds, statistics.writes_out_of_bounds) == (10 + 18, 28)


def test_guarded_lanes_neither_read_nor_write():
    a, b = np.ones(100, np.float32), np.full(100, 5, np.float32)
    body = """
for i in T.Parallel(64):
    if x * 64 + i < 90:
        B[x * 64 + i] = T.if_then_else(x * 64 + i < 80, A[x * 64 + i], 2.0)
"""
    statistics = run(PADDED, body, a, b, grid="2")
    assert b.tolist() == [1] * 80 + [2] * 10 + [5] * 10
    assert (statistics.reads_out_of_bounds, statistics.writes_out_of_bounds) == (0, 0)
    assert (statistics.traffic["A"].read, statistics.traffic["B"].written) == (320, 360)


def test_traffic_of_a_gemm():
    a, b, c = np.zeros((300, 256), bfloat16), np.zeros((256, 256), bfloat16), nans((300, 256))
    simulator = Simulator(gemm())
    simulator(a, b, c)
    s = simulator.statistics
    assert s.blocks == 6
    assert s.traffic["A"].read == 2 * 300 * 256 * 2  # once a column of blocks
    assert s.traffic["B"].read == 3 * 256 * 256 * 2  # once a row of blocks
    assert s.traffic["C"].written == 300 * 256 * 4
    assert s.bytes_moved == sum((s.traffic["A"].read, s.traffic["B"].read, s.traffic["C"].written))
    assert (s.gemms, s.gemm_flops) == (6 * 4, 2 * 384 * 256 * 256)
    assert s.shared_bytes == 2 * (128 * 64 + 64 * 128)
    assert s.reads_out_of_bounds == 2 * 84 * 256


def test_a_value_that_lanes_share_counts_once():
    a, b = np.ones(64, np.float32), nans((64, 8))
    params = 'A: T.Tensor((64,), "float32"), B: T.Tensor((64, 8), "float32")'
    statistics = run(params, "for i, j in T.Parallel(64, 8): B[i, j] = A[i]", a, b)
    assert statistics.traffic["A"].read == 64 * 4


def test_gemm_flops_grow_as_the_product_of_sizes():
    def flops(m):
        simulator = Simulator(gemm())
        simulator(np.zeros((m, 256), bfloat16), np.zeros((256, 256), bfloat16), nans((m, 256)))
        return simulator.statistics.gemm_flops

    assert flops(512) == 2 * flops(256) == 4 * flops(128)


WRITES = 'A: T.Tensor((4,), "float32"), B: T.Tensor((4,), "float32")'


def test_two_blocks_that_write_one_element_race():
    kernel = snippet(WRITES, "B[x // 2] = A[x]", grid="4")
    with pytest.raises(SimulationError, match="race in 'B': block 1 writes an element that block 0 writes"):
        Simulator(kernel, check_races=True)(np.ones(4, np.float32), np.ones(4, np.float32))


def test_a_block_that_reads_what_another_wrote_races():
    kernel = snippet(WRITES, "B[x] = A[x]\nif x > 0: B[x] = B[x - 1]", grid="4")
    with pytest.raises(SimulationError, match="race in 'B': block 1 reads an element that block 0 writes"):
        Simulator(kernel, check_races=True)(np.ones(4, np.float32), np.ones(4, np.float32))


def test_independent_blocks_do_not_race_in_any_order():
    kernel, results = snippet(WRITES, "B[x] = A[x]\nB[x] = B[x] + 1.0", grid="4"), []
    for seed in (None, 0, 1):
        b = nans(4)
        Simulator(kernel, seed=seed, check_races=True)(np.arange(4, dtype=np.float32), b)
        results.append(b.tolist())
    assert results == [[1, 2, 3, 4]] * 3


def test_a_seed_shuffles_the_blocks():
    a, b = np.arange(4, dtype=np.float32), nans(4)
    order = set()
    for seed in range(8):
        run(WRITES, "B[0] = A[x]", a, b, grid="4", seed=seed)
        order.add(float(b[0]))  # the last block wins
    assert len(order) > 1
