"""Linear attention (Katharopoulos et al., 2020, arXiv:2006.16236, without the normaliser)."""

import kdagen as kg


@kg.recurrence
def linear_attention(S, q, k, v):
    """S_t = S_{t-1} + k v^T"""
    S = S + kg.outer(k, v)
    return S, S.T @ q
