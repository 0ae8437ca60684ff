"""Kimi Delta Attention under FLA's names: `chunk_kda` and `fused_recurrent_kda`."""

from __future__ import annotations

from kdagen.fla.call import (
    Call,
    CallError,
    default_scale,
    heads,
    in_float32,
    one_device,
    parameter,
    rate,
    rest,
    v_first,
)

VARIANT = "kdagen.zoo.kda:variant"
SAFE = -5.0  # what safe_gate promises of gates computed before


def chunk_kda(
    q, k, v, g, beta, scale: float | None = None, initial_state=None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, safe_gate: bool = False,
    lower_bound: float | None = None, disable_recompute: bool = False, return_intermediate_states: bool = False,
    state_v_first: bool = False, cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None, use_graph: bool = False,
    max_num_seqs: int | None = None, **kwargs,
):  # fmt: skip
    """(o [B, T, HV, V], final state [N, HV, K, V] or None), and the states before each chunk if asked for.

    Args:
        q, k: [B, T, H, K]; v [B, T, HV, V]; g [B, T, HV, K]: log decay (natural), or what the gate is computed from;
            beta [B, T, HV].
        scale: of q; K ** -0.5 unless given.
        initial_state: [N, HV, K, V] in float32.
        use_qk_l2norm_in_kernel: divide q and k by their norms.
        use_gate_in_kernel: g = -exp(A_log) softplus(g + dt_bias), or with lower_bound
            lower_bound sigmoid(exp(A_log) (g + dt_bias)). A_log (HV elements) is required but for the latter;
            dt_bias (HV * K elements) may be left out.
        use_beta_sigmoid_in_kernel, allow_neg_eigval: sigmoid(beta), or twice that.
        safe_gate: gates are in [-5, 0); those computed in the kernel need a lower_bound in this range.
        disable_recompute: keep everything for the backward.
        return_intermediate_states: in inference mode only.
        state_v_first: states are [N, HV, V, K].
        cu_seqlens: ends of sequences [N + 1] in a batch of one.
        cu_seqlens_cpu: the same on the CPU; only return_intermediate_states has a use for it.
        cp_context: refused.
        use_graph, max_num_seqs: checked; kdagen needs neither to be captured.
        kwargs: A_log, dt_bias, chunk_size (32 or 64; kdagen chooses its own, this is that of the states).
    """
    state_v_first = v_first(state_v_first, kwargs)
    A_log, dt_bias = kwargs.pop("A_log", None), kwargs.pop("dt_bias", None)
    chunk_size = rest("chunk_kda", kwargs, (32, 64))
    one_device(cp_context)
    in_float32(initial_state)
    heads(q, k, v)
    _fits_graph(use_graph, max_num_seqs, cu_seqlens)
    if safe_gate and use_gate_in_kernel and not (lower_bound is not None and SAFE <= lower_bound < 0):
        raise CallError(f"lower_bound = {lower_bound}: expected one in [{SAFE:g}, 0) with safe_gate=True")
    call = Call(initial_state, output_final_state, cu_seqlens, state_v_first, disable_recompute)
    bound = lower_bound if use_gate_in_kernel else SAFE if safe_gate else None
    recurrence = _recurrence(
        use_gate_in_kernel,
        A_log,
        bound,
        rate=rate(use_beta_sigmoid_in_kernel, allow_neg_eigval),
        normalise=use_qk_l2norm_in_kernel,
        scale=default_scale(q, scale),
    )
    tensors = _tensors(q, k, v, g, beta, use_gate_in_kernel, A_log, dt_bias)
    if not return_intermediate_states:
        return call.run(recurrence, tensors)
    _only_inference(disable_recompute)
    return call.run_with_states(recurrence, tensors, chunk_size, cu_seqlens_cpu)


def fused_recurrent_kda(
    q, k, v, g, beta, A_log=None, dt_bias=None, scale: float | None = None, initial_state=None,
    output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False, allow_neg_eigval: bool = False, lower_bound: float | None = None,
    state_v_first: bool = False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    """KDA token by token; arguments as `chunk_kda` has. Where a gradient is wanted, `chunk_kda` in fact."""
    state_v_first = v_first(state_v_first, kwargs)
    rest("fused_recurrent_kda", kwargs)
    heads(q, k, v)
    recurrence = _recurrence(
        use_gate_in_kernel,
        A_log,
        lower_bound if use_gate_in_kernel else None,
        rate=rate(use_beta_sigmoid_in_kernel, allow_neg_eigval),
        normalise=use_qk_l2norm_in_kernel,
        scale=default_scale(q, scale),
    )
    call = Call(initial_state, output_final_state, cu_seqlens, state_v_first, token_by_token=True)
    return call.run(recurrence, _tensors(q, k, v, g, beta, use_gate_in_kernel, A_log, dt_bias))


def _recurrence(gated: bool, A_log, lower_bound: float | None, rate, normalise: bool, scale: float) -> tuple:
    if gated and A_log is None and lower_bound is None:
        raise CallError("use_gate_in_kernel=True needs A_log (HV elements), unless there is a lower_bound")
    gate = None if not gated else "softplus" if lower_bound is None else "bounded"
    return VARIANT, gate, rate, normalise, scale, lower_bound


def _tensors(q, k, v, g, beta, gated: bool, A_log, dt_bias) -> dict:
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    if gated:
        heads, channels = v.shape[2], k.shape[3]
        tensors["A_log"] = parameter("A_log", A_log, q, heads)
        tensors["dt_bias"] = parameter("dt_bias", dt_bias, q, heads, channels)
    return tensors


def _fits_graph(use_graph: bool, max_num_seqs: int | None, cu_seqlens) -> None:
    if use_graph and cu_seqlens is not None and max_num_seqs not in (None, len(cu_seqlens) - 1):
        raise CallError(
            f"use_graph with max_num_seqs = {max_num_seqs} and cu_seqlens of {len(cu_seqlens) - 1} sequences: expected "
            f"as many, the last ones empty"
        )


def _only_inference(disable_recompute: bool) -> None:
    import torch

    if not torch.is_inference_mode_enabled() or disable_recompute:
        raise CallError(
            "return_intermediate_states=True needs torch.inference_mode() and disable_recompute=False: no gradient "
            "flows through these states"
        )
