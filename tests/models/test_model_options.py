"""Layers against plain formulas, those that transformers' model does not have too: gates, gated MLA, residuals."""

import pytest
import torch
import torch.nn.functional as F
from small_models import close, config, model, shaken, tokens

from kdagen.models import KimiLinear
from kdagen.models.layers import Activation
from kdagen.models.layout import Layout

X = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(5))
LAYOUT = Layout(2, 30)

GATES = {
    "softplus": (lambda raw, A_log, bias: -A_log.exp() * F.softplus(raw + bias), {}),
    "bounded": (lambda raw, A_log, bias: -3 * torch.sigmoid(A_log.exp() * (raw + bias)), {"gate_lower_bound": -3.0}),
    "clamped": (
        lambda raw, A_log, bias: (-A_log.exp() * F.softplus(raw + bias)).clamp(min=-0.5),
        {"gate_lower_bound": -0.5, "gate": "clamped"},
    ),
}


def delta_attention(layer, x, gate, rate: int):
    """The KDA layer, token by token."""
    b, t, heads, size = *x.shape[:2], layer.heads, layer.head_dim

    def convolved(name: str):
        inside = F.pad(getattr(layer, f"{name}_proj")(x), (0, 0, 3, 0))
        weight = getattr(layer, f"{name}_conv1d").weight[:, 0]
        return F.silu(sum(inside[:, j : j + t] * weight[:, j] for j in range(4))).view(b, t, heads, size)

    q, k, v = map(convolved, "qkv")
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    raw = layer.f_proj(x) if hasattr(layer, "f_proj") else layer.f_b_proj(layer.f_a_proj(x))
    g = gate(raw.view(b, t, heads, size), layer.A_log, layer.dt_bias.view(heads, size))
    beta = rate * layer.b_proj(x).sigmoid()
    state, outputs = x.new_zeros(b, heads, size, size), []
    for i in range(t):
        state = state * g[:, i].exp().unsqueeze(-1)
        error = v[:, i] - (k[:, i].unsqueeze(-2) @ state).squeeze(-2)
        state = state + k[:, i].unsqueeze(-1) * (beta[:, i, :, None] * error).unsqueeze(-2)
        outputs.append((q[:, i].unsqueeze(-2) @ state).squeeze(-2) * size**-0.5)
    o = torch.stack(outputs, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.o_norm.weight
    raw = layer.g_proj(x) if hasattr(layer, "g_proj") else layer.g_b_proj(layer.g_a_proj(x))
    return layer.o_proj(o.flatten(-2) * raw.sigmoid())


@torch.no_grad()
@pytest.mark.parametrize("full_rank", [False, True])
@pytest.mark.parametrize("kind", GATES)
def test_gates(kind, full_rank):
    gate, linear = GATES[kind]
    options = {"use_full_rank_gate": full_rank, "use_full_rank_forget_gate": full_rank, "allow_neg_eigval": full_rank}
    layer = model(linear | options).model.layers[0].self_attn
    assert close(layer(X, LAYOUT), delta_attention(layer, X, gate, 1 + full_rank))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"q_lora_rank": 12, "mla_use_output_gate": True}])
def test_latent_attention(options):
    layer = model({"ratio": 0}, **options).model.layers[0].self_attn
    norm = lambda y, weight: y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight  # noqa: E731
    q = layer.q_b_proj(norm(layer.q_a_proj(X), layer.q_a_layernorm.weight)) if options else layer.q_proj(X)
    latent, shared = layer.kv_a_proj_with_mqa(X).split((16, 8), -1)
    kv = layer.kv_b_proj(norm(latent, layer.kv_a_layernorm.weight)).view(2, 30, 2, 32)
    k = torch.cat([kv[..., :16], shared.unsqueeze(2).expand(2, 30, 2, 8)], -1)
    scores = torch.einsum("bihc,bjhc->bhij", q.view(2, 30, 2, 24), k) * 24**-0.5
    weights = scores.masked_fill(torch.ones(30, 30).triu(1).bool(), float("-inf")).softmax(-1)
    o = torch.einsum("bhij,bjhc->bihc", weights, kv[..., 16:]).flatten(-2)
    expected = layer.o_proj(o * layer.g_proj(X).sigmoid() if options else o)
    assert close(layer(X, LAYOUT), expected)


def test_activation():
    g, u = torch.linspace(-40, 40, 101), torch.linspace(80, -80, 101)
    found = Activation(config(hidden_act="situ", activation_situ_beta=4.0, activation_situ_linear_beta=25.0))(g, u)
    assert close(found, 4 * torch.tanh(g / 4) * torch.sigmoid(g) * 25 * torch.tanh(u / 25))
    assert found.abs().max() <= 100
    unbounded = Activation(config(hidden_act="situ", activation_situ_linear_beta=None))(g, u)
    assert close(unbounded, 4 * torch.tanh(g / 4) * torch.sigmoid(g) * u)


@torch.no_grad()
def test_attention_residuals():
    """Blocks of two layers: sources are the embedding, the sums of whole blocks, and the sum of the block so far."""
    small = model(attn_res_block_size=2)
    ids = tokens(2, 30)

    def mixed(values: list, proj, norm):
        scores = [
            (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight) @ proj.weight[0] for v in values
        ]
        weights = torch.stack(scores).softmax(0)
        return sum(w.unsqueeze(-1) * v for w, v in zip(weights, values))

    sources, partial = [], small.model.embed_tokens(ids)
    for i, layer in enumerate(small.model.layers):
        x = mixed([*sources, partial], layer.self_attention_res_proj, layer.self_attention_res_norm)
        if i % 2 == 0:
            sources, partial = [*sources, partial], 0
        partial = partial + layer.self_attn(layer.input_layernorm(x), LAYOUT)
        x = mixed([*sources, partial], layer.mlp_res_proj, layer.mlp_res_norm)
        mlp = layer.mlp if i == 0 else layer.block_sparse_moe
        partial = partial + mlp(layer.post_attention_layernorm(x))
    assert len(sources) == 2
    x = mixed([*sources, partial], small.model.output_attn_res_proj, small.model.output_attn_res_norm)
    assert close(small(ids), small.lm_head(small.model.norm(x)))
    fresh = KimiLinear(config(attn_res_block_size=2))
    assert all((p == 0).all() for n, p in fresh.named_parameters() if n.endswith("_res_proj.weight"))


@torch.no_grad()
@pytest.mark.parametrize("renormalise", [True, False])
def test_experts(renormalise):
    """Each token by itself: the best two of four groups, of these the best three experts, and the shared one."""
    options = {"num_experts": 8, "num_experts_per_token": 3, "num_expert_group": 4, "topk_group": 2}
    small = model(**options, num_shared_experts=2, moe_renormalize=renormalise)
    moe = small.model.layers[1].block_sparse_moe
    found = moe(X)
    assert close(moe(X[:1, :1]), found[:1, :1])
    for x, y in zip(X.flatten(0, 1), found.flatten(0, 1)):
        scores = (moe.gate.weight @ x).sigmoid()
        biased = (scores + moe.gate.e_score_correction_bias).view(4, 2)
        groups = biased.sum(1).topk(2)[1].tolist()
        best = sorted((2 * g + i for g in groups for i in range(2)), key=lambda e: -biased.flatten()[e])[:3]
        total = scores[best].sum() if renormalise else 1.0
        expected = moe.shared_experts(x)
        for e in best:
            expert = moe.experts[e]
            out = expert.w2.weight @ (F.silu(expert.w1.weight @ x) * (expert.w3.weight @ x))
            expected = expected + scores[e] / total * 2.446 * out
        assert close(y, expected)


def test_tied_embeddings(tmp_path):
    small = shaken(KimiLinear(config(tie_word_embeddings=True)))
    assert "lm_head.weight" not in small.state_dict()
    small.save_pretrained(tmp_path)
    again, ids = KimiLinear.from_pretrained(tmp_path), tokens(1, 5)
    h = again.model(ids, Layout(1, 5))
    assert torch.equal(again(ids), h @ again.model.embed_tokens.weight.T) and torch.equal(again(ids), small(ids))
