"""A training op small enough to read: o = a w with w = exp(g) x, each state passed on; forward, then two kernels back.

It has one of everything that a training build has: a workspace that is kept, one that only the backward uses, with an
entry for each end of a segment, gradients, and the parts of a parameter's gradient.
"""

import dataclasses

from toy import G, K, X

from kdagen.codegen.source import KernelSource, OpSource, TensorSpec

CHUNK, SEGMENT = 16, 2
HEAD = """import tilelang.language as T

B, TIME, H, NC, NE = T.dynamic("B"), T.dynamic("T"), T.dynamic("H"), T.dynamic("NC"), T.dynamic("NE")


def {name}():
    @T.prim_func
    def {name}(
"""
SCAN = """        x: T.Tensor((B, TIME, H, 64), "bfloat16"),
        g: T.Tensor((B, TIME, H), "float32"),
        a: T.Tensor((H,), "float32"),
        initial_state: T.Tensor((B, H, 64, 64), "float32"),
        w: T.Tensor((B, H, NC, 16, 64), "bfloat16"),
        o: T.Tensor((B, TIME, H, 64), "bfloat16"),
        final_state: T.Tensor((B, H, 64, 64), "float32"),
    ):
        with T.Kernel(NC, H, B, threads=64) as (n, h, b):
            for i, k in T.Parallel(16, 64):
                t = n * 16 + i
                if t < TIME:
                    w[b, h, n, i, k] = x[b, t, h, k] * T.exp(g[b, t, h])
                    o[b, t, h, k] = x[b, t, h, k] * T.exp(g[b, t, h]) * a[h]
                else:
                    w[b, h, n, i, k] = 0
            if n == 0:
                for i, k in T.Parallel(64, 64):
                    final_state[b, h, i, k] = initial_state[b, h, i, k]

    return toy_scan
"""
REVERSE = """        d_final_state: T.Tensor((B, H, 64, 64), "float32"),
        d_S_w: T.Tensor((B, H, NE, 64, 64), "float32"),
        d_initial_state: T.Tensor((B, H, 64, 64), "float32"),
    ):
        with T.Kernel(H, B, threads=64) as (h, b):
            for e in T.serial(NE):
                for i, k in T.Parallel(64, 64):
                    d_S_w[b, h, e, i, k] = d_final_state[b, h, i, k]
            for i, k in T.Parallel(64, 64):
                d_initial_state[b, h, i, k] = d_final_state[b, h, i, k]

    return toy_reverse
"""
GRADIENTS = """        x: T.Tensor((B, TIME, H, 64), "bfloat16"),
        g: T.Tensor((B, TIME, H), "float32"),
        a: T.Tensor((H,), "float32"),
        w: T.Tensor((B, H, NC, 16, 64), "bfloat16"),
        d_o_in: T.Tensor((B, TIME, H, 64), "bfloat16"),
        d_S_w: T.Tensor((B, H, NE, 64, 64), "float32"),
        d_x_out: T.Tensor((B, TIME, H, 64), "bfloat16"),
        d_g_out: T.Tensor((B, TIME, H), "float32"),
        d_a_out: T.Tensor((B, H, NC), "float32"),
    ):
        with T.Kernel(NC, H, B, threads=64) as (n, h, b):
            p, s, total = T.alloc_fragment((16, 64), "float32"), T.alloc_fragment((16,), "float32"), T.alloc_fragment((1,), "float32")
            for i, k in T.Parallel(16, 64):
                t = n * 16 + i
                if t < TIME:
                    p[i, k] = T.cast(w[b, h, n, i, k], "float32") * d_o_in[b, t, h, k]
                    d_x_out[b, t, h, k] = T.exp(g[b, t, h]) * d_o_in[b, t, h, k] * a[h]
                else:
                    p[i, k] = 0
            T.reduce_sum(p, s, dim=1)
            for i in T.Parallel(16):
                if n * 16 + i < TIME:
                    d_g_out[b, n * 16 + i, h] = s[i] * a[h] + 0 * d_S_w[b, h, n // 2 + 1, 0, 0]
            T.reduce_sum(s, total, dim=0)
            d_a_out[b, h, n] = total[0]

    return toy_gradients
"""  # noqa: E501
A = TensorSpec("a", ("H",), "float32", "argument")
STATE = TensorSpec("initial_state", ("B", "H", K, K), "float32", "initial_state")
FINAL = dataclasses.replace(STATE, name="final_state", role="final_state")
D_FINAL = dataclasses.replace(STATE, name="d_final_state", role="d_final_state")
D_INITIAL = dataclasses.replace(STATE, name="d_initial_state", role="d_initial_state")
W = TensorSpec("w", ("B", "H", "NC", CHUNK, K), "bfloat16", "workspace")
D_S = TensorSpec("d_S_w", ("B", "H", "NE", K, K), "float32", "workspace")
O = TensorSpec("o", X.shape, "bfloat16", "out")  # noqa: E741
D_O = TensorSpec("d_o_in", X.shape, "bfloat16", "d_out")
D_X = TensorSpec("d_x_out", X.shape, "bfloat16", "gradient")
D_G = TensorSpec("d_g_out", G.shape, "float32", "gradient")
D_A = TensorSpec("d_a_out", ("B", "H", "NC"), "float32", "partial_gradient")


def kernel(name: str, text: str, params: tuple[TensorSpec, ...]) -> KernelSource:
    text = HEAD.format(name=name) + text
    return KernelSource(name, name.removeprefix("toy_"), text, params, threads=64, shared_bytes=0)


def toy(gradients: str = GRADIENTS) -> OpSource:
    """The op, perhaps with another text for its last kernel."""
    return OpSource(
        name="toy",
        kernels=(
            kernel("toy_scan", SCAN, (X, G, A, STATE, W, O, FINAL)),
            kernel("toy_reverse", REVERSE, (D_FINAL, D_S, D_INITIAL)),
            kernel("toy_gradients", gradients, (X, G, A, W, D_O, D_S, D_X, D_G, D_A)),
        ),
        chunk_size=CHUNK,
        dims={"K": K, "V": K},
        dtype="bfloat16",
        schedule={"chunk_size": CHUNK, "segment": SEGMENT, "keep": "states"},
        target="sm90",
        passes={"forward": ("toy_scan",), "backward": ("toy_reverse", "toy_gradients")},
        kept=("w",),
    )
