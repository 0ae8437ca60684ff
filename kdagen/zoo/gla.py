"""Gated linear attention (Yang et al., 2023, arXiv:2312.06635): one decay for each key channel, g its log."""

import kdagen as kg


@kg.recurrence
def gla(S, q, k, v, g):
    """S_t = diag(exp(g)) S_{t-1} + k v^T"""
    S = kg.diag(kg.exp(g)) @ S + kg.outer(k, v)
    return S, S.T @ q
