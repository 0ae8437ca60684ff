"""Recurrences that are in no zoo, to try what a user may write: (recurrence, solving streams, streams) by name."""

import kdagen as kg

CASES = {}


def case(solving, streams):
    def add(body):
        found = kg.recurrence(body)
        CASES[found.name] = (found, solving, streams)
        return found

    return add


@case(1, 1)
def decay_after_write(S, q, k, v, g, beta):
    S = S + kg.outer(k, beta * (v - S.T @ k))
    S = kg.diag(kg.exp(g)) @ S
    return S, S.T @ q


@case(1, 1)
def scalar_decay_after_write_output_before(S, q, k, v, g, beta):
    S = S + kg.outer(k, beta * (v - S.T @ k))
    o = S.T @ q
    return S * kg.exp(g), o


@case(0, 1)
def bonus(S, q, k, v, w, u: kg.ChannelParameter):
    o = (S + kg.outer(u * k, v)).T @ q
    return kg.diag(kg.exp(-kg.exp(w))) @ S + kg.outer(k, v), o


@case(0, 1)
def write_seen_before_decay(S, q, k, v, g):
    written = kg.outer(k, v)
    return kg.diag(kg.exp(-5.0 * kg.sigmoid(g))) @ S + written, (S + written).T @ q


@case(0, 2)
def two_writes(S, q, k1, k2, v1, v2, g):
    S = kg.exp(g) * S + kg.outer(k1, v1) + kg.outer(k2, v2)
    return S, S.T @ q


@case(0, 1)
def two_keys_one_value(S, q, k1, k2, v, g):
    S = kg.exp(g) * S + kg.outer(k1, v) + 0.5 * kg.outer(k2, v)
    return S, S.T @ q


@case(1, 1)
def delta_on_undecayed_state(S, q, k, v, g, beta):
    S = kg.diag(kg.exp(g)) @ S + kg.outer(k, beta * (v - S.T @ k))
    return S, S.T @ q


@case(2, 2)
def steps_with_decays_between(S, q, k: kg.Key[2], v: kg.Value[2], beta: kg.Scalar[2], g: kg.Channel[2]):
    for i in range(2):
        S = kg.diag(kg.exp(g[i])) @ S
        S = S + kg.outer(k[i], beta[i] * (v[i] - S.T @ k[i]))
    return S, S.T @ q


@case(1, 1)
def output_of_old_and_new(S, q, k, v, r, g, beta):
    old = S
    S = kg.diag(kg.exp(g)) @ S
    S = S + kg.outer(k, beta * (v - S.T @ k))
    return S, S.T @ q + 0.5 * (old.T @ r)


@case(1, 1)
def output_between_steps(S, q, k, v, g, h, beta):
    S = kg.exp(g) * S
    S = S + kg.outer(k, beta * (v - S.T @ k))
    o = S.T @ q
    return kg.diag(kg.exp(h)) @ S, o


@case(1, 1)
def value_gate(S, q, k, v, g, beta, w: kg.Value):
    S = kg.diag(kg.exp(g)) @ S
    S = S + kg.outer(k, beta * (kg.silu(w) * v - S.T @ k))
    return S, S.T @ q


@case(0, 1)
def skip(S, q, k, v, g, D):
    S = kg.diag(kg.exp(g)) @ S + kg.outer(k, v)
    return S, S.T @ q + D * v


@case(3, 3)
def householder(S, q, k: kg.Key[3], v: kg.Value[3], beta: kg.Scalar[3], g):
    S = kg.exp(g) * S
    for k_i, v_i, beta_i in zip(k, v, beta, strict=True):
        S = (kg.eye() - 2 * kg.sigmoid(beta_i) * kg.outer(kg.l2norm(k_i), kg.l2norm(k_i))) @ S + kg.outer(k_i, v_i)
    return S, S.T @ q


CASES["householder"] = (CASES["householder"][0], 3, 6)  # what is written is not what is reflected


@case(1, 1)
def preconditioned(S, q, k, v, g, beta, M: kg.Channel):
    S = kg.diag(kg.exp(g)) @ S
    S = S + kg.outer(beta * (M * k), v - S.T @ k)
    return S, S.T @ q


@case(1, 1)
def preconditioned_in_its_own_norm(S, q, k, v, g, beta, m):
    M = kg.exp(m) / kg.sum(kg.exp(m))
    S = kg.diag(kg.exp(g)) @ S
    S += kg.outer(M * k, beta * (v - S.T @ k)) / kg.dot(k, M * k)
    return S, S.T @ q


@case(0, 1)
def unit_key_erases(S, q, k, v, beta):
    k, beta = kg.l2norm(k), kg.sigmoid(beta)
    S = kg.diag(1 - beta * k * k) @ S + kg.outer(beta * k, v)
    return S, S.T @ q


@case(1, 1)
def write_by_distance(S, q, k, k_before, v, target: kg.Value, g, beta, mu: kg.ChannelParameter):
    d = target - v
    k = kg.l2norm(k + mu * (k_before - k))
    S = kg.exp(g) * S
    S = S + kg.outer(k, kg.tanh(kg.sqrt(kg.dot(d, d) + 1e-8)) * beta * (v - S.T @ k))
    return S, S.T @ q


@case(0, 1)
def decay_by_difference(S, q, k, v, a: kg.Channel, b: kg.Channel):
    d = kg.square(a - b) + 1e-8
    return kg.diag(kg.exp(-kg.sqrt(d))) @ S + kg.outer(k / d, v), S.T @ q


@case(0, 1)
def bounded_forget(S, q, v, f, floor: kg.ChannelParameter):
    f = kg.sigmoid(floor) + (1 - kg.sigmoid(floor)) * kg.sigmoid(f)
    return kg.diag(f) @ S + kg.outer(1 - f, v), S.T @ q


@case(0, 1)
def sixteenth_root(S, q, k, v, f):
    S = kg.diag(kg.exp(kg.logsigmoid(f) / 16)) @ S + kg.outer(k, v)
    return S, S.T @ (q * 128**-0.5)


@case(4, 4)
def four_steps(S, q, k: kg.Key[4], v: kg.Value[4], beta: kg.Scalar[4], g):
    S = kg.exp(g) * S
    for k_i, v_i, beta_i in zip(map(kg.l2norm, k), v, beta, strict=True):
        S = S + kg.outer(k_i, kg.sigmoid(beta_i) * (v_i - S.T @ k_i))
    return S, S.T @ q


@case(2, 2)
def mixed_with_the_token_before(S, q, k, k_before, v, v_before, g, mu: kg.ChannelParameter, write: kg.Scalar):
    k = k + mu * (k_before - k)
    a = kg.sigmoid(write)
    S = kg.diag(kg.exp(g)) @ S
    S = S + a * kg.outer(k, v - S.T @ k) + (1 - a) * kg.outer(k_before, v_before - S.T @ k_before)
    return S, S.T @ q


@case(1, 1)
def several_queries(S, q: kg.Key[3], weight: kg.Scalar[3], k, v, g, beta: kg.Channel):
    S = kg.diag(kg.exp(g)) @ S
    S = S + kg.outer(kg.sigmoid(beta) * k, v - S.T @ k)
    return S, sum(w_i * (S.T @ q_i) for q_i, w_i in zip(q, weight, strict=True))


@case(1, 1)
def raw_decay(S, q, k, v, beta, a: kg.Channel(lower=0.0, upper=1.0)):
    S = (kg.diag(a) - kg.outer(k, beta * a * k)) @ S + kg.outer(k, beta * v)
    return S, S.T @ q


@case(1, 1)
def beta_in_decay(S, q, k, v, beta):
    S = kg.exp(-beta) * S
    S = S + kg.outer(k, (1 - kg.exp(-beta)) * (v - S.T @ k))
    return S, S.T @ q


@case(0, 1)
def scalar_and_channel_decay(S, q, k, v, g, h):
    S = kg.exp(h) * (kg.diag(kg.exp(g)) @ S) + kg.outer(k, v)
    return S, S.T @ q


@case(1, 1)
def complement_decay(S, q, k, v, f, beta):
    keep = 1 - kg.sigmoid(f)
    S = kg.diag(keep) @ S
    S = S + kg.outer(k, beta * (v - S.T @ k))
    return S, S.T @ q


@case(1, 1)
def leak(S, q, k, v, beta, lam: kg.Scalar(lower=0.0, upper=1.0)):
    S = S - lam * S
    S = S - kg.outer(k, beta * (S.T @ k - v))
    return S, S.T @ q


@case(1, 1)
def average(S, q, k, v, g, beta):
    S = 0.5 * S + 0.5 * (kg.diag(kg.exp(g)) @ S)
    S = S + kg.outer(k, beta * (v - S.T @ k))
    return S, S.T @ q


@case(1, 1)
def constant_decay(S, q, k, v, beta, rate=0.97):
    S = rate * S
    S = S + kg.outer(k, 2 * beta * (v - S.T @ k))
    return S, S.T @ q / 3


@case(1, 1)
def powers_of_a_constant(S, q, k, v, beta, dt: kg.Scalar(lower=0.0)):
    S = 0.97**dt * S
    S = S + kg.outer(k, beta * (v - S.T @ k))
    return S, S.T @ q


@case(0, 1)
def powers_of_an_input(S, q, k, v, r: kg.Channel(lower=0.0, upper=1.0), masked: kg.Scalar(lower=0.0, upper=1.0)):
    S = masked * kg.diag(r ** kg.softplus(masked)) @ kg.diag(kg.sqrt(r)) @ S + kg.outer(k, v)
    return S, S.T @ q


@case(1, 1)
def clamped_gate(S, q, k, v, g, beta, A_log, dt_bias):
    g = kg.maximum(-kg.exp(A_log) * kg.softplus(g + dt_bias), -5.0)
    S = kg.diag(kg.exp(g)) @ S
    S = S + kg.outer(k, 2 * kg.sigmoid(beta) * (v - k @ S))
    return S, q @ S


@case(1, 1)
def reads_by_two_keys(S, q, k, r, v, g, c: kg.Scalar):
    S = kg.diag(kg.exp(g)) @ S
    S = S + kg.outer(kg.relu(k), v - S.T @ k - c * (S.T @ r))
    return S, S.T @ q


@case(1, 2)
def forget_then_write_elsewhere(S, q, k, e, v, g, beta):
    S = kg.diag(kg.exp(g)) @ S
    S = S + kg.outer(k, v)
    S = S - kg.outer(e, beta * (S.T @ e))
    return S, S.T @ q


@case(2, 2)
def write_where_recalled(S, q, k, r, v, g, beta):
    S = kg.exp(g) * S
    recalled = S.T @ r
    S = S + kg.outer(k, beta * (v - S.T @ k)) + kg.outer(q, 0.1 * recalled)
    return S, S.T @ q


@case(1, 1)
def activations(S, q, k, v, g, beta):
    k = kg.l2norm(kg.silu(k))
    S = kg.diag(kg.exp(-kg.softplus(g))) @ S
    S = S + kg.outer(k, kg.sigmoid(beta) * (kg.tanh(v) - S.T @ k))
    return S, S.T @ kg.diag(kg.sigmoid(g)) @ kg.l2norm(q)


@case(1, 1)
def transposed_decay(S, q, k, v, g, beta):
    S = (S.T @ kg.diag(kg.exp(g))).T
    S = (S.T + kg.outer(k, beta * (v - S.T @ k)).T).T
    return S, kg.clip(kg.dot(q, k), -1.0, 1.0) * v + S.T @ ((kg.eye() - kg.outer(k, k)) @ q)


@case(0, 1)
def named_like_cotangents(S, q, k, d_S: kg.Value, d_o: kg.Channel):
    S = kg.diag(kg.exp(d_o)) @ S + kg.outer(k, d_S)
    return S, S.T @ q
