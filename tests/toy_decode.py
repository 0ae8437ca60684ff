"""The decode op that goes with kdagen's toys: each sequence's slot of a pool gets exp(g) x of its tokens added."""

from toy import CU_SEQLENS, HEAD, G, K, X

from kdagen.codegen.source import KernelSource, OpSource, TensorSpec
from kdagen.state import DEFAULT, StateType

DECODE = (
    HEAD
    + """

def toy_decode():
    @T.prim_func
    def toy_decode(
        x: T.Tensor((TIME, H, 64), "bfloat16"),
        g: T.Tensor((TIME, HV), "float32"),
        cu_seqlens: T.Tensor((N1,), "int32"),
        state_pool: T.Tensor((S, HV, 64), "float32"),
        state_indices: T.Tensor((N, W), "int32"),
        num_accepted_tokens: T.Tensor((N,), "int32"),
        null_below: T.int32,
        o_out: T.Tensor((TIME, HV, 64), "bfloat16"),
        new_state_pool: T.Tensor((S, HV, 64), "float32"),
    ):
        with T.Kernel(N, HV, threads=64) as (b, h):
            s = T.alloc_fragment((64,), "float32")
            slot = state_indices[b, T.max(T.min(num_accepted_tokens[b], W) - 1, 0)]
            if (slot >= null_below) & (slot < S):
                for k in T.Parallel(64):
                    s[k] = state_pool[slot, h, k]
                for t in T.serial(cu_seqlens[b + 1] - cu_seqlens[b]):
                    for k in T.Parallel(64):
                        s[k] = s[k] + x[cu_seqlens[b] + t, h * H // HV, k] * T.exp(g[cu_seqlens[b] + t, h])
                    for k in T.Parallel(64):
                        o_out[cu_seqlens[b] + t, h, k] = s[k]
                for k in T.Parallel(64):
                    new_state_pool[slot, h, k] = s[k]

    return toy_decode
"""
)
POOL = TensorSpec("state_pool", ("S", "HV", K), "float32", "state_pool")
NEW_POOL = TensorSpec("new_state_pool", POOL.shape, "float32", "new_state_pool")
INDICES = TensorSpec("state_indices", ("N", "W"), "int32", "state_indices")
ACCEPTED = TensorSpec("num_accepted_tokens", ("N",), "int32", "num_accepted_tokens")
NULL_BELOW = TensorSpec("null_below", (), "int32", "scalar")
O_OUT = TensorSpec("o_out", ("T", "HV", K), "bfloat16", "out")
PARAMS = (X, G, CU_SEQLENS, POOL, INDICES, ACCEPTED, NULL_BELOW, O_OUT, NEW_POOL)


def toy(state: StateType = DEFAULT) -> OpSource:
    """The op."""
    return OpSource(
        name="toy",
        kernels=(KernelSource("toy_decode", "decode", DECODE, PARAMS, threads=64, shared_bytes=0),),
        chunk_size=1,
        dims={"K": K, "V": K},
        dtype="bfloat16",
        schedule={"v_tile": K},
        target="sm90",
        passes={"decode": ("toy_decode",)},
        state=state,
    )
