"""Checkpoints that transformers' kimi_linear wrote, read by kdagen: the same logits, cached or not, the same tokens.

Its code is the reference: nobody here wrote it. Both run in float32 on the CPU.
"""

import pytest
import torch
import transformers
from small_models import close, shaken, tokens

from kdagen.models import KimiLinear

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "linear_num_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}
CASES = {
    "32": {"linear_head_dim": 32},
    "64": {"linear_head_dim": 64, "q_lora_rank": 20, "layer_types": ["full_attention", *BASE["layer_types"][:3]]},
    "128": {"linear_head_dim": 128, "n_group": 4, "topk_group": 2, "n_shared_experts": 2},
}
MOST = 5e-5  # absolute, on logits of about 1 in size
TOKENS = tokens(2, 150).clamp(min=1)  # 0 is padding


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A model of transformers and the same one, read from what it saved."""
    folder = tmp_path_factory.mktemp(f"kimi{request.param}")
    theirs = transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**BASE | CASES[request.param])).float()
    shaken(theirs)
    theirs.save_pretrained(folder)
    return theirs, KimiLinear.from_pretrained(folder), folder


def equal(found, expected) -> bool:
    assert expected.std() > 0.3  # logits that say something
    return bool((found - expected).abs().max() <= MOST)


@torch.no_grad()
def test_logits_of_a_prefill(pair):
    theirs, ours, _ = pair
    assert equal(ours(TOKENS), theirs(TOKENS).logits)


@torch.no_grad()
def test_cached_decoding(pair):
    """A prompt, tokens one by one, several at once, and one more."""
    theirs, ours, _ = pair
    cache, past = ours.new_cache(2), None
    for at in (slice(0, 100), *(slice(t, t + 1) for t in range(100, 110)), slice(110, 140), slice(140, 141)):
        result = theirs(TOKENS[:, at], past_key_values=past, use_cache=True)
        past = result.past_key_values
        assert equal(ours(TOKENS[:, at], cache=cache), result.logits)


@torch.no_grad()
def test_greedy_generation(pair):
    theirs, ours, _ = pair
    expected = theirs.generate(TOKENS[:, :40], max_new_tokens=30, do_sample=False)[:, 40:]
    assert ours.generate(TOKENS[:, :40], 30) == expected.tolist()
    assert ours.generate(TOKENS[:, :40], 30, chunk=13) == expected.tolist()


def test_gradients(pair):
    theirs, ours, _ = pair
    theirs(TOKENS, labels=TOKENS).loss.backward()
    logits = ours(TOKENS)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    own = dict(ours.named_parameters())
    layer = "model.layers.3.self_attn."
    for name in ("model.embed_tokens.weight", f"{layer}q_proj.weight", f"{layer}o_norm.weight", "lm_head.weight"):
        expected = theirs.get_parameter(name).grad
        assert (own[name].grad - expected).norm() <= 1e-4 * expected.norm(), name
    expected = theirs.get_parameter(f"{layer}forget_gate.A_log").grad
    assert (own[f"{layer}A_log"].grad - expected).norm() <= 1e-4 * expected.norm()


@torch.no_grad()
def test_what_is_saved_here_is_read_there(pair, tmp_path):
    theirs, ours, _ = pair
    ours.save_pretrained(tmp_path)
    again = transformers.KimiLinearForCausalLM.from_pretrained(tmp_path)
    assert close(again(TOKENS).logits, theirs(TOKENS).logits, 1e-6)
