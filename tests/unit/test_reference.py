"""The oracle against loops written by hand, and at the edges: resets, grouped heads, operators."""

import pytest
import torch

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.reference import canonical_reference, evaluate, recurrence_reference

B, T, H, K, V = 2, 7, 3, 4, 5
INF = float("inf")


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kda_inputs():
    q, k, v = draw(B, T, H, K, seed=1), draw(B, T, H, K, seed=2), draw(B, T, H, V, seed=3)
    return {"q": q, "k": k / 2, "v": v, "g": -draw(B, T, H, K, seed=4).abs(), "beta": draw(B, T, H, seed=5).sigmoid()}


def kda_by_hand(q, k, v, g, beta, state):
    """One head at a time, with matrices."""
    o, final = torch.empty(B, T, H, V, dtype=torch.float64), state.clone()
    for b in range(B):
        for h in range(H):
            S = state[b, h]
            for t in range(T):
                key = k[b, t, h]
                forget = torch.eye(K, dtype=torch.float64) - beta[b, t, h] * torch.outer(key, key)
                S = forget @ torch.diag(g[b, t, h].exp()) @ S + beta[b, t, h] * torch.outer(key, v[b, t, h])
                o[b, t, h] = S.T @ q[b, t, h]
            final[b, h] = S
    return o, final


@pytest.mark.parametrize("reset", [False, True])
def test_kda_by_hand(reset):
    x, state = kda_inputs(), draw(B, H, K, V, seed=6)
    if reset:
        x["g"][:, 3] = -INF
        x["g"][0, 5, 1, 2] = -INF
    o, final = recurrence_reference(kg.zoo.get("kda"), x, state)
    expected_o, expected_final = kda_by_hand(**x, state=state)
    torch.testing.assert_close(o, expected_o, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(final, expected_final, rtol=1e-13, atol=1e-13)


def test_mamba2_by_hand():
    x = {n: draw(B, T, H, K, seed=i) for i, n in enumerate("qk")} | {"v": draw(B, T, H, V), "dt": draw(B, T, H)}
    x |= {n: draw(H, seed=i) for i, n in enumerate(("A_log", "dt_bias", "D"))}
    o, final = recurrence_reference(kg.zoo.get("mamba2"), x)
    S = torch.zeros(B, H, K, V, dtype=torch.float64)
    for t in range(T):
        dt = torch.log1p(torch.exp(x["dt"][:, t] + x["dt_bias"]))
        write = torch.einsum("bhk,bhv->bhkv", x["k"][:, t], x["v"][:, t])
        S = torch.exp(-x["A_log"].exp() * dt)[..., None, None] * S + dt[..., None, None] * write
        want = torch.einsum("bhkv,bhk->bhv", S, x["q"][:, t]) + x["D"][:, None] * x["v"][:, t]
        torch.testing.assert_close(o[:, t], want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(final, S, rtol=1e-13, atol=1e-13)


def test_a_reset_forgets_what_came_before():
    x = kda_inputs()
    x["g"][:, 4] = -INF
    changed = {n: t.clone() for n, t in x.items()}
    for t in changed.values():
        t[:, :4] += 1.0
    changed["g"] = x["g"]
    for run, what in ((recurrence_reference, kg.zoo.get("kda")), (canonical_reference, canonical(kg.zoo.get("kda")))):
        a, b = run(what, x, draw(B, H, K, V)), run(what, changed)
        assert torch.equal(a[0][:, 4:], b[0][:, 4:]) and torch.equal(a[1], b[1])
        assert not torch.equal(a[0][:, :4], b[0][:, :4])


def test_grouped_heads_serve_consecutive_ones():
    x = kda_inputs()
    grouped = x | {n: x[n][:, :, :1] for n in ("q", "k")}
    spread = x | {n: grouped[n].expand(B, T, H, K) for n in ("q", "k")}
    for got, want in zip(*(recurrence_reference(kg.zoo.get("kda"), i) for i in (grouped, spread)), strict=True):
        assert torch.equal(got, want)


def test_the_final_state_continues_a_sequence():
    x, kda = kda_inputs(), kg.zoo.get("kda")
    o, final = recurrence_reference(kda, x)
    first, state = recurrence_reference(kda, {n: t[:, :3] for n, t in x.items()})
    second, last = recurrence_reference(kda, {n: t[:, 3:] for n, t in x.items()}, state)
    assert torch.equal(torch.cat([first, second], 1), o) and torch.equal(last, final)


def test_an_output_that_varies_in_no_channel_is_spread():
    @kg.recurrence
    def r(S, q, k, v: kg.Value):
        return S + kg.outer(k, v), S.T @ q + 1.0

    x = {"q": draw(B, T, H, K), "k": draw(B, T, H, K, seed=1), "v": draw(B, T, H, V)}
    for got, want in zip(canonical_reference(canonical(r), x), recurrence_reference(r, x), strict=True):
        torch.testing.assert_close(got, want)


def test_expressions_are_stable_at_the_ends():
    from sympy import Symbol, exp

    from kdagen.ir.functions import sigmoid, softplus

    x = Symbol("x", real=True)
    at = {x: torch.tensor([-INF, -800.0, 0.0, 800.0], dtype=torch.float64)}
    assert evaluate(softplus(x), at).tolist() == pytest.approx([0.0, 0.0, 0.6931471805599453, 800.0])
    assert evaluate(sigmoid(x), at).tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0])
    assert evaluate(exp(x), at)[0] == 0.0
