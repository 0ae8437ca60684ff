"""Gated DeltaNet (Yang et al., 2024, arXiv:2412.06464): the delta rule under one decay for each head."""

import kdagen as kg


@kg.recurrence
def gated_deltanet(S, q, k, v, g, beta):
    """S_t = exp(g) (I - beta k k^T) S_{t-1} + beta k v^T"""
    S = kg.exp(g) * S
    S = S + kg.outer(k, beta * (v - S.T @ k))
    return S, S.T @ q
