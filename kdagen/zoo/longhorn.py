"""Longhorn (Liu et al., 2024, arXiv:2407.14207): the implicit (closed-form) online step of the delta rule."""

import kdagen as kg


@kg.recurrence
def longhorn(S, q, k, v, beta):
    """S_t = (I - eps k k^T) S_{t-1} + eps k v^T, eps = beta / (1 + beta k^T k)"""
    eps = beta / (1 + beta * kg.dot(k, k))
    S = S + kg.outer(k, eps * (v - S.T @ k))
    return S, S.T @ q
