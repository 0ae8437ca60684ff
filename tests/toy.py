"""A three-kernel op small enough to compile in seconds: w = exp(g) x by chunk, then a running sum of w over chunks.

The build is tested on it, so that those tests depend on no recurrence and no skeleton. It has one of everything that
an op for inference has: ragged sequences, two kinds of heads, states on the way, an integer passed by value.
"""

from kdagen.codegen.source import KernelSource, OpSource, TensorSpec
from kdagen.state import DEFAULT, StateType

CHUNK, K = 16, 64
DIMS = ("T", "N", "N1", "H", "HV", "NC", "NG", "NS", "S", "W")
HEAD = "import tilelang.language as T\n\n" + "".join(f'{"TIME" if d == "T" else d} = T.dynamic("{d}")\n' for d in DIMS)
INDEX = (
    HEAD
    + """

def toy_index():
    @T.prim_func
    def toy_index(cu_seqlens: T.Tensor((N1,), "int32"), chunk_rows: T.Tensor((NC, 2), "int32")):
        with T.Kernel(N1 - 1, threads=64) as b:
            first = cu_seqlens[b] // 16 + b
            for step in T.serial((cu_seqlens[b + 1] // 16 + b + 1 - first + 63) // 64):
                for i in T.Parallel(64):
                    if step * 64 + i < cu_seqlens[b + 1] // 16 + b + 1 - first:
                        row = cu_seqlens[b] + (step * 64 + i) * 16
                        chunk_rows[first + step * 64 + i, 0] = row
                        chunk_rows[first + step * 64 + i, 1] = T.max(T.min(cu_seqlens[b + 1] - row, 16), 0)

    return toy_index
"""
)
PREPARE = (
    HEAD
    + """

def toy_prepare():
    @T.prim_func
    def toy_prepare(
        x: T.Tensor((TIME, H, 64), "bfloat16"),
        g: T.Tensor((TIME, HV), "float32"),
        chunk_rows: T.Tensor((NC, 2), "int32"),
        w: T.Tensor((HV, NC, 16, 64), "bfloat16"),
    ):
        with T.Kernel(NC, HV, threads=64) as (n, h):
            xs = T.alloc_shared((16, 64), "bfloat16")
            row = T.min(chunk_rows[n, 0], TIME)
            T.copy(x[row : row + 16, h * H // HV, 0:64], xs)
            for i, k in T.Parallel(16, 64):
                t = T.min(row + i, TIME - 1)
                w[h, n, i, k] = T.if_then_else(i < chunk_rows[n, 1], xs[i, k] * T.exp(g[t, h]), 0)

    return toy_prepare
"""
)
SCAN = (
    HEAD
    + """

def toy_scan():
    @T.prim_func
    def toy_scan(
        w: T.Tensor((HV, NC, 16, 64), "bfloat16"),
        cu_seqlens: T.Tensor((N1,), "int32"),
        initial_state: T.Tensor((N, HV, 16, 64), "float32"),
        every: T.int32,
        o: T.Tensor((TIME, HV, 64), "float32"),
        states: T.Tensor((NS, HV, 16, 64), "float32"),
        final_state: T.Tensor((N, HV, 16, 64), "float32"),
    ):
        with T.Kernel(N, HV, threads=128) as (b, h):
            ws = T.alloc_shared((16, 64), "bfloat16")
            s = T.alloc_fragment((16, 64), "float32")
            for i, k in T.Parallel(16, 64):
                s[i, k] = initial_state[b, h, i, k]
            first = cu_seqlens[b] // 16 + b
            for n in T.Pipelined((cu_seqlens[b + 1] - cu_seqlens[b] + 15) // 16, num_stages=STAGES):
                T.copy(w[h, first + n, 0:16, 0:64], ws)
                for i, k in T.Parallel(16, 64):
                    s[i, k] = s[i, k] + ws[i, k]
                for i, k in T.Parallel(16, 64):
                    if cu_seqlens[b] + n * 16 + i < T.min(cu_seqlens[b + 1], TIME):
                        o[cu_seqlens[b] + n * 16 + i, h, k] = s[i, k]
                for i, k in T.Parallel(16, 64):
                    if (n + 1) % every == 0:
                        if cu_seqlens[b] // (16 * every) + n // every < NS:
                            states[cu_seqlens[b] // (16 * every) + n // every, h, i, k] = s[i, k]
            T.copy(s, final_state[b, h, 0:16, 0:64])

    return toy_scan
"""
)
X = TensorSpec("x", ("T", "H", K), "bfloat16", "argument")
G = TensorSpec("g", ("T", "HV"), "float32", "argument")
CU_SEQLENS = TensorSpec("cu_seqlens", ("N1",), "int32", "cu_seqlens")
CHUNK_ROWS = TensorSpec("chunk_rows", ("NC", 2), "int32", "workspace")
W = TensorSpec("w", ("HV", "NC", CHUNK, K), "bfloat16", "workspace")
EVERY = TensorSpec("every", (), "int32", "scalar")
INITIAL = TensorSpec("initial_state", ("N", "HV", CHUNK, K), "float32", "initial_state")
O = TensorSpec("o", ("T", "HV", K), "float32", "out")  # noqa: E741 (the name that every op's output has)
STATES = TensorSpec("states", ("NS", "HV", CHUNK, K), "float32", "states")
FINAL = TensorSpec("final_state", INITIAL.shape, "float32", "final_state")
SCANNED = (W, CU_SEQLENS, INITIAL, EVERY, O, STATES, FINAL)


def toy(name: str = "toy", target: str = "sm90", stages: int = 2, state: StateType = DEFAULT, **texts: str) -> OpSource:
    """The op under another name, for another target, or with a kernel's text replaced."""
    prepare, scan = texts.get("prepare", PREPARE), texts.get("scan", SCAN.replace("STAGES", str(stages)))
    return OpSource(
        name=name,
        kernels=(
            KernelSource("toy_index", "index", INDEX, (CU_SEQLENS, CHUNK_ROWS), threads=64, shared_bytes=0),
            KernelSource("toy_prepare", "prepare", prepare, (X, G, CHUNK_ROWS, W), threads=64, shared_bytes=2048),
            KernelSource("toy_scan", "scan", scan, SCANNED, threads=128, shared_bytes=4096),
        ),
        chunk_size=CHUNK,
        dims={"K": K, "V": K},
        dtype="bfloat16",
        schedule={"chunk_size": CHUNK, "stages": stages, "v_tile": K},
        target=target,
        state=state,
    )
