"""HGRN-2 (Qin et al., 2024, arXiv:2404.07904): the key is what the forget gate f leaves, 1 - f."""

import kdagen as kg


@kg.recurrence
def hgrn2(S, q, v, f):
    """S_t = diag(f) S_{t-1} + (1 - f) v^T, f = sigmoid of its pre-activation"""
    f = kg.sigmoid(f)
    S = kg.diag(f) @ S + kg.outer(1 - f, v)
    return S, S.T @ q
