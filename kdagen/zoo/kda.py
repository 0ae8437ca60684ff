"""Kimi Delta Attention (Kimi Linear report, 2025, arXiv:2510.26692, Eq. 1): the delta rule, one decay a key channel.

Three entries: the recurrence itself; with the gate, norms and sigmoid of the released model; with a gate that is
bounded below, so that decays can be factored.
"""

import kdagen as kg


def _delta(S, q, k, v, g, beta):
    S = kg.diag(kg.exp(g)) @ S  # decay, one rate a key channel
    S = S + kg.outer(k, beta * (v - S.T @ k))  # delta rule: correct what k recalls
    return S, S.T @ q


@kg.recurrence
def kda(S, q, k, v, g, beta):
    """S_t = (I - beta k k^T) diag(exp(g)) S_{t-1} + beta k v^T"""
    return _delta(S, q, k, v, g, beta)


@kg.recurrence
def kda_softplus(S, q, k, v, g, beta, A_log, dt_bias, scale=128**-0.5):
    """KDA on pre-activations: g = -exp(A_log) softplus(g + dt_bias), q and k normalised, beta = sigmoid(beta)"""
    g = -kg.exp(A_log) * kg.softplus(g + dt_bias)
    return _delta(S, scale * kg.l2norm(q), kg.l2norm(k), v, g, kg.sigmoid(beta))


@kg.recurrence
def kda_bounded(S, q, k, v, g, beta, A_log, dt_bias, lower_bound=-5.0, scale=128**-0.5):
    """KDA on pre-activations with a bounded gate: g = lower_bound sigmoid(exp(A_log) (g + dt_bias))"""
    g = lower_bound * kg.sigmoid(kg.exp(A_log) * (g + dt_bias))
    return _delta(S, scale * kg.l2norm(q), kg.l2norm(k), v, g, kg.sigmoid(beta))
