"""The delta rule and the gated delta rule under FLA's names."""

from __future__ import annotations

import functools

import kdagen as kg
from kdagen.fla.call import (
    Call,
    CallError,
    NotServedError,
    default_scale,
    heads,
    one_device,
    parameter,
    rate,
    rest,
    v_first,
)
from kdagen.fla.kda import VARIANT
from kdagen.zoo.kda import RATES, softplus_gate


@functools.cache
def deltanet(rate=None, normalise=False, scale=1.0, decay=None):
    """The delta rule under no decay, one for each head ("given", g its log), or one computed in the kernel ("gate")."""

    def step(S, q, k, v, beta):
        q, k = (kg.l2norm(q), kg.l2norm(k)) if normalise else (q, k)
        S = S + kg.outer(k, RATES[rate](beta) * (v - S.T @ k))
        return S, S.T @ (scale * q)

    def deltanet(S, q, k, v, beta):
        return step(S, q, k, v, beta)

    def given(S, q, k, v, g: kg.Scalar, beta):
        return step(kg.exp(g) * S, q, k, v, beta)

    def gate(S, q, k, v, g: kg.Scalar, beta, A_log, dt_bias: kg.HeadParameter):
        return step(kg.exp(softplus_gate(g, A_log, dt_bias)) * S, q, k, v, beta)

    if decay is None:
        return kg.recurrence(deltanet)
    return kg.recurrence({"given": given, "gate": gate}[decay], name="gated_deltanet")


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False,
    state_v_first: bool = False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs,
):  # fmt: skip
    """(o [B, T, HV, V], final state [N, HV, K, V] or None) of Gated DeltaNet.

    q and k [B, T, H, K]; v [B, T, HV, V]; g (log decay) and beta [B, T, HV]. Options as `chunk_kda` has; with
    use_gate_in_kernel=True g = -exp(A_log) softplus(g + dt_bias), A_log and dt_bias of HV elements.
    """
    state_v_first = v_first(state_v_first, kwargs)
    gated = kwargs.pop("use_gate_in_kernel", False)
    A_log, dt_bias = kwargs.pop("A_log", None), kwargs.pop("dt_bias", None)
    rest("chunk_gated_delta_rule", kwargs, (16, 32, 64))
    one_device(cp_context)
    call = Call(initial_state, output_final_state, cu_seqlens, state_v_first)
    choices = rate(use_beta_sigmoid_in_kernel, allow_neg_eigval), use_qk_l2norm_in_kernel, default_scale(q, scale)
    return _gated(call, choices, q, k, v, g, beta, gated, A_log, dt_bias)


def fused_recurrent_gated_delta_rule(
    q, k, v, g=None, gk=None, gv=None, beta=None, scale: float | None = None, initial_state=None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
    A_log=None, dt_bias=None, use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False,
    state_v_first: bool = False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    """Token by token, with a decay a head (g), a channel (gk) [B, T, HV, K], both, or none; gv is refused."""
    state_v_first = v_first(state_v_first, kwargs)
    rest("fused_recurrent_gated_delta_rule", kwargs)
    if gv is not None:
        raise NotServedError("gv: decay of value channels is outside kdagen's family; expected g or gk")
    if use_gate_in_kernel and g is None:
        raise CallError("use_gate_in_kernel=True needs g, which the gate is computed from")
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    call = Call(initial_state, output_final_state, cu_seqlens, state_v_first, token_by_token=True)
    choices = rate(use_beta_sigmoid_in_kernel, allow_neg_eigval), use_qk_l2norm_in_kernel, default_scale(q, scale)
    if gk is None:
        return _gated(call, choices, q, k, v, g, beta, use_gate_in_kernel, A_log, dt_bias)
    heads(q, k, v)
    if use_gate_in_kernel:
        raise NotServedError("gk beside a gate computed in the kernel is not served: compute the gate before, as g")
    g = gk if g is None else gk + g.unsqueeze(-1)
    return call.run((VARIANT, None, *choices), {"q": q, "k": k, "v": v, "g": g, "beta": beta})


def _gated(call: Call, choices: tuple, q, k, v, g, beta, gated: bool, A_log, dt_bias) -> tuple:
    heads(q, k, v)
    tensors = {"q": q, "k": k, "v": v, "beta": beta}
    if beta.ndim != 3:
        raise NotServedError(f"beta has shape {list(beta.shape)}: expected one a head, [B, T, HV]")
    if gated and A_log is None:
        raise CallError("use_gate_in_kernel=True needs A_log, an element for each value head")
    if gated:
        tensors["A_log"] = parameter("A_log", A_log, q, v.shape[2])
        tensors["dt_bias"] = parameter("dt_bias", dt_bias, q, v.shape[2])
    if g is not None:
        tensors["g"] = g
    return call.run(
        ("kdagen.fla.delta:deltanet", *choices, None if g is None else "gate" if gated else "given"), tensors
    )


def chunk_delta_rule(
    q, k, v, beta, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    """(o [B, T, H, V], final state [N, H, K, V] or None) of DeltaNet; beta [B, T, H]. Float32 is served too."""
    rest("chunk_delta_rule", kwargs, (16, 32, 64))
    choices = None, use_qk_l2norm_in_kernel, default_scale(q, scale)
    if not q.dtype == k.dtype == v.dtype:
        raise CallError(f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: expected one dtype")
    return _gated(Call(initial_state, output_final_state, cu_seqlens), choices, q, k, v, None, beta, False, None, None)


def fused_recurrent_delta_rule(
    q, k, v, beta=None, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, cu_seqlens=None,
):  # fmt: skip
    """DeltaNet token by token; beta is 1 unless given."""
    if scale is not None and scale <= 0:
        raise CallError(f"scale = {scale}: expected a positive one")
    beta = v.new_ones(v.shape[:3]) if beta is None else beta
    choices = None, use_qk_l2norm_in_kernel, default_scale(q, scale)
    call = Call(initial_state, output_final_state, cu_seqlens, token_by_token=True)
    return _gated(call, choices, q, k, v, None, beta, False, None, None)


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule
