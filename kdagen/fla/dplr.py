"""DPLR and RWKV-7 under FLA's names: S_t = (diag(exp(gk)) + b a^T) S_{t-1} + k v^T, a reading the undecayed state."""

from __future__ import annotations

import functools

import kdagen as kg
from kdagen.fla.call import Call, CallError, default_scale, one_device, rest


@functools.cache
def dplr(scale: float, lower_bound: float | None = None):
    """DPLR with q scaled, and a bound that the caller keeps the log decay above."""
    role = kg.Channel if lower_bound is None else kg.Channel(lower=lower_bound, upper=0.0)

    def dplr(S, q, k, v, a, b, g: role):
        S = kg.diag(kg.exp(g)) @ S + kg.outer(b, S.T @ a) + kg.outer(k, v)
        return S, S.T @ (scale * q)

    return kg.recurrence(dplr)


def chunk_dplr_delta_rule(
    q, k, v, a, b, gk, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    cu_seqlens=None, cu_seqlens_cpu=None, safe_gate: bool = False, chunk_size: int | None = None,
    disable_recompute: bool = False, cp_context=None, lower_bound: float | None = None, **kwargs,
):  # fmt: skip
    """(o [B, T, H, V], final state [N, H, K, V] or None) of DPLR.

    q, k, a, b and gk (log decay) [B, T, H, K]; v [B, T, H, V]. lower_bound is what the caller keeps gk above, in which
    case kernels factor decays; safe_gate alone does not say by how much. chunk_size is kdagen's to choose.
    """
    rest("chunk_dplr_delta_rule", kwargs)
    one_device(cp_context)
    if lower_bound is not None and lower_bound >= 0:
        raise CallError(f"lower_bound = {lower_bound}: expected a negative one, as gk is a log decay")
    call = Call(initial_state, output_final_state, cu_seqlens, disable_recompute=disable_recompute)
    tensors = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": gk}
    return call.run(("kdagen.fla.dplr:dplr", default_scale(q, scale), lower_bound), tensors)


def fused_recurrent_dplr_delta_rule(
    q, k, v, a, b, gk, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    reverse: bool = False, cu_seqlens=None,
):  # fmt: skip
    """DPLR token by token, from the last to the first with reverse=True."""
    call = Call(initial_state, output_final_state, cu_seqlens, token_by_token=True, reverse=reverse)
    return call.run(
        ("kdagen.fla.dplr:dplr", default_scale(q, scale)), {"q": q, "k": k, "v": v, "a": a, "b": b, "g": gk}
    )


def chunk_rwkv7(
    r, w, k, v, a, b, scale: float = 1.0, initial_state=None, output_final_state: bool = False, cu_seqlens=None,
    cu_seqlens_cpu=None, safe_gate: bool = False, chunk_size: int | None = None, disable_recompute: bool = False,
    cp_context=None, lower_bound: float | None = None,
):  # fmt: skip
    """RWKV-7: `chunk_dplr_delta_rule` with q = r and gk = w, the log decay."""
    return chunk_dplr_delta_rule(
        r,
        k,
        v,
        a,
        b,
        w,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens,
        cu_seqlens_cpu,
        safe_gate,
        chunk_size,
        disable_recompute,
        cp_context,
        lower_bound,
    )


def fused_recurrent_rwkv7(
    r, w, k, v, a, b, scale: float | None = None, initial_state=None, output_final_state: bool = True,
    cu_seqlens=None,
):  # fmt: skip
    """RWKV-7 token by token."""
    return fused_recurrent_dplr_delta_rule(
        r, k, v, a, b, w, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens
    )


def fused_mul_recurrent_rwkv7(
    r, w, k, v, kk, a, scale: float | None = 1.0, initial_state=None, output_final_state: bool = False,
    reverse: bool = False, cu_seqlens=None,
):  # fmt: skip
    """RWKV-7 token by token from the removal key kk and the rate a: DPLR with a' = -kk, b = kk * a."""
    return fused_recurrent_dplr_delta_rule(
        r, k, v, -kk, kk * a, w, scale, initial_state, output_final_state, reverse, cu_seqlens
    )
