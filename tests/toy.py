"""A two-kernel op small enough to compile in seconds: w = exp(g) x by chunk, then a running sum of w over chunks.

The build is tested on it, so that those tests depend on no recurrence and no skeleton.
"""

from kdagen.codegen.source import KernelSource, OpSource, TensorSpec

CHUNK, K = 16, 64
HEAD = """import tilelang.language as T

B, TIME, H, NC = T.dynamic("B"), T.dynamic("T"), T.dynamic("H"), T.dynamic("NC")

"""
PREPARE = (
    HEAD
    + """
def toy_prepare():
    @T.prim_func
    def toy_prepare(
        x: T.Tensor((B, TIME, H, 64), "bfloat16"),
        g: T.Tensor((B, TIME, H), "float32"),
        w: T.Tensor((B, NC, 16, H, 64), "bfloat16"),
    ):
        with T.Kernel(NC, H, B, threads=64) as (n, h, b):
            xs = T.alloc_shared((16, 64), "bfloat16")
            T.copy(x[b, n * 16 : n * 16 + 16, h, 0:64], xs)
            for i, k in T.Parallel(16, 64):
                t = n * 16 + i
                w[b, n, i, h, k] = T.if_then_else(t < TIME, xs[i, k] * T.exp(g[b, T.min(t, TIME - 1), h]), 0)

    return toy_prepare
"""
)
SCAN = (
    HEAD
    + """
def toy_scan():
    @T.prim_func
    def toy_scan(
        w: T.Tensor((B, NC, 16, H, 64), "bfloat16"),
        initial_state: T.Tensor((B, H, 16, 64), "float32"),
        o: T.Tensor((B, TIME, H, 64), "float32"),
        final_state: T.Tensor((B, H, 16, 64), "float32"),
    ):
        with T.Kernel(H, B, threads=128) as (h, b):
            ws = T.alloc_shared((16, 64), "bfloat16")
            s = T.alloc_fragment((16, 64), "float32")
            for i, k in T.Parallel(16, 64):
                s[i, k] = initial_state[b, h, i, k]
            for n in T.Pipelined(NC, num_stages=STAGES):
                T.copy(w[b, n, 0:16, h, 0:64], ws)
                for i, k in T.Parallel(16, 64):
                    s[i, k] = s[i, k] + ws[i, k]
                T.copy(s, o[b, n * 16 : n * 16 + 16, h, 0:64])
            T.copy(s, final_state[b, h, 0:16, 0:64])

    return toy_scan
"""
)
X = TensorSpec("x", ("B", "T", "H", K), "bfloat16", "argument")
G = TensorSpec("g", ("B", "T", "H"), "float32", "argument")
W = TensorSpec("w", ("B", "NC", CHUNK, "H", K), "bfloat16", "workspace")
INITIAL = TensorSpec("initial_state", ("B", "H", CHUNK, K), "float32", "initial_state")
O = TensorSpec("o", ("B", "T", "H", K), "float32", "out")  # noqa: E741 (the name that every op's output has)
FINAL = TensorSpec("final_state", ("B", "H", CHUNK, K), "float32", "final_state")


def toy(name: str = "toy", target: str = "sm90", stages: int = 2, **texts: str) -> OpSource:
    """The op under another name, for another target, or with a kernel's text replaced."""
    prepare, scan = texts.get("prepare", PREPARE), texts.get("scan", SCAN.replace("STAGES", str(stages)))
    return OpSource(
        name=name,
        kernels=(
            KernelSource("toy_prepare", "prepare", prepare, (X, G, W), threads=64, shared_bytes=2048),
            KernelSource("toy_scan", "scan", scan, (W, INITIAL, O, FINAL), threads=128, shared_bytes=4096),
        ),
        chunk_size=CHUNK,
        dims={"K": K, "V": K},
        dtype="bfloat16",
        schedule={"chunk_size": CHUNK, "stages": stages, "v_tile": K},
        target=target,
    )
