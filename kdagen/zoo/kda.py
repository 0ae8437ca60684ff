"""Kimi Delta Attention (Kimi Linear report, 2025, arXiv:2510.26692, Eq. 1): the delta rule, one decay a key channel.

Four entries: the recurrence itself; with the gate, norms and sigmoid of the released model; with a gate that is bounded
below, so that decays can be factored; with a gate clamped from below and rates up to 2. `variant` gives any other
combination of what models put before the recurrence.
"""

import functools

import kdagen as kg


def _delta(S, q, k, v, g, beta):
    S = kg.diag(kg.exp(g)) @ S  # decay, one rate a key channel
    S = S + kg.outer(k, beta * (v - S.T @ k))  # delta rule: correct what k recalls
    return S, S.T @ q


def softplus_gate(g, A_log, dt_bias, lower_bound=None):
    return -kg.exp(A_log) * kg.softplus(g + dt_bias)


def bounded_gate(g, A_log, dt_bias, lower_bound):
    return lower_bound * kg.sigmoid(kg.exp(A_log) * (g + dt_bias))


def clamped_gate(g, A_log, dt_bias, lower_bound):
    return kg.maximum(softplus_gate(g, A_log, dt_bias), lower_bound)


@kg.recurrence
def kda(S, q, k, v, g, beta):
    """S_t = (I - beta k k^T) diag(exp(g)) S_{t-1} + beta k v^T"""
    return _delta(S, q, k, v, g, beta)


@kg.recurrence
def kda_softplus(S, q, k, v, g, beta, A_log, dt_bias, scale=128**-0.5):
    """KDA on pre-activations: g = -exp(A_log) softplus(g + dt_bias), q and k normalised, beta = sigmoid(beta)"""
    g = softplus_gate(g, A_log, dt_bias)
    return _delta(S, scale * kg.l2norm(q), kg.l2norm(k), v, g, kg.sigmoid(beta))


@kg.recurrence
def kda_bounded(S, q, k, v, g, beta, A_log, dt_bias, lower_bound=-5.0, scale=128**-0.5):
    """KDA on pre-activations with a bounded gate: g = lower_bound sigmoid(exp(A_log) (g + dt_bias))"""
    g = bounded_gate(g, A_log, dt_bias, lower_bound)
    return _delta(S, scale * kg.l2norm(q), kg.l2norm(k), v, g, kg.sigmoid(beta))


@kg.recurrence
def kda_clamped(S, q, k, v, g, beta, A_log, dt_bias, lower_bound=-5.0, scale=128**-0.5):
    """KDA with a clamped gate, max(-exp(A_log) softplus(g + dt_bias), lower_bound), and beta = 2 sigmoid(beta)"""
    g = clamped_gate(g, A_log, dt_bias, lower_bound)
    return _delta(S, scale * kg.l2norm(q), kg.l2norm(k), v, g, 2 * kg.sigmoid(beta))


GATES = {"softplus": softplus_gate, "bounded": bounded_gate, "clamped": clamped_gate}
RATES = {None: lambda beta: beta, 1: kg.sigmoid, 2: lambda beta: 2 * kg.sigmoid(beta)}


@functools.cache
def variant(gate=None, rate=None, normalise=False, scale=1.0, lower_bound=None):
    """KDA with one of the gates, rates and norms in use; the same choices give the same recurrence.

    Args:
        gate: None (g is the log decay itself, however it was projected), or from a raw g, A_log and dt_bias:
            "softplus", "bounded" (by a sigmoid; A_log = 0 where a model has none) or "clamped".
        rate: None (beta as it is), 1 for sigmoid(beta), 2 for 2 sigmoid(beta), which allows negative eigenvalues.
        normalise: whether q and k are divided by their norms.
        scale: of q.
        lower_bound: of the gates "bounded" and "clamped"; with gate None, what the caller keeps g above.
    """

    def step(S, q, k, v, g, beta):
        q, k = (kg.l2norm(q), kg.l2norm(k)) if normalise else (q, k)
        return _delta(S, q if scale == 1 else scale * q, k, v, g, RATES[rate](beta))

    role = kg.Channel if lower_bound is None else kg.Channel(lower=lower_bound, upper=0.0)

    def kda(S, q, k, v, g: role, beta):
        return step(S, q, k, v, g, beta)

    def gated(S, q, k, v, g, beta, A_log, dt_bias):
        return step(S, q, k, v, GATES[gate](g, A_log, dt_bias, lower_bound), beta)

    return kg.recurrence(gated, name=f"kda_{gate}") if gate else kg.recurrence(kda)
