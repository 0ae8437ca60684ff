"""GDN-2: the delta rule with separate gates for what is erased (b, a key channel) and written (w, a value channel)."""

import kdagen as kg


@kg.recurrence
def gdn2(S, q, k, v, g, b: kg.Channel, w: kg.Value):
    """S_t = S~ + k (w v - S~^T (b k))^T, S~ = diag(exp(g)) S_{t-1}"""
    S = kg.diag(kg.exp(g)) @ S
    S = S + kg.outer(k, w * v - S.T @ (b * k))
    return S, S.T @ q


SAMPLE = {"b": lambda draw: draw.uniform("K"), "w": lambda draw: draw.uniform("V")}
