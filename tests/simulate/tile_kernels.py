"""TileLang kernels that the simulators are tested on: a GEMM, scans over chunks, a prepare step, small snippets.

Each scan runs, per chunk,  P = INV (V + Z S),  O = Q S + A P,  S = diag(G) S + X^T P  over a state S (K x V).
"""

import itertools
from textwrap import indent

import ml_dtypes
import numpy as np
import tilelang.language as T

from kdagen.build import adapter

BF16, F32 = "bfloat16", "float32"
bfloat16 = ml_dtypes.bfloat16
_numbers = itertools.count()


def snippet(params: str, body: str, grid: str = "1", names: str = "x", head: str = "", threads: int = 128):
    """The PrimFunc of a kernel written as parameters and body."""
    text = f"import tilelang.language as T\n\ndef kernel():\n{indent(head, '    ')}\n    @T.prim_func\n"
    text += f"    def kernel({params}):\n        with T.Kernel({grid}, threads={threads}) as ({names}):\n"
    text += indent(body, " " * 12) + "\n    return kernel\n"
    return adapter.trace(text, "kernel", f"<snippet {next(_numbers)}>")


def gemm(block=(128, 128, 64), k=256, n=256, dtype=BF16):
    M, (bm, bn, bk) = T.dynamic("M"), block

    @T.prim_func
    def gemm(A: T.Tensor((M, k), dtype), B: T.Tensor((k, n), dtype), C: T.Tensor((M, n), F32)):
        with T.Kernel(T.ceildiv(n, bn), T.ceildiv(M, bm), threads=128) as (x, y):
            a, b = T.alloc_shared((bm, bk), dtype), T.alloc_shared((bk, bn), dtype)
            c = T.alloc_fragment((bm, bn), F32)
            T.clear(c)
            for i in T.Pipelined(T.ceildiv(k, bk), num_stages=3):
                T.copy(A[y * bm, i * bk], a)
                T.copy(B[i * bk, x * bn], b)
                T.gemm(a, b, c)
            T.copy(c, C[y * bm, x * bn])

    return gemm


def scan_state_kv(C, K=64, V=128, bv=64):
    """The state as K x V."""
    B, L, H, NC = T.dynamic("B"), T.dynamic("L"), T.dynamic("H"), T.dynamic("NC")

    @T.prim_func
    def scan(
        Q: T.Tensor((B, L, H, K), BF16),
        Z: T.Tensor((B, L, H, K), BF16),
        X: T.Tensor((B, L, H, K), BF16),
        Y: T.Tensor((B, L, H, V), BF16),
        INV: T.Tensor((B, L, H, C), BF16),
        A: T.Tensor((B, L, H, C), BF16),
        G: T.Tensor((B, NC, H, K), F32),
        S0: T.Tensor((B, H, K, V), F32),
        OUT: T.Tensor((B, L, H, V), BF16),
        S1: T.Tensor((B, H, K, V), F32),
    ):
        with T.Kernel(V // bv, H, B, threads=128) as (v, h, b):
            q, z, x = (T.alloc_shared((C, K), BF16) for _ in range(3))
            y, o, rs, ps = (T.alloc_shared((C, bv), BF16) for _ in range(4))
            inv, a = T.alloc_shared((C, C), BF16), T.alloc_shared((C, C), BF16)
            g, ss = T.alloc_shared((K,), F32), T.alloc_shared((K, bv), BF16)
            s, r = T.alloc_fragment((K, bv), F32), T.alloc_fragment((C, bv), F32)
            p, of = T.alloc_fragment((C, bv), F32), T.alloc_fragment((C, bv), F32)
            T.copy(S0[b, h, 0:K, v * bv : (v + 1) * bv], s)
            for n in T.Pipelined(NC, num_stages=2):
                T.copy(Q[b, n * C : (n + 1) * C, h, 0:K], q)
                T.copy(Z[b, n * C : (n + 1) * C, h, 0:K], z)
                T.copy(X[b, n * C : (n + 1) * C, h, 0:K], x)
                T.copy(Y[b, n * C : (n + 1) * C, h, v * bv : (v + 1) * bv], y)
                T.copy(INV[b, n * C : (n + 1) * C, h, 0:C], inv)
                T.copy(A[b, n * C : (n + 1) * C, h, 0:C], a)
                T.copy(G[b, n, h, 0:K], g)
                T.copy(s, ss)
                T.gemm(z, ss, r, clear_accum=True)
                for i, j in T.Parallel(C, bv):
                    r[i, j] = r[i, j] + y[i, j]
                T.copy(r, rs)
                T.gemm(inv, rs, p, clear_accum=True)
                T.copy(p, ps)
                T.gemm(q, ss, of, clear_accum=True)
                T.gemm(a, ps, of)
                for i, j in T.Parallel(K, bv):
                    s[i, j] = s[i, j] * g[i]
                T.gemm(x, ps, s, transpose_A=True)
                T.copy(of, o)
                T.copy(o, OUT[b, n * C : (n + 1) * C, h, v * bv : (v + 1) * bv])
            T.copy(s, S1[b, h, 0:K, v * bv : (v + 1) * bv])

    return scan


def packed(schedule="explicit", release="late", waits=True, C=32, K=64, V=64, depth=2):
    """The state transposed (V x K) in registers, operands packed [Z; Q] and [INV; A], asynchronous products.

    schedule: "explicit" warp roles or "automatic". release: of a chunk's tiles, "late", after the wait for the last
    product, or "early", before it. waits: whether the first product is waited for before it is used.
    """
    NC, H = T.dynamic("NC"), T.dynamic("H")
    row = T.GemmWarpPolicy.FullRow
    steps = ["s", "zs", "py", "qs", "w0", "r", "pr", "w1", "p", "oa", "decay", "sx", "w2"]
    steps.insert(len(steps) - (release == "early"), T.WSSync.consumer_release("in"))
    fetch = [T.WSSync.producer_acquire("in"), "lz", "lx", "ly", "li", "lg", T.WSSync.producer_commit("in")]
    unfinished = 2 if waits else 3

    def at(name):
        return {T.WSID: name} if schedule == "explicit" else {}

    def annotate(*staged):
        if schedule == "explicit":
            roles = [T.WSRole("fetch", warps_lo=4, warps_hi=5, max_nreg=24)]
            roles.append(T.WSRole("compute", warps_lo=0, warps_hi=4, max_nreg=240))
            compute = [T.WSSync.consumer_wait("in"), *steps, "o", "store"]
            loop = T.WSScope("loop", {"fetch": fetch, "compute": compute})
            root = T.WSScope(T.WSScope.ROOT, {"fetch": ["loop"], "compute": ["first", "loop", "final"]})
            pipeline = T.WSPipeline("in", list(staged), depth=depth)
            schedule_ = T.WSSchedule(num_warps=8, roles=roles, pipelines=[pipeline], scopes=[loop, root])
            T.annotate_ws_schedule(schedule_)

    def chunks(n):
        return T.serial(n, annotations=at("loop")) if schedule == "explicit" else T.Pipelined(n, num_stages=depth)

    @T.prim_func
    def scan(
        ZQ: T.Tensor((H, NC, 2 * C, K), BF16),
        X: T.Tensor((H, NC, C, K), BF16),
        Y: T.Tensor((NC * C, H, V), BF16),
        IA: T.Tensor((H, NC, 2 * C, C), BF16),
        G: T.Tensor((H, NC, K), F32),
        S0: T.Tensor((H, V, K), F32),
        OUT: T.Tensor((NC * C, H, V), BF16),
        S1: T.Tensor((H, V, K), F32),
    ):
        with T.Kernel(H, threads=128) as h:
            zq, x, y = T.alloc_shared((2 * C, K), BF16), T.alloc_shared((C, K), BF16), T.alloc_shared((C, V), BF16)
            ia, g, o = T.alloc_shared((2 * C, C), BF16), T.alloc_shared((K,), F32), T.alloc_shared((C, V), BF16)
            s, sb = T.alloc_fragment((V, K), F32), T.alloc_fragment((V, K), BF16)
            r, rb = T.alloc_fragment((V, C), F32), T.alloc_fragment((V, C), BF16)
            p, pb, of = T.alloc_fragment((V, C), F32), T.alloc_fragment((V, C), BF16), T.alloc_fragment((V, C), F32)
            annotate(zq, x, y, ia, g)
            T.copy(S0[h, 0:V, 0:K], s, annotations=at("first"))
            for n in chunks(NC):
                T.copy(ZQ[h, n, 0 : 2 * C, 0:K], zq, annotations=at("lz"))
                T.copy(X[h, n, 0:C, 0:K], x, annotations=at("lx"))
                T.copy(Y[n * C : (n + 1) * C, h, 0:V], y, annotations=at("ly"))
                T.copy(IA[h, n, 0 : 2 * C, 0:C], ia, annotations=at("li"))
                T.copy(G[h, n, 0:K], g, annotations=at("lg"))
                T.copy(s, sb, annotations=at("s"))
                T.wgmma_gemm(sb, zq[0:C, 0:K], r, transpose_B=True, clear_accum=True, policy=row, annotations=at("zs"))
                T.wgmma_gemm(
                    y,
                    ia[0:C, 0:C],
                    p,
                    transpose_A=True,
                    transpose_B=True,
                    clear_accum=True,
                    policy=row,
                    annotations=at("py"),
                )
                T.wgmma_gemm(
                    sb, zq[C : 2 * C, 0:K], of, transpose_B=True, clear_accum=True, policy=row, annotations=at("qs")
                )
                with T.ws_op("w0"):
                    T.wait_wgmma(unfinished)
                T.copy(r, rb, annotations=at("r"))
                T.wgmma_gemm(rb, ia[0:C, 0:C], p, transpose_B=True, policy=row, annotations=at("pr"))
                with T.ws_op("w1"):
                    T.wait_wgmma(0)
                T.copy(p, pb, annotations=at("p"))
                T.wgmma_gemm(pb, ia[C : 2 * C, 0:C], of, transpose_B=True, policy=row, annotations=at("oa"))
                for i, j in T.Parallel(V, K, annotations=at("decay")):
                    s[i, j] = s[i, j] * g[j]
                T.wgmma_gemm(pb, x, s, policy=row, annotations=at("sx"))
                with T.ws_op("w2"):
                    T.wait_wgmma(0)
                for i, j in T.Parallel(V, C, annotations=at("o")):
                    o[j, i] = of[i, j]
                T.copy(o, OUT[n * C : (n + 1) * C, h, 0:V], annotations=at("store"))
            T.copy(s, S1[h, 0:V, 0:K], annotations=at("final"))

    return scan


def prologue(variant, C=64, K=128, V=64, NC=4):
    """A scan whose state is staged in shared memory before the loop ("copied"), or at the loop's head ("in loop")."""

    @T.prim_func
    def scan(
        Z: T.Tensor((NC * C, K), BF16),
        X: T.Tensor((NC * C, K), BF16),
        S0: T.Tensor((K, V), F32),
        OUT: T.Tensor((NC * C, V), BF16),
    ):
        with T.Kernel(1, threads=128) as _:
            z, x = T.alloc_shared((C, K), BF16), T.alloc_shared((C, K), BF16)
            ss, ps = T.alloc_shared((K, V), BF16), T.alloc_shared((C, V), BF16)
            s, p = T.alloc_fragment((K, V), F32), T.alloc_fragment((C, V), F32)
            if variant == "cleared":
                T.clear(s)
            else:
                T.copy(S0, s)
            if variant != "in loop":
                T.copy(s, ss)
            for n in T.Pipelined(NC, num_stages=2):
                T.copy(Z[n * C, 0], z)
                T.copy(X[n * C, 0], x)
                if variant == "in loop":
                    T.copy(s, ss)
                T.gemm(z, ss, p, clear_accum=True)
                T.copy(p, ps)
                T.gemm(x, ps, s, transpose_A=True)
                if variant != "in loop":
                    T.copy(s, ss)
                T.copy(p, OUT[n * C, 0])

    return scan


def prepare(C=16, K=64):
    """INV = (I + L)^-1 diag(beta), L_ij = beta_i k_i . k_j exp2(g_i - g_j) below the diagonal; g summed in place."""
    B, L, H, NC = T.dynamic("B"), T.dynamic("L"), T.dynamic("H"), T.dynamic("NC")

    @T.prim_func
    def prepare(
        k: T.Tensor((B, L, H, K), BF16),
        g: T.Tensor((B, L, H, K), F32),
        beta: T.Tensor((B, L, H), F32),
        INV: T.Tensor((B, NC, H, C, C), BF16),
    ):
        with T.Kernel(NC, H, B, threads=64) as (n, h, b):
            gs, rows, cols = T.alloc_shared((C, K), F32), T.alloc_shared((C, K), BF16), T.alloc_shared((C, K), BF16)
            kf, be = T.alloc_fragment((C, K), F32), T.alloc_shared((C,), F32)
            square, norm = T.alloc_fragment((C, K), F32), T.alloc_fragment((C,), F32)
            a, inv = T.alloc_fragment((C, C), F32), T.alloc_fragment((C, C), F32)
            powers, left = T.alloc_shared((C, C), "float16"), T.alloc_shared((C, C), "float16")
            T.copy(g[b, n * C : (n + 1) * C, h, 0:K], gs)
            T.copy(k[b, n * C : (n + 1) * C, h, 0:K], kf)
            T.copy(beta[b, n * C : (n + 1) * C, h], be)
            for j in T.Parallel(K):
                for i in T.serial(1, C):
                    gs[i, j] = gs[i, j] + gs[i - 1, j]
            for i, j in T.Parallel(C, K):
                square[i, j] = kf[i, j] * kf[i, j]
            T.reduce_sum(square, norm, dim=1)
            for i, j in T.Parallel(C, K):
                kf[i, j] = kf[i, j] * T.rsqrt(norm[i] + 1e-6)
                rows[i, j] = kf[i, j] * T.exp2(gs[i, j] - gs[C // 2, j])
                cols[i, j] = kf[i, j] * T.exp2(gs[C // 2, j] - gs[i, j])
            T.gemm(rows, cols, a, transpose_B=True, clear_accum=True, policy=T.GemmWarpPolicy.FullRow)
            for i, j in T.Parallel(C, C):
                a[i, j] = T.if_then_else(i > j, -a[i, j] * be[i], 0.0)
                inv[i, j] = T.if_then_else(i == j, 1.0, 0.0) + a[i, j]
            T.copy(a, powers)
            for _ in T.unroll(3):  # (I + A)(I + A^2)(I + A^4)(I + A^8)
                T.gemm(powers, powers, a, clear_accum=True, policy=T.GemmWarpPolicy.FullRow)
                T.copy(inv, left)
                T.copy(a, powers)
                T.gemm(left, powers, inv, policy=T.GemmWarpPolicy.FullRow)
            for i, j in T.Parallel(C, C):
                INV[b, n, h, i, j] = inv[i, j] * be[j]

    return prepare


class Scan:
    """Inputs of a scan, by chunk [B, H, NC, rows, columns], and what it must give, in float64."""

    def __init__(self, C, K, V, B=1, H=2, NC=3, seed=0):
        self.rng, lead = np.random.default_rng(seed), (B, H, NC)
        self.Q, self.Z, self.X = (self.normal(*lead, C, K, scale=0.1) for _ in range(3))
        self.Y, self.INV, self.A = self.normal(*lead, C, V), self.normal(*lead, C, C), self.normal(*lead, C, C)
        self.G = self.rng.uniform(0.5, 1, (*lead, K)).astype(np.float32)
        self.S0 = self.rng.standard_normal((B, H, K, V)).astype(np.float32)

    def normal(self, *shape, scale=0.2):
        return (self.rng.standard_normal(shape) * scale).astype(bfloat16)

    def expected(self):
        wide = {name: a.astype(np.float64) for name, a in vars(self).items() if isinstance(a, np.ndarray)}
        state, outputs = wide["S0"], []
        for n in range(self.G.shape[2]):
            q, z, x, y, inv, a, g = (wide[name][:, :, n] for name in ("Q", "Z", "X", "Y", "INV", "A", "G"))
            p = inv @ (y + z @ state)
            outputs.append(q @ state + a @ p)
            state = g[..., None] * state + x.swapaxes(-1, -2) @ p
        return np.stack(outputs, 2), state

    def packed(self):
        """Arguments of `packed`, for B = 1; outputs start as NaN."""
        chunks = [np.concatenate(pair, 3)[0] for pair in ((self.Z, self.Q), (self.INV, self.A))]
        y = tokens(self.Y)[0]
        s0 = np.ascontiguousarray(self.S0[0].swapaxes(-1, -2))
        return [chunks[0], self.X[0], y, chunks[1], self.G[0], s0, nans(y.shape, bfloat16), nans(s0.shape)]


def tokens(chunks):
    """[B, H, NC, C, D] -> [B, NC C, H, D]."""
    b, h, n, c, d = chunks.shape
    return np.ascontiguousarray(chunks.transpose(0, 2, 3, 1, 4)).reshape(b, n * c, h, d)


def nans(shape, dtype=np.float32):
    return np.full(shape, np.nan, dtype)


def relative(a, b):
    """Norm of the difference over norm."""
    return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b)
