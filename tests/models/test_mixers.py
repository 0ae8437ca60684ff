"""Any recurrence in place of KDA: all of the zoo, and one of a user's, trained, cached and decoded."""

import copy

import pytest
import torch
from small_models import close, config, model, tokens

from kdagen import zoo
from kdagen.models import KimiLinear
from kdagen.models.fused import fused
from kdagen.models.roles import inputs

TOKENS = tokens(2, 40)

OWN = """
import kdagen as kg

@kg.recurrence
def own(S, query, key, value, keep: kg.Scalar(lower=0.5, upper=1.0), amount, f: kg.Channel, g, gain: kg.HeadParameter):
    S = kg.diag(kg.exp(g)) @ (keep * S)
    S = S + kg.outer(key, amount * (value - S.T @ (key * f)))
    return S, S.T @ query + kg.exp(gain) * value
"""


@pytest.mark.parametrize("name", zoo.names())
def test_of_the_zoo(name):
    small = model({"mixer": name} | ({"gate_lower_bound": -4.0} if "bounded" in name or "clamped" in name else {}))
    expected = small(TOKENS)
    expected.square().mean().backward()
    missing = [n for n, p in small.named_parameters() if p.grad is None and "experts" not in n]
    assert not missing and all(p.grad.isfinite().all() for p in small.parameters() if p.grad is not None)
    with torch.no_grad():
        cache = small.new_cache(2)
        parts = [small(TOKENS[:, a:b], cache=cache) for a, b in ((0, 30), (30, 31), (31, 32), (32, 40))]
    assert close(torch.cat(parts, 1), expected.detach(), 2e-4 if name == "dplr" else 2e-5)
    assert torch.equal(copy.deepcopy(small)(TOKENS), expected)


def test_first_values():
    """As they are initialised, outputs are moderate, and states forget."""
    for name in zoo.names():
        small = KimiLinear(config({"mixer": name, "ratio": None}, num_experts=0), seed=1)
        cache = small.new_cache(1)
        logits = small(tokens(1, 300), cache=cache)
        assert logits.isfinite().all() and logits.abs().max() < 5, name
        assert max(layer.state.abs().max() for layer in cache.layers) < 100, name


def test_of_a_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    small = model({"mixer": f"{path}:own"})
    layer = small.model.layers[0].self_attn
    kinds = {i.name: (i.module, i.kind, i.axis, i.shape) for i in layer.inputs}
    assert kinds == {
        "query": ("query", "vector", "K", "unit"),
        "key": ("key", "vector", "K", "unit"),
        "value": ("value", "vector", "V", "raw"),
        "keep": ("keep", "scalar", "", "range"),
        "amount": ("amount", "scalar", "", "rate"),
        "f": ("f", "channel", "K", "rate"),
        "g": ("in_g", "channel", "K", "decay"),
        "gain": ("gain", "parameter", "", "raw"),
    }
    names = {name for name, _ in layer.named_parameters()}
    assert {"in_g_a_proj.weight", "g_a_proj.weight", "A_log", "dt_bias", "gain", "key_conv1d.weight"} <= names
    with torch.no_grad():
        cache = small.new_cache(2)
        parts = [small(TOKENS[:, a:b], cache=cache) for a, b in ((0, 30), (30, 31), (31, 40))]
        assert close(torch.cat(parts, 1), small(TOKENS))


def test_what_a_recurrence_does_itself_is_left_to_it():
    kinds = {i.name: (i.kind, i.shape) for i in inputs(zoo.get("kda_softplus"))}
    assert kinds == {
        "q": ("vector", "raw"),
        "k": ("vector", "raw"),
        "v": ("vector", "raw"),
        "g": ("channel", "raw"),
        "beta": ("scalar", "raw"),
        "A_log": ("parameter", "raw"),
        "dt_bias": ("parameter", "raw"),
    }
    kinds = {i.name: (i.kind, i.shape) for i in inputs(zoo.get("rwkv7"))}
    assert kinds["w"] == kinds["a"] == ("channel", "raw") and kinds["kappa"] == ("vector", "raw")
    assert {i.shape for i in inputs(zoo.get("mamba2")) if i.name in ("dt", "A_log", "dt_bias", "D")} == {"raw"}
    assert {i.name: i.shape for i in inputs(zoo.get("retnet"))}["gamma"] == "range"


@torch.no_grad()
def test_the_plain_recurrence_becomes_the_layer_of_the_release(tmp_path):
    """KDA on pre-activations, and the plain recurrence, to which gates, rates and norms are added by its roles."""
    path = tmp_path / "plain.py"
    path.write_text("from kdagen.zoo.kda import kda as plain\n")
    inside, outside = model({"ratio": None}), model({"ratio": None, "mixer": f"{path}:plain"})
    outside.load_state_dict(inside.state_dict())
    for layer in outside.model.layers:  # the output is normalised: the scale of q counts beside its epsilon alone
        layer.self_attn.o_norm.eps *= 16
    assert close(outside(TOKENS), inside(TOKENS))


def test_what_is_made_part_of_a_recurrence():
    found = fused(zoo.get("gated_deltanet"), 2)
    assert found is fused(zoo.get("gated_deltanet"), 2) and fused(zoo.get("kda_softplus")) is zoo.get("kda_softplus")
    assert [node.value for node in found.inputs] == ["q", "k", "v", "g", "beta", "A_log", "dt_bias"]
    text = str(found)
    assert "l2norm(q)" in text and "softplus(g + dt_bias)" in text and "2*sigmoid(beta)" in text.replace(" ", "")
    pairs = [node.value for node in fused(zoo.get("deltaproduct")).inputs]
    assert pairs == ["q", "k_1", "k_2", "v_1", "v_2", "beta_1", "beta_2", "g", "A_log", "dt_bias"]


def test_options_of_kda():
    for linear in (
        {"gate_lower_bound": -5.0},
        {"gate_lower_bound": -5.0, "gate": "clamped", "allow_neg_eigval": True},
        {"use_full_rank_gate": True, "use_full_rank_forget_gate": True},
    ):
        small = model(linear)
        assert small(TOKENS).isfinite().all()
    names = {name for name, _ in small.model.layers[0].self_attn.named_parameters()}
    assert {"g_proj.weight", "f_proj.weight"} <= names and not {"g_a_proj.weight", "f_b_proj.weight"} & names


@torch.no_grad()
@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "mamba2", "rwkv7", "gdn2"])
def test_in_bfloat16(name):
    """States, gates and parameters of the head stay in float32; outputs are those of float32 but for rounding."""
    exact = model({"mixer": name}, num_experts=0)
    rounded = model({"mixer": name}, num_experts=0).to(torch.bfloat16)
    expected, cache = exact(TOKENS), rounded.new_cache(2)
    parts = [rounded(TOKENS[:, a:b], cache=cache) for a, b in ((0, 30), (30, 31), (31, 40))]
    found = torch.cat(parts, 1)
    assert found.dtype == torch.bfloat16 and cache.layers[0].state.dtype == torch.float32
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["kda", "gated_deltanet"])
def test_gradients_of_ragged_batches_and_under_autocast(name):
    small = KimiLinear(config({"mixer": name}, num_experts=0), seed=0)
    weight = small.model.layers[0].self_attn.k_proj.weight

    def gradient(run):
        small.zero_grad()
        run().float().square().mean().backward()
        return weight.grad.clone()

    whole = gradient(lambda: small(TOKENS))
    ends = torch.tensor([0, 40, 80])
    assert close(gradient(lambda: small(TOKENS.view(1, 80), cu_seqlens=ends)), whole)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradient(lambda: small(TOKENS))
    assert (rounded - whole).norm() < 0.06 * whole.norm()


@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "mamba2", "rwkv7"])
def test_training(name):
    """From its first values a model learns tokens by heart."""
    linear = {"mixer": name, "ratio": None}
    small = KimiLinear(config(linear, num_experts=0, num_hidden_layers=2, tie_word_embeddings=True), seed=0)
    optimizer = torch.optim.Adam(small.parameters(), lr=2e-2)
    losses = []
    for _ in range(25):
        logits = small(TOKENS[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 4 and losses[-1] < losses[0] / 2
