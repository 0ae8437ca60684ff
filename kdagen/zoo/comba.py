"""Comba (Hu et al., 2025, arXiv:2506.02475): the delta rule reads by b k, and the query is corrected by d k."""

import kdagen as kg


@kg.recurrence
def comba(S, q, k, v, g, beta, b: kg.HeadParameter, d: kg.HeadParameter):
    """S_t = exp(g) S_{t-1} + beta k (v - (exp(g) S_{t-1})^T p)^T, p = sigmoid(b) k, o = S_t^T (q - d k)"""
    S = kg.exp(g) * S
    S = S + kg.outer(k, beta * (v - S.T @ (kg.sigmoid(b) * k)))
    return S, S.T @ (q - d * k)
