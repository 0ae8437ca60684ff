"""A training op small enough to read: o = a w with w = exp(g) x, each state passed on; forward, then two kernels back.

It has one of everything that a training build has: a workspace that is kept, one that only the backward uses, with an
entry for each segment, gradients, that of a key with a head for each value head, and the parts of a parameter's.
"""

import dataclasses

from toy import CHUNK_ROWS, CU_SEQLENS, HEAD, INDEX, G, K, X

from kdagen.codegen.source import KernelSource, OpSource, TensorSpec

CHUNK, SEGMENT = 16, 2
INDEX_TABLES = INDEX.replace(
    """chunk_rows: T.Tensor((NC, 2), "int32")):""",
    """chunk_rows: T.Tensor((NC, 2), "int32"), segments: T.Tensor((NG, 2), "int32")):""",
).replace(
    """            for step in""",
    """            for i in T.Parallel(1):
                segments[cu_seqlens[b] // 32 + b, 0] = first
                segments[cu_seqlens[b] // 32 + b, 1] = T.min((cu_seqlens[b + 1] - cu_seqlens[b] + 15) // 16, 2)
            for step in""",
)
DEF = """

def {name}():
    @T.prim_func
    def {name}(
"""
SCAN = """        x: T.Tensor((TIME, H, 64), "bfloat16"),
        g: T.Tensor((TIME, HV), "float32"),
        a: T.Tensor((HV,), "float32"),
        chunk_rows: T.Tensor((NC, 2), "int32"),
        initial_state: T.Tensor((N, HV, 64, 64), "float32"),
        w: T.Tensor((HV, NC, 16, 64), "bfloat16"),
        o: T.Tensor((TIME, HV, 64), "bfloat16"),
        final_state: T.Tensor((N, HV, 64, 64), "float32"),
    ):
        with T.Kernel(NC, HV, threads=64) as (n, h):
            for i, k in T.Parallel(16, 64):
                t = chunk_rows[n, 0] + i
                if i < chunk_rows[n, 1]:
                    w[h, n, i, k] = x[t, h * H // HV, k] * T.exp(g[t, h])
                    o[t, h, k] = x[t, h * H // HV, k] * T.exp(g[t, h]) * a[h]
                else:
                    w[h, n, i, k] = 0
            if n < N:
                for i, k in T.Parallel(64, 64):
                    final_state[n, h, i, k] = initial_state[n, h, i, k]

    return toy_scan
"""
REVERSE = """        d_final_state: T.Tensor((N, HV, 64, 64), "float32"),
        d_S_w: T.Tensor((HV, NG, 64, 64), "float32"),
        d_initial_state: T.Tensor((N, HV, 64, 64), "float32"),
    ):
        with T.Kernel(N, HV, threads=64) as (b, h):
            for e in T.serial(NG):
                for i, k in T.Parallel(64, 64):
                    d_S_w[h, e, i, k] = d_final_state[b, h, i, k]
            for i, k in T.Parallel(64, 64):
                d_initial_state[b, h, i, k] = d_final_state[b, h, i, k]

    return toy_reverse
"""
GRADIENTS = """        x: T.Tensor((TIME, H, 64), "bfloat16"),
        g: T.Tensor((TIME, HV), "float32"),
        a: T.Tensor((HV,), "float32"),
        chunk_rows: T.Tensor((NC, 2), "int32"),
        segments: T.Tensor((NG, 2), "int32"),
        w: T.Tensor((HV, NC, 16, 64), "bfloat16"),
        d_o_in: T.Tensor((TIME, HV, 64), "bfloat16"),
        d_S_w: T.Tensor((HV, NG, 64, 64), "float32"),
        d_x_out: T.Tensor((TIME, HV, 64), "bfloat16"),
        d_g_out: T.Tensor((TIME, HV), "float32"),
        d_a_out: T.Tensor((HV, NC), "float32"),
    ):
        with T.Kernel(NC, HV, threads=64) as (n, h):
            p, s, total = T.alloc_fragment((16, 64), "float32"), T.alloc_fragment((16,), "float32"), T.alloc_fragment((1,), "float32")
            for i, k in T.Parallel(16, 64):
                t = chunk_rows[n, 0] + i
                if i < chunk_rows[n, 1]:
                    p[i, k] = T.cast(w[h, n, i, k], "float32") * d_o_in[t, h, k]
                    d_x_out[t, h, k] = T.exp(g[t, h]) * d_o_in[t, h, k] * a[h] + 0 * x[t, 0, k]
                else:
                    p[i, k] = 0
            T.reduce_sum(p, s, dim=1)
            for i in T.Parallel(16):
                if i < chunk_rows[n, 1]:
                    d_g_out[chunk_rows[n, 0] + i, h] = s[i] * a[h] + 0 * d_S_w[h, 0, 0, 0] + 0 * segments[0, 0]
            T.reduce_sum(s, total, dim=0)
            d_a_out[h, n] = total[0]

    return toy_gradients
"""  # noqa: E501
SEGMENTS = TensorSpec("segments", ("NG", 2), "int32", "workspace")
A = TensorSpec("a", ("HV",), "float32", "argument")
STATE = TensorSpec("initial_state", ("N", "HV", K, K), "float32", "initial_state")
FINAL = dataclasses.replace(STATE, name="final_state", role="final_state")
D_FINAL = dataclasses.replace(STATE, name="d_final_state", role="d_final_state")
D_INITIAL = dataclasses.replace(STATE, name="d_initial_state", role="d_initial_state")
W = TensorSpec("w", ("HV", "NC", CHUNK, K), "bfloat16", "workspace")
D_S = TensorSpec("d_S_w", ("HV", "NG", K, K), "float32", "workspace")
O = TensorSpec("o", ("T", "HV", K), "bfloat16", "out")  # noqa: E741
D_O = TensorSpec("d_o_in", O.shape, "bfloat16", "d_out")
D_X = TensorSpec("d_x_out", O.shape, "bfloat16", "gradient")
D_G = TensorSpec("d_g_out", G.shape, "float32", "gradient")
D_A = TensorSpec("d_a_out", ("HV", "NC"), "float32", "partial_gradient")


def kernel(name: str, text: str, params: tuple[TensorSpec, ...]) -> KernelSource:
    text = text if text.startswith(HEAD) else HEAD + DEF.format(name=name) + text
    return KernelSource(name, name.removeprefix("toy_"), text, params, threads=64, shared_bytes=0)


def toy(gradients: str = GRADIENTS) -> OpSource:
    """The op, perhaps with another text for its last kernel."""
    return OpSource(
        name="toy",
        kernels=(
            kernel("toy_index", INDEX_TABLES, (CU_SEQLENS, CHUNK_ROWS, SEGMENTS)),
            kernel("toy_scan", SCAN, (X, G, A, CHUNK_ROWS, STATE, W, O, FINAL)),
            kernel("toy_reverse", REVERSE, (D_FINAL, D_S, D_INITIAL)),
            kernel("toy_gradients", gradients, (X, G, A, CHUNK_ROWS, SEGMENTS, W, D_O, D_S, D_X, D_G, D_A)),
        ),
        chunk_size=CHUNK,
        dims={"K": K, "V": K},
        dtype="bfloat16",
        schedule={"chunk_size": CHUNK, "segment": SEGMENT, "keep": "states"},
        target="sm90",
        passes={
            "forward": ("toy_index", "toy_scan"),
            "backward": ("toy_index", "toy_reverse", "toy_gradients"),
        },
        kept=("w",),
    )
