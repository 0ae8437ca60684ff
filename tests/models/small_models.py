"""Small models: what their configs share, and parameters with decays and gates of every strength."""

import torch

from kdagen.models import Config, KimiLinear

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 24,
    "eos_token_id": None,
}


def config(linear: dict | None = None, **others) -> Config:
    """A small config; `linear` are fields of its linear_attn_config."""
    return Config.of(SMALL | {"linear_attn_config": {"head_dim": 16, "num_heads": 2} | (linear or {})} | others)


@torch.no_grad()
def shaken(model, seed: int = 0):
    """The model with random parameters far from those it begins with."""
    draw = torch.Generator().manual_seed(seed)
    for name, x in model.state_dict().items():
        if x.ndim > 1 and not name.endswith("A_log"):
            size = 1.0 if "embed_tokens" in name else x.shape[-1] ** -0.5
            x.copy_(torch.randn(x.shape, generator=draw) * size)
        elif name.endswith(("A_log", "dt_bias", "e_score_correction_bias")):
            x.copy_(torch.randn(x.shape, generator=draw) * 0.5)
        else:
            x.copy_(1 + 0.2 * torch.randn(x.shape, generator=draw))
    return model.eval()


def model(linear: dict | None = None, seed: int = 0, **others) -> KimiLinear:
    """A small model with shaken parameters."""
    return shaken(KimiLinear(config(linear, **others)), seed)


def tokens(*shape: int, seed: int = 1, vocab: int = 97):
    """Random token ids."""
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected, most: float = 2e-5) -> bool:
    """Whether no number differs by more, relative to the largest."""
    return bool((found - expected).abs().max() <= most * max(1.0, float(expected.abs().max())))
