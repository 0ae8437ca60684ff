"""Gates, rates and norms that models put before KDA, against the plain recurrence on what torch makes of them."""

import itertools

import pytest
import torch
from torch.nn.functional import softplus

import kdagen as kg
from kdagen.derive.canonical import canonical
from kdagen.reference import recurrence_reference
from kdagen.zoo.kda import GATES, RATES, variant

B, T, H, K, V = 2, 40, 2, 8, 4
BOUND = -3.0
COMPUTED = {
    "softplus": lambda g, A_log, dt_bias: -A_log.exp() * softplus(g + dt_bias),
    "bounded": lambda g, A_log, dt_bias: BOUND * (A_log.exp() * (g + dt_bias)).sigmoid(),
    "clamped": lambda g, A_log, dt_bias: (-A_log.exp() * softplus(g + dt_bias)).clamp(min=BOUND),
}
RATE = {None: lambda beta: beta, 1: torch.sigmoid, 2: lambda beta: 2 * beta.sigmoid()}


def draw(gate) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, H, V), "g": normal(B, T, H, K)}
    x["beta"] = normal(B, T, H)
    if gate is None:
        x["g"] = (BOUND * x["g"].detach().sigmoid()).requires_grad_()
    return x | ({"A_log": normal(H), "dt_bias": normal(H, K)} if gate else {})


def unit(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("gate, rate, normalise", [*itertools.product([None, *GATES], RATES, [True, False])])
def test_values_and_gradients(gate, rate, normalise):
    x = draw(gate)
    if rate is None or not normalise:  # or states grow beyond any bound
        x["k"], x["beta"] = [(0.3 * y.detach()).requires_grad_() for y in (x["k"], x["beta"])]
    recurrence = variant(gate, rate, normalise, 0.25, None if gate == "softplus" else BOUND)
    q, k = (unit(x["q"]), unit(x["k"])) if normalise else (x["q"], x["k"])
    g = COMPUTED[gate](x["g"], x["A_log"].unsqueeze(-1), x["dt_bias"]) if gate else x["g"]
    plain = {"q": 0.25 * q, "k": k, "v": x["v"], "g": g, "beta": RATE[rate](x["beta"])}
    expected = recurrence_reference(kg.zoo.get("kda"), plain)
    found = kg.compile(recurrence)(**x, output_final_state=True)
    shown = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in expected]
    gradients = [torch.autograd.grad(results, list(x.values()), shown) for results in (found, expected)]
    for a, b in zip([*found, *gradients[0]], [*expected, *gradients[1]], strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_the_same_choices_are_the_same_recurrence():
    assert variant("bounded", 2, lower_bound=-5.0) is variant("bounded", 2, lower_bound=-5.0)
    assert variant("bounded", 2, lower_bound=-5.0) is not variant("bounded", 1, lower_bound=-5.0)


@pytest.mark.parametrize("name", ["kda", "kda_softplus", "kda_bounded", "kda_clamped"])
def test_entries_of_the_zoo_are_variants(name):
    gate = name[4:] or None
    rate = {"kda": None, "kda_clamped": 2}.get(name, 1)
    bound = -5.0 if gate in ("bounded", "clamped") else None
    found = variant(gate, rate, gate is not None, 128**-0.5 if gate else 1.0, bound)
    assert found.name == name
    a, b = canonical(found), canonical(kg.zoo.get(name))
    assert (a.decay, a.streams, a.output, a.arguments) == (b.decay, b.streams, b.output, b.arguments)


@pytest.mark.parametrize("gate, bound, derived", [("bounded", -2.0, -2.0), ("clamped", -2.0, -2.0), (None, -2.0, -2.0)])
def test_the_bound_is_known_to_the_compiler(gate, bound, derived):
    assert canonical(variant(gate, lower_bound=bound)).decay_lower == derived
