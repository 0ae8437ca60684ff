"""Decoding by a program of native operations: what it computes, what makes it step aside, and that it says so."""

import copy
import functools
import logging
import pickle
import subprocess

import pytest
import torch
from small_models import close, config, model, shaken, tokens
from torch import nn

from kdagen.build import native
from kdagen.errors import ArgumentError
from kdagen.models import KimiLinear, step
from kdagen.models.layers import Linear
from kdagen.models.layout import Layout
from kdagen.runtime.cpu_decode import on_torch

TOKENS = tokens(3, 40)
STARTS = (5, 21, 12)
MOST = 2e-5
K3 = {"q_lora_rank": 12, "mla_use_output_gate": True, "attn_res_block_size": 2, "hidden_act": "situ"}
OWN = """
import kdagen as kg

@kg.recurrence
def own(S, query, h, value, keep: kg.Scalar(lower=0.5, upper=1.0), amount, g):
    S = kg.diag(kg.exp(g)) @ (keep * S)
    S = S + kg.outer(h, amount * (value - S.T @ h))
    return S, S.T @ query
"""

KINDS = {
    "release": {},
    "k3": {"linear": {"gate_lower_bound": -5.0, "use_full_rank_gate": True, "use_full_rank_forget_gate": True}, **K3},
    "situ without a second bound": {"hidden_act": "situ", "activation_situ_linear_beta": None, "num_experts": 0},
    "full attention, dense": {"linear": {"ratio": 0}, "num_experts": 0, "num_attention_heads": 3},
    "groups": {"num_experts": 8, "num_experts_per_token": 3, "num_expert_group": 4, "topk_group": 2},
    "groups of one": {"num_expert_group": 4, "topk_group": 3, "num_shared_experts": 0, "moe_renormalize": False},
    "mamba2, tied": {"linear": {"mixer": "mamba2", "ratio": None}, "tie_word_embeddings": True},
    "deltaproduct": {"linear": {"mixer": "deltaproduct", "short_conv_kernel_size": 2}},
    "rwkv7": {"linear": {"mixer": "rwkv7", "short_conv_kernel_size": 1}, "attn_res_block_size": 3},
    "retnet, odd sizes": {"linear": {"mixer": "retnet", "head_dim": 20, "num_heads": 3}, "hidden_size": 37},
}


def caches(small, rows: int) -> list:
    """Two of one content: of sequences of several lengths."""
    ids = torch.cat([row[:n] for row, n in zip(TOKENS[:rows], STARTS)]).unsqueeze(0)
    ends = torch.tensor([0, *STARTS[:rows]]).cumsum(0)
    found = [small.new_cache(rows) for _ in range(2)]
    for cache in found:
        small(ids, cache=cache, cu_seqlens=ends)
    return found


@torch.no_grad()
def decoded(small, cache, steps: int = 8):
    """Logits of the next tokens, one at a time."""
    return torch.cat([small(TOKENS[: cache.sequences, t : t + 1], cache=cache) for t in range(30, 30 + steps)], 1)


@torch.no_grad()
def agree(small, rows: int = 2) -> None:
    """Logits and caches, by the program and by the layers' own forward."""
    mine, theirs = caches(small, rows)
    found = decoded(small, mine)
    with on_torch():
        expected = decoded(small, theirs)
    assert close(found, expected)
    for name, x in theirs.tensors().items():
        assert not x.numel() or close(mine.tensors()[name], x), name


def whole(small) -> bool:
    """Whether all layers are in programs, as far as there are any."""
    return bool(small.model.steps.programs) and not small.model.steps.why


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_layers(kind, rows):
    small = model(**KINDS[kind])
    agree(small, rows)
    assert whole(small)


def test_a_recurrence_of_a_file(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    small = model({"mixer": f"{tmp_path / 'own.py'}:own"})
    agree(small)
    assert whole(small)


@torch.no_grad()
def test_a_long_past():
    """More latents than are taken at a time, and a room that grows."""
    small = model({"ratio": 1}, num_experts=0)
    ids, theirs = tokens(1, 300), small.new_cache(1)
    with on_torch():
        expected = small(ids, cache=theirs)
    cache = small.new_cache(1)
    found = torch.cat([small(ids[:, t : t + 1], cache=cache) for t in range(300)], 1)
    assert whole(small) and float((found - expected).abs().max()) < MOST


@torch.no_grad()
def test_bits_depend_neither_on_threads_nor_on_other_rows(monkeypatch):
    """With products shared among threads however small they are."""
    small, text = model(**KINDS["groups"]), step.text()
    expected = decoded(small, caches(small, 3)[0])
    assert torch.equal(expected, decoded(small, caches(small, 3)[0]))
    assert "#define MUCH (1 << 21)" in text
    monkeypatch.setattr(step, "text", lambda: text.replace("(1 << 21)", "1"))
    monkeypatch.setattr(step, "library", functools.cache(step.library.__wrapped__))
    small.model.steps.programs.clear()
    cache = caches(small, 3)[0]

    def hidden(rows: list[int]):
        some = cache.select(rows)
        return small.model(TOKENS[rows, :1], Layout(len(rows), 1, past=tuple(some.lengths)), some)

    alone = torch.cat([hidden([n]) for n in range(3)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(hidden([0, 1, 2]), alone)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["release", "k3", "groups", "mamba2, tied"])
def test_in_bfloat16(kind):
    """Nearer to what the same parameters give in float32 than by the layers' own forward, which round more often."""
    rounded = model(**KINDS[kind]).to(torch.bfloat16)
    exact = model(**KINDS[kind]).to(torch.bfloat16).float()
    mine, theirs = caches(rounded, 3)
    expected, found = decoded(exact, caches(exact, 3)[0]), decoded(rounded, mine)
    with on_torch():
        plain = decoded(rounded, theirs)
    assert whole(rounded) and found.dtype == torch.bfloat16
    error = (found - expected).norm()
    assert error < (plain - expected).norm() and error < 0.05 * expected.norm()
    assert [x.dtype for x in mine.tensors().values()] == [x.dtype for x in theirs.tensors().values()]
    hook(rounded)
    again, theirs = caches(rounded, 3)
    found = decoded(rounded, again)
    with on_torch():
        assert (found - decoded(rounded, theirs)).norm() < 0.05 * found.norm()
    assert rounded.model.steps.why == CHANGES[hook]


# -- what is not as the package makes it runs by its own forward, among the others


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hook(small):
    small.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, given, out: 2 * out)


def hook_of_a_layer(small):
    small.model.layers[3].register_forward_pre_hook(lambda m, given: (given[0] + 1, *given[1:]))


def replaced_forward(small):
    m = small.model.layers[2].block_sparse_moe.shared_experts
    m.forward = lambda x, run=m.forward: 2 * run(x)


def replaced_module(small):
    layer, new = small.model.layers[0].mlp, Doubled(48, 32)
    new.load_state_dict(layer.down_proj.state_dict())
    layer.down_proj = new


def bias(small):
    small.model.layers[1].self_attn.o_proj.bias = nn.Parameter(torch.ones(32))


def layout_of_a_weight(small):
    weight = small.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.mT.contiguous().mT


def dtype_of_a_buffer(small):
    bias = small.model.layers[1].block_sparse_moe.gate.e_score_correction_bias
    bias.data = bias.data.double()


def last_norm(small):
    small.model.norm.register_forward_hook(lambda m, given, out: 2 * out)


def activation(small):
    small.model.layers[0].mlp.activation = lambda g, u: g * u


CHANGES = {
    hook: {"layer 1": "o_proj has hooks"},
    hook_of_a_layer: {"layer 3": "it has hooks"},
    replaced_forward: {"layer 2": "shared_experts has hooks"},
    replaced_module: {"layer 0": "down_proj is Doubled, not Linear"},
    bias: {"layer 1": "o_proj has a bias"},
    layout_of_a_weight: {"layer 1": "weight is [32, 32], strides (1, 32), not contiguous [32, 32]"},
    dtype_of_a_buffer: {"layer 1": "e_score_correction_bias is Tensor torch.float64, not torch.float32 on the CPU"},
    last_norm: {"the last norm": "norm has hooks"},
    activation: {"layer 0": "activation is function"},
}


@pytest.mark.parametrize("residuals", [None, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_steps_aside(change, residuals, caplog):
    """Also where a program is written already."""
    small = model(attn_res_block_size=residuals)
    before = decoded(small, caches(small, 2)[0])
    assert whole(small)
    change(small)
    with caplog.at_level(logging.INFO, "kdagen"):
        agree(small)
    assert small.model.steps.why == CHANGES[change]
    (what, reason), *_ = CHANGES[change].items()
    assert f"decoding of {what} is by torch, which takes several times as long: {reason}" in caplog.text
    changed = float((decoded(small, caches(small, 2)[0]) - before).abs().max()) > 1e-3
    assert changed == (change not in (layout_of_a_weight, dtype_of_a_buffer))


@torch.no_grad()
def test_hooks_of_all_modules():
    """Torch's global ones: called for each module."""
    small, names = model(), []
    decoded(small, caches(small, 2)[0])
    cache = caches(small, 2)[0]
    handle = nn.modules.module.register_module_forward_hook(lambda m, given, out: names.append(type(m).__name__))
    try:
        small(TOKENS[:2, :1], cache=cache)
    finally:
        handle.remove()
    assert names.count("GatedRMSNorm") == 3 and names.count("Layer") == 4 and len(small.model.steps.why) == 5
    agree(small)
    assert whole(small)


@torch.no_grad()
def test_what_changes_is_seen():
    """Weights in place, weights elsewhere, other modules, another epsilon; and a hook that goes."""
    small = model()
    decoded(small, caches(small, 2)[0])
    layer = small.model.layers[1]
    changes = [
        lambda: layer.self_attn.o_proj.weight.mul_(2),
        lambda: setattr(layer.self_attn.o_proj.weight, "data", layer.self_attn.o_proj.weight * 2),
        lambda: setattr(layer, "self_attn", model(seed=5).model.layers[1].self_attn),
        lambda: setattr(layer.self_attn.o_norm, "eps", 1.0),
        lambda: setattr(small.model, "layers", small.model.layers[:3]),
        lambda: small.load_state_dict(model(seed=6).state_dict(), strict=False),
    ]
    for change in changes:
        before = decoded(small, caches(small, 2)[0])
        change()
        agree(small)
        assert whole(small) and not torch.equal(decoded(small, caches(small, 2)[0]), before)
    handle = layer.register_forward_hook(lambda m, given, out: None)
    agree(small)
    assert small.model.steps.why == {"layer 1": "it has hooks"}
    handle.remove()
    agree(small)
    assert whole(small)


def written(small) -> bool:
    return bool(small.model.steps.programs)


@torch.no_grad()
def test_calls_of_other_kinds(monkeypatch):
    """Half and double precision, autocast, several tokens, no cache, tracing: the layers' own forward."""
    for dtype in (torch.float16, torch.float64):
        small = model().to(dtype)
        decoded(small, caches(small, 2)[0])
        assert not written(small)
    small = model(num_hidden_layers=1, linear={"ratio": None}, num_experts=0)
    with torch.autocast("cpu", torch.bfloat16):
        decoded(small, caches(small, 2)[0])
    small(TOKENS[:, :1])
    small(TOKENS[:, :2], cache=small.new_cache(3))
    small(TOKENS[:1, :1], cache=small.new_cache(1), cu_seqlens=torch.tensor([0, 1]))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        decoded(small, caches(small, 2)[0])
    assert not written(small)
    small(TOKENS[:, :1], cache=small.new_cache(3))
    assert written(small)


def test_in_inference_mode_and_out_of_it():
    small = model()
    cache, other = caches(small, 2)
    with torch.inference_mode():
        decoded(small, caches(small, 2)[0])
    first = decoded(small, cache)
    with torch.inference_mode():
        assert torch.equal(decoded(small, other), first)
    assert whole(small) and len(small.model.steps.programs) == 1


@torch.no_grad()
def test_caches_that_are_not_the_models():
    """Another dtype or another layout: left to the layers, nothing is written before."""
    small = model()
    cache, other = caches(small, 2)
    layer = other.layers[0]
    layer.state = layer.state.mT.contiguous().mT
    with pytest.raises(ArgumentError, match="contiguous"):
        decoded(small, other)
    layer.state = layer.state.contiguous()
    other = caches(small, 2)[0]
    cache.layers[1].convolved = cache.layers[1].convolved.mT.contiguous().mT
    assert close(decoded(small, cache), decoded(small, other))
    assert cache.layers[1].convolved.stride() != other.layers[1].convolved.stride()


@torch.no_grad()
def test_numbers_that_are_not_finite():
    """Refused as without a program; finite states whose sums overflow are not."""
    small = model()
    cache, other = caches(small, 2)
    cache.layers[1].state[1, 0, 3, 3] = float("nan")
    with pytest.raises(ArgumentError, match=r"state_pool\[1\]"):
        decoded(small, cache)
    other.layers[1].state.fill_(3e38)
    small(TOKENS[:2, :1], cache=other)
    assert whole(small)
    full = model(**KINDS["groups"], linear={"ratio": 0})  # nothing refuses: not a number it stays
    cache = caches(full, 2)[0]
    full.model.embed_tokens.weight[TOKENS[0, 30]] = float("nan")
    found = full(TOKENS[:2, 30:31], cache=cache)
    assert found[0].isnan().all() and found[1].isfinite().all() and whole(full)


def test_copies_of_a_model():
    small = model()
    first = decoded(small, caches(small, 1)[0])
    other = copy.deepcopy(small)
    assert not written(other) and torch.equal(decoded(other, caches(other, 1)[0]), first) and whole(other)
    assert pickle.loads(pickle.dumps(small.model.steps)).programs == {}


@torch.no_grad()
def test_programs_are_few(monkeypatch):
    monkeypatch.setattr(step, "MOST", 2)
    small = model(num_hidden_layers=1, linear={"ratio": None})
    for rows in (1, 2, 3, 1):
        small(TOKENS[:rows, :1], cache=small.new_cache(rows))
        assert 1 <= len(small.model.steps.programs) <= 2


def test_no_compiler(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", "/nonexistent/cc")
    monkeypatch.setattr(step, "library", functools.cache(step.library.__wrapped__))
    small = shaken(KimiLinear(config()))
    with caplog.at_level(logging.INFO, "kdagen"):
        agree(small)
    assert not written(small) and "no C compiler found" in small.model.steps.why["all layers"]
    assert caplog.text.count("decoding of all layers is by torch") == 1


def test_the_text_compiles_without_a_warning(tmp_path):
    (tmp_path / "step.c").write_text(step.text())
    command = [*native.find_cc("tests"), *native.FLAGS, "-fopenmp", "-Wall", "-Wextra", "-Wno-unused-function"]
    run = subprocess.run([*command, "step.c", "-o", "step.so", "-lm"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr
