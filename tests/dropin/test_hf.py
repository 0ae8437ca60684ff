"""transformers' kimi_linear with and without kdagen's ops: a small random model in float32, on the CPU."""

import importlib
import sys

import pytest
import torch

import kdagen
from kdagen import hf

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "linear_head_dim": 16,
    "linear_num_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


@pytest.fixture(scope="module")
def model():
    import transformers

    torch.manual_seed(0)
    found = transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**CONFIG)).float().eval()
    with torch.no_grad():  # decays and gates of every strength, which the initial values do not have
        for name, parameter in found.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
            if name.endswith(("A_log", "dt_bias")):
                parameter.copy_(torch.randn_like(parameter))
    return found


@pytest.fixture
def calls(monkeypatch):
    """Names of kdagen's functions, as they are called."""
    import kdagen.fla.kda as module

    seen = []
    for name in ("chunk_kda", "fused_recurrent_kda"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=function, **k: seen.append(_f.__name__) or _f(*a, **k))
    return seen


TOKENS = torch.randint(1, 97, (2, 75), generator=torch.Generator().manual_seed(1))


def close(found, expected) -> bool:
    return bool((found - expected).abs().max() <= 5e-5 * max(1.0, expected.abs().max()))


@torch.no_grad()
def test_logits_of_a_prefill(model, calls):
    expected = model(TOKENS).logits
    assert not calls
    with hf.patch():
        found = model(TOKENS).logits
    assert calls == ["chunk_kda"] * 2
    assert close(found, expected)
    model(TOKENS)
    assert len(calls) == 2  # its own functions again


@torch.no_grad()
def test_padded_on_the_left(model):
    mask = torch.ones_like(TOKENS)
    mask[1, :20] = 0
    expected = model(TOKENS, attention_mask=mask).logits
    with hf.patch():
        found = model(TOKENS, attention_mask=mask).logits
    assert close(found[mask.bool()], expected[mask.bool()])


def decode(model) -> list:
    """Logits of a prefill, of tokens one by one from its cache, and of several at once."""
    results = model(TOKENS[:, :60], use_cache=True)
    logits, cache = [results.logits], results.past_key_values
    for t in (*range(60, 65), slice(65, 75)):
        tokens = TOKENS[:, t : t + 1] if isinstance(t, int) else TOKENS[:, t]
        results = model(tokens, past_key_values=cache, use_cache=True)
        logits.append(results.logits)
    return logits


@torch.no_grad()
def test_decoding_from_a_cache(model, calls):
    expected = decode(model)
    with hf.patch():
        found = decode(model)
    assert calls == ["chunk_kda"] * 2 + ["fused_recurrent_kda"] * 10 + ["chunk_kda"] * 2
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_generate(model, calls):
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(TOKENS[:, :30], **options)
    with hf.patch():
        found = model.generate(TOKENS[:, :30], **options)
    assert calls.count("fused_recurrent_kda") == 2 * 11
    assert torch.equal(found.sequences, expected.sequences)
    assert all(close(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_gradients(model):
    def gradients():
        model.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with hf.patch():
        found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm().clamp(min=1e-4), name


def test_patch_and_unpatch():
    modeling = importlib.import_module(hf.MODULE)
    own = modeling.chunk_kimi_delta_attention, modeling.recurrent_kimi_delta_attention
    hf.unpatch()  # nothing to do
    hf.patch()
    hf.patch()  # twice is once
    assert modeling.chunk_kimi_delta_attention is hf.chunk_kimi_delta_attention
    hf.unpatch()
    assert (modeling.chunk_kimi_delta_attention, modeling.recurrent_kimi_delta_attention) == own
    with pytest.raises(ZeroDivisionError), hf.patch():
        1 / 0  # noqa: B018
    assert modeling.chunk_kimi_delta_attention is own[0]


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.kimi_linear.modeling_kimi_linear", None)
    with pytest.raises(kdagen.ArgumentError, match="needs the kimi_linear of transformers 5.23 or like it"):
        hf.patch()


def test_another_transformers(monkeypatch):
    modeling = importlib.import_module(hf.MODULE)
    monkeypatch.delattr(modeling, "recurrent_kimi_delta_attention")
    own = modeling.chunk_kimi_delta_attention
    with pytest.raises(kdagen.ArgumentError, match="has no attribute 'recurrent_kimi_delta_attention'"):
        hf.patch()
    assert modeling.chunk_kimi_delta_attention is own
