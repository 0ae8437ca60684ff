"""DPLR, diagonal plus low rank: the general case (Kimi Linear report, 2025, arXiv:2510.26692)."""

import kdagen as kg


@kg.recurrence
def dplr(S, q, k, v, a, b, g):
    """S_t = (diag(exp(g)) + b a^T) S_{t-1} + k v^T"""
    S = kg.diag(kg.exp(g)) @ S + kg.outer(b, S.T @ a) + kg.outer(k, v)
    return S, S.T @ q


# a = -exp(g) u and b = beta u with u a unit vector: the transition (I - beta u u^T) diag(exp(g)) does not expand.
SAMPLE = {
    "a": lambda draw: -draw.decay() * draw.unit("u"),
    "b": lambda draw: draw.uniform("").unsqueeze(-1) * draw.unit("u"),
}
