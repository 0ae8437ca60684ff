"""Mamba-2 (Dao and Gu, 2024, arXiv:2405.21060), in the names of linear attention: k is B, q is C, v is the input.

The decay and the step size come from one pre-activation: dt = softplus(dt + dt_bias), a = exp(-exp(A_log) dt).
"""

import kdagen as kg


@kg.recurrence
def mamba2(S, q, k, v, dt, A_log, dt_bias: kg.HeadParameter, D):
    """S_t = exp(-exp(A_log) dt) S_{t-1} + dt k v^T, o = S_t^T q + D v"""
    dt = kg.softplus(dt + dt_bias)
    S = kg.exp(-kg.exp(A_log) * dt) * S + kg.outer(k, dt * v)
    return S, S.T @ q + D * v
