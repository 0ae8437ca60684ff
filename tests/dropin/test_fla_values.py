"""Values and gradients of kdagen.fla against the plain torch references that FLA ships."""

import pytest
import torch
from real_fla import VERSIONS
from torch.nn.functional import normalize

import kdagen.fla

pytestmark = pytest.mark.parametrize("fla", VERSIONS[-1:], indirect=True)  # the references of 0.5 are the same
B, T, H, HV, K, V = 2, 70, 2, 4, 16, 8


def draw(*shape: int, seed: int = 0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(heads: int = H, seed: int = 0) -> dict:
    """q, k, v, g a channel, decay a head, rates, a state; value heads grouped if there are more of them."""
    return {
        "q": draw(B, T, H, K, seed=seed),
        "k": normalize(draw(B, T, H, K, seed=seed + 1), dim=-1),
        "v": draw(B, T, heads, V, seed=seed + 2),
        "g": -draw(B, T, heads, K, seed=seed + 3).abs(),
        "decay": -draw(B, T, heads, seed=seed + 4).abs(),
        "beta": draw(B, T, heads, seed=seed + 5).sigmoid(),
        "state": draw(B, heads, K, V, seed=seed + 6),
    }


def same(function, expected, tensors, bound: float = 1e-5) -> None:
    """Outputs, states, and gradients of every tensor; and the same without gradients, which takes other ways."""
    found = flat(function())
    shown = [draw(*x.shape, seed=9) for x in expected]
    grads = [torch.autograd.grad(results, tensors, shown, retain_graph=True) for results in (found, expected)]
    with torch.no_grad():
        again = flat(function())
    for a, b in zip([*found, *grads[0], *again], [*expected, *grads[1], *expected], strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= bound * b.norm()


def flat(results) -> list:
    """Tensors of nested results; a state that was not asked for is none of them."""
    if isinstance(results, tuple):
        return [x for part in results for x in flat(part)]
    return [] if results is None else [results]


def leaves(x: dict, *names: str) -> list:
    return [x[name].requires_grad_() for name in names]


def unit(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("heads", [H, HV])
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_kda(fla, name, heads):
    x = inputs(heads)
    given = leaves(x, "q", "k", "v", "g", "beta", "state")
    expected = fla.ops.kda.naive.naive_recurrent_kda(*given[:5], initial_state=x["state"], output_final_state=True)
    function = getattr(kdagen.fla, name)
    same(lambda: function(*given[:5], initial_state=x["state"], output_final_state=True), expected, given)


@pytest.mark.parametrize("lower_bound", [None, -5.0, -2.0])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_kda_with_its_gate_norms_and_rates_in_the_kernel(fla, name, lower_bound, biased):
    x = inputs(HV)
    q, k, v, raw, beta = leaves(x, "q", "k", "v", "g", "beta")
    A_log, dt_bias = draw(HV, seed=20).requires_grad_(), draw(HV * K, seed=21).requires_grad_() if biased else None
    if lower_bound is None:
        g = fla.ops.kda.gate.naive_kda_gate(raw, A_log, dt_bias)
    else:
        g = fla.ops.kda.gate.naive_kda_lowerbound_gate(raw, A_log, dt_bias, lower_bound)
    rates = 2 * beta.sigmoid()
    expected = fla.ops.kda.naive.naive_recurrent_kda(unit(q), unit(k), v, g, rates, 0.3, output_final_state=True)
    options = {
        "scale": 0.3,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": True,
        "lower_bound": lower_bound,
        "A_log": A_log.view(1, 1, HV, 1),
        "dt_bias": dt_bias,
        **({"safe_gate": lower_bound is not None} if name == "chunk_kda" else {}),
    }
    tensors = [q, k, v, raw, beta, A_log, *([dt_bias] if biased else [])]
    same(lambda: getattr(kdagen.fla, name)(q, k, v, raw, beta, **options), expected, tensors)


def test_bounded_gate_without_a_rate_of_its_own(fla):
    x = inputs()
    q, k, v, raw, beta = leaves(x, "q", "k", "v", "g", "beta")
    g = -5.0 * raw.sigmoid()
    expected = fla.ops.kda.naive.naive_recurrent_kda(q, k, v, g, beta, output_final_state=True)
    options = {"output_final_state": True, "use_gate_in_kernel": True, "safe_gate": True, "lower_bound": -5.0}
    same(lambda: kdagen.fla.chunk_kda(q, k, v, raw, beta, **options), expected, [q, k, v, raw, beta])


@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_state_with_values_first(fla, name):
    x = inputs(HV)
    given = leaves(x, "q", "k", "v", "g", "beta", "state")
    o, final = fla.ops.kda.naive.naive_recurrent_kda(*given[:5], initial_state=x["state"], output_final_state=True)
    turned = x["state"].transpose(2, 3).contiguous()
    function, options = getattr(kdagen.fla, name), {"initial_state": turned, "output_final_state": True}
    same(lambda: function(*given[:5], **options, state_v_first=True), (o, final.transpose(2, 3)), given)
    with pytest.warns(DeprecationWarning, match="is called state_v_first now"):
        old = function(*given[:5], **options, transpose_state_layout=True)
    assert torch.equal(old[1], function(*given[:5], **options, state_v_first=True)[1])


@pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])
def test_gated_delta_rule(fla, name):
    x = inputs()
    q, k, v, g, beta, state = leaves(x, "q", "k", "v", "decay", "beta", "state")
    naive = fla.ops.gated_delta_rule.naive_recurrent_gated_delta_rule
    expected = naive(q, k, v, beta, g, initial_state=state, output_final_state=True)
    function, options = getattr(kdagen.fla, name), {"initial_state": state, "output_final_state": True}
    same(lambda: function(q, k, v, g=g, beta=beta, **options), expected, [q, k, v, g, beta, state])


@pytest.mark.parametrize("name", ["chunk_gdn", "fused_recurrent_gdn"])
def test_gated_delta_rule_with_its_gate_in_the_kernel_and_grouped_values(fla, name):
    x = inputs(HV)
    q, k, v, raw, beta = leaves(x, "q", "k", "v", "decay", "beta")
    A_log, dt_bias = draw(HV, seed=20).requires_grad_(), draw(HV, seed=21).requires_grad_()
    g = fla.ops.gated_delta_rule.gate.naive_gdn_gate(raw, A_log, dt_bias)
    naive = fla.ops.gated_delta_rule.naive_recurrent_gated_delta_rule
    wide = [unit(y).repeat_interleave(HV // H, 2) for y in (q, k)]
    expected = naive(*wide, v, beta.sigmoid(), g, output_final_state=True)
    options = {
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "use_gate_in_kernel": True,
        "A_log": A_log,
        "dt_bias": dt_bias,
    }
    function = getattr(kdagen.fla, name)
    same(lambda: function(q, k, v, g=raw, beta=beta, **options), expected, [q, k, v, raw, beta, A_log, dt_bias])


@pytest.mark.parametrize("both", [True, False])
def test_delta_rule_with_a_gate_a_channel(fla, both):
    x = inputs(HV)
    q, k, v, gk, g, beta = leaves(x, "q", "k", "v", "g", "decay", "beta")
    total = gk + g.unsqueeze(-1) if both else gk
    expected = fla.ops.kda.naive.naive_recurrent_kda(q, k, v, total, beta, output_final_state=True)
    options = {"g": g if both else None, "gk": gk, "beta": beta, "output_final_state": True}
    function = kdagen.fla.fused_recurrent_gated_delta_rule
    same(lambda: function(q, k, v, **options), expected, [q, k, v, gk, beta, *([g] if both else [])])


@pytest.mark.parametrize("name", ["chunk_delta_rule", "fused_recurrent_delta_rule"])
def test_delta_rule(fla, name):
    x = inputs()
    q, k, v, beta, state = leaves(x, "q", "k", "v", "beta", "state")
    naive = fla.ops.gated_delta_rule.naive_recurrent_gated_delta_rule
    zero = torch.zeros(B, T, H)
    expected = naive(q, k, v, beta, zero, initial_state=state, output_final_state=True)
    function, options = getattr(kdagen.fla, name), {"initial_state": state, "output_final_state": True}
    same(lambda: function(q, k, v, beta, **options), expected, [q, k, v, beta, state])


def test_rates_are_one_where_none_are_given(fla):
    x = inputs()
    q, k, v = leaves(x, "q", "k", "v")
    naive = fla.ops.gated_delta_rule.naive_recurrent_gated_delta_rule
    expected = naive(q, k, v, torch.ones(B, T, H), torch.zeros(B, T, H), output_final_state=True)
    for name in ("fused_recurrent_delta_rule", "fused_recurrent_gated_delta_rule"):
        function = getattr(kdagen.fla, name)
        same(lambda: function(q, k, v, output_final_state=True), expected, [q, k, v])  # noqa: B023


@pytest.mark.parametrize("name", ["chunk_gla", "fused_recurrent_gla"])
def test_gla(fla, name):
    x = inputs()
    given = leaves(x, "q", "k", "v", "g", "state")
    options = {"initial_state": x["state"], "output_final_state": True}
    expected = fla.ops.gla.naive.naive_recurrent_gla(*given[:4], **options)
    same(lambda: getattr(kdagen.fla, name)(*given[:4], **options), expected, given)


@pytest.mark.parametrize("name", ["chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla"])
@pytest.mark.parametrize("decays", ["g", "gamma", "both", "none"])
def test_simple_gla(fla, name, decays):
    x = inputs()
    given = leaves(x, "q", "k", "v", "state")
    gamma = -draw(H, seed=20).abs()
    g = {"g": x["decay"], "gamma": gamma.expand(B, T, H), "both": x["decay"] + gamma, "none": torch.zeros(B, T, H)}
    options = {"initial_state": x["state"], "output_final_state": True}
    expected = fla.ops.simple_gla.naive.naive_recurrent_simple_gla(*given[:3], g[decays], **options)
    shown = {"g": x["decay"] if decays in ("g", "both") else None}
    shown["g_gamma"] = gamma if decays in ("gamma", "both") else None
    same(lambda: getattr(kdagen.fla, name)(*given[:3], **shown, **options), expected, given)


@pytest.mark.parametrize("name", ["chunk_retention", "fused_chunk_retention", "fused_recurrent_retention"])
def test_retention(fla, name):
    x = inputs()
    given = leaves(x, "q", "k", "v")
    expected = fla.ops.retention.naive.naive_retention(*(y.transpose(1, 2) for y in given)).transpose(1, 2)
    same(lambda: getattr(kdagen.fla, name)(*given), [expected], given)


@pytest.mark.parametrize("name", ["chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"])
def test_linear_attention(fla, name):
    x = inputs()
    given = leaves(x, "q", "k", "v", "state")
    options = {"initial_state": x["state"], "output_final_state": True, "normalize": False}
    expected = fla.ops.linear_attn.naive.naive_recurrent_linear_attn(*given[:3], **options)
    same(lambda: getattr(kdagen.fla, name)(*given[:3], **options), expected, given)


@pytest.mark.parametrize("name", ["chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"])
def test_normalised_linear_attention_continues_from_its_pair_of_states(fla, name):
    x = inputs()
    given = [y.abs().detach().requires_grad_() for y in (x["q"], x["k"], x["v"])]
    pair = x["state"], draw(B, 1, H, K, seed=30).abs()
    options = {"initial_state": pair, "output_final_state": True, "normalize": True}
    o, states = fla.ops.linear_attn.naive.naive_recurrent_linear_attn(*given, **options)
    same(lambda: getattr(kdagen.fla, name)(*given, **options), [o, *states], given)


@pytest.mark.parametrize("name", ["chunk_dplr_delta_rule", "fused_recurrent_dplr_delta_rule"])
def test_dplr(fla, name):
    x = inputs()
    x["a"], x["b"] = -x["k"].detach(), x["k"].detach() * x["beta"].unsqueeze(-1)
    given = leaves(x, "q", "k", "v", "a", "b", "g", "state")
    turned = [y.transpose(1, 2) for y in given[:6]]
    naive = fla.ops.generalized_delta_rule.dplr.naive.dplr_recurrence
    o, final = naive(*turned, initial_state=x["state"], output_final_state=True)
    function, options = getattr(kdagen.fla, name), {"initial_state": x["state"], "output_final_state": True}
    same(lambda: function(*given[:6], **options), (o.transpose(1, 2), final), given)


def test_rwkv7_is_dplr_under_other_names(fla):
    x = inputs()
    rate = x["beta"].unsqueeze(-1).expand(B, T, H, K).contiguous()
    q, k, v, w = x["q"], x["k"], x["v"], x["g"]
    turned = [y.transpose(1, 2) for y in (q, k, v, -k, k * rate, w)]
    o, final = fla.ops.generalized_delta_rule.dplr.naive.dplr_recurrence(*turned)
    expected = o.transpose(1, 2), final
    given, options = (q, w, k, v), {"scale": K**-0.5, "output_final_state": True}
    for found in (
        kdagen.fla.chunk_rwkv7(*given, -k, k * rate, **options),
        kdagen.fla.fused_recurrent_rwkv7(*given, -k, k * rate),
        kdagen.fla.fused_mul_recurrent_rwkv7(*given, k, rate, **options),
    ):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    unscaled = kdagen.fla.chunk_rwkv7(*given, -k, k * rate)[0]
    assert (unscaled - expected[0] * K**0.5).norm() <= 1e-5 * unscaled.norm()


@pytest.mark.parametrize(
    "name, axis, naive",
    [("gla", "g", "naive_recurrent_gla"), ("simple_gla", "decay", "naive_recurrent_simple_gla")],
)
def test_from_the_last_token_to_the_first(fla, name, axis, naive):
    x = inputs()
    given = leaves(x, "q", "k", "v", axis, "state")
    reference = getattr(getattr(fla.ops, name).naive, naive)
    options = {"initial_state": x["state"], "output_final_state": True}
    o, final = reference(*(y.flip(1) for y in given[:4]), **options)
    function = getattr(kdagen.fla, f"fused_recurrent_{name}")
    same(lambda: function(*given[:4], **options, reverse=True), (o.flip(1), final), given)


def test_results_have_the_dtype_of_queries_and_states_are_full(fla):
    x = {name: y.bfloat16() for name, y in inputs(HV).items()}
    given = x["q"], x["k"], x["v"], x["g"].float(), x["beta"]
    expected = fla.ops.kda.naive.naive_recurrent_kda(*given, output_final_state=True)
    o, final = kdagen.fla.chunk_kda(*given, output_final_state=True)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    assert (o.float() - expected[0].float()).norm() <= 4e-3 * expected[0].float().norm()
    assert (final - expected[1]).norm() <= 1e-5 * expected[1].norm()
