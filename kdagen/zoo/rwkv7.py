"""RWKV-7 (Peng et al., 2025, arXiv:2503.14456): DPLR whose low-rank part removes at kappa and replaces at rate a.

g = -exp(-1/2) sigmoid(w) is the paper's decay: never below -0.607 a token.
"""

import math

import kdagen as kg


@kg.recurrence
def rwkv7(S, q, k, v, w, kappa, a: kg.Channel):
    """S_t = (diag(exp(g)) - (kappa a) kappa^T) S_{t-1} + k v^T"""
    kappa, a = kg.l2norm(kappa), kg.sigmoid(a)
    g = -math.exp(-0.5) * kg.sigmoid(w)
    S = kg.diag(kg.exp(g)) @ S - kg.outer(kappa * a, S.T @ kappa) + kg.outer(k, v)
    return S, S.T @ q
