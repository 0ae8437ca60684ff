"""RetNet (Sun et al., 2023, arXiv:2307.08621): a constant decay for each head, 1 - 2^-(5 + h) in the paper."""

import kdagen as kg


@kg.recurrence
def retnet(S, q, k, v, gamma: kg.HeadParameter(lower=0.0, upper=1.0)):
    """S_t = gamma S_{t-1} + k v^T"""
    S = gamma * S + kg.outer(k, v)
    return S, S.T @ q
