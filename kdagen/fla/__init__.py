"""kdagen under the names and signatures of flash-linear-attention (FLA): change the import and nothing else.

    from kdagen.fla import chunk_kda, fused_recurrent_kda

Importing this package also makes kdagen a backend of FLA, if FLA is installed: see kdagen.fla.backend.
"""

from kdagen.fla.backend import register
from kdagen.fla.call import CallError, NotServedError, RemovedError
from kdagen.fla.delta import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    chunk_gdn,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    fused_recurrent_gdn,
)
from kdagen.fla.dplr import (
    chunk_dplr_delta_rule,
    chunk_rwkv7,
    fused_mul_recurrent_rwkv7,
    fused_recurrent_dplr_delta_rule,
    fused_recurrent_rwkv7,
)
from kdagen.fla.kda import chunk_kda, fused_recurrent_kda
from kdagen.fla.linear import (
    chunk_gla,
    chunk_retention,
    chunk_simple_gla,
    fused_chunk_retention,
    fused_chunk_simple_gla,
    fused_recurrent_gla,
    fused_recurrent_retention,
    fused_recurrent_simple_gla,
)
from kdagen.fla.linear_attention import chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn

__all__ = [
    "CallError",
    "NotServedError",
    "RemovedError",
    "chunk_delta_rule",
    "chunk_dplr_delta_rule",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gla",
    "chunk_kda",
    "chunk_linear_attn",
    "chunk_retention",
    "chunk_rwkv7",
    "chunk_simple_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_mul_recurrent_rwkv7",
    "fused_recurrent_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_rwkv7",
    "fused_recurrent_simple_gla",
    "register",
]

register()
