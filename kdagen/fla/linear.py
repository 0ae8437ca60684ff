"""Linear attention without a solve under FLA's names: GLA, simple GLA, RetNet, and linear attention itself."""

from __future__ import annotations

import functools

import kdagen as kg
from kdagen.fla.call import Call, CallError, NotServedError, default_scale, in_float32, rest, v_first

LINEAR = "kdagen.fla.linear:linear"


@functools.cache
def linear(scale: float, decay: str | None = None):
    """S_t = decay S_{t-1} + k v^T: no decay, one a key channel ("gk"), a head ("g"), or a head for good ("gamma")."""

    def step(S, q, k, v):
        S = S + kg.outer(k, v)
        return S, S.T @ (scale * q)

    def linear_attention(S, q, k, v):
        return step(S, q, k, v)

    def gla(S, q, k, v, g: kg.Channel):
        return step(kg.diag(kg.exp(g)) @ S, q, k, v)

    def mamba2(S, q, k, v, g: kg.Scalar):
        return step(kg.exp(g) * S, q, k, v)

    def retnet(S, q, k, v, g_gamma: kg.HeadParameter):
        return step(kg.exp(g_gamma) * S, q, k, v)

    return kg.recurrence({None: linear_attention, "gk": gla, "g": mamba2, "gamma": retnet}[decay])


def chunk_gla(
    q, k, v, g, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens=None, cu_seqlens_cpu=None,
):  # fmt: skip
    """(o [B, T, H, V], final state [N, H, K, V] or None) of GLA; q, k and g (log decay) [B, T, H, K]."""
    in_float32(initial_state)
    if not q.shape == k.shape == g.shape:
        raise CallError(f"q, k and g have shapes {[list(x.shape) for x in (q, k, g)]}: expected one, [B, T, H, K]")
    call = Call(initial_state, output_final_state, cu_seqlens, state_v_first)
    return call.run((LINEAR, default_scale(q, scale), "gk"), {"q": q, "k": k, "v": v, "g": g})


def fused_recurrent_gla(
    q, k, v, gk=None, gv=None, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    reverse: bool = False, state_v_first: bool = False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    """GLA token by token; gv is refused."""
    state_v_first = v_first(state_v_first, kwargs)
    rest("fused_recurrent_gla", kwargs)
    if gv is not None:
        raise NotServedError("gv: decay of value channels is outside kdagen's family; expected gk alone")
    call = Call(initial_state, output_final_state, cu_seqlens, state_v_first, token_by_token=True, reverse=reverse)
    tensors = {"q": q, "k": k, "v": v} | ({} if gk is None else {"g": gk})
    return call.run((LINEAR, default_scale(q, scale), None if gk is None else "gk"), tensors)


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    state_v_first: bool = False, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    """Linear attention with a log decay a head: a token's (g [B, T, H]), a constant one (g_gamma [H]), both or none."""
    size = rest("chunk_simple_gla", kwargs)
    if size & (size - 1):
        raise CallError(f"chunk_size = {size}: expected a power of 2")
    call = Call(initial_state, output_final_state, cu_seqlens, state_v_first)
    return _simple(call, q, k, v, g, g_gamma, scale)


def fused_chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    cu_seqlens=None,
):  # fmt: skip
    """`chunk_simple_gla` under its other name."""
    return _simple(Call(initial_state, output_final_state, cu_seqlens), q, k, v, g, g_gamma, scale)


def fused_recurrent_simple_gla(
    q, k, v, g=None, g_gamma=None, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    reverse: bool = False, state_v_first: bool = False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    """`chunk_simple_gla` token by token, from the last to the first with reverse=True."""
    state_v_first = v_first(state_v_first, kwargs)
    rest("fused_recurrent_simple_gla", kwargs)
    call = Call(initial_state, output_final_state, cu_seqlens, state_v_first, token_by_token=True, reverse=reverse)
    return _simple(call, q, k, v, g, g_gamma, scale)


def _simple(call: Call, q, k, v, g, g_gamma, scale: float | None) -> tuple:
    tensors = {"q": q, "k": k, "v": v}
    if g is not None:
        tensors["g"] = g if g_gamma is None else g + g_gamma
    elif g_gamma is not None:
        tensors["g_gamma"] = g_gamma.float()
    decay = "g" if g is not None else None if g_gamma is None else "gamma"
    return call.run((LINEAR, default_scale(q, scale), decay), tensors)


def chunk_retention(
    q, k, v, scale: float | None = None, initial_state=None, output_final_state: bool = False, cu_seqlens=None,
    **kwargs,
):  # fmt: skip
    """RetNet: head h decays by 1 - 2 ** (-5 - h) a token."""
    return chunk_simple_gla(
        q, k, v, None, _retention(q), scale, initial_state, output_final_state, cu_seqlens=cu_seqlens, **kwargs
    )


def fused_chunk_retention(
    q, k, v, scale: float | None = None, initial_state=None, output_final_state: bool = False, cu_seqlens=None
):
    """`chunk_retention` under its other name."""
    return chunk_retention(q, k, v, scale, initial_state, output_final_state, cu_seqlens)


def fused_recurrent_retention(
    q, k, v, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    reverse: bool = False, state_v_first: bool = False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    """RetNet token by token, from the last to the first with reverse=True."""
    state_v_first = v_first(state_v_first, kwargs)
    return fused_recurrent_simple_gla(
        q, k, v, None, _retention(q), scale, initial_state, output_final_state, reverse, state_v_first, cu_seqlens,
        **kwargs,
    )  # fmt: skip


def _retention(q):
    import torch

    return (-(2.0 ** (-5 - torch.arange(q.shape[2], dtype=torch.float64, device=q.device)))).log1p().float()
