"""The released config.json: what is read is written again; patterns of layers; transformers' spelling."""

import json
import subprocess
import sys
from pathlib import Path

from small_models import SMALL, config

import kdagen
from kdagen.models import Config, LinearAttention

FULL = [4, 8, 12, 16, 20, 24, 27]
RELEASED = {
    "architectures": ["KimiLinearForCausalLM"],
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": FULL,
        "head_dim": 128,
        "kda_layers": [n for n in range(1, 28) if n not in FULL],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def test_the_released_config_is_written_as_it_was_read(tmp_path):
    found = Config.of(RELEASED)
    assert found.json() == RELEASED
    found.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == RELEASED
    assert Config.load(tmp_path) == found


def test_its_defaults_are_those_of_the_release():
    found, usual = Config.of(RELEASED), Config()
    assert usual.full_attention == found.full_attention == tuple(n in FULL for n in range(1, 28))
    assert usual.sparse == found.sparse == (False,) + (True,) * 26
    assert found.stop_tokens == (163586,)


def test_what_is_written_is_read_back():
    for linear in ({}, {"gate_lower_bound": -5.0, "use_full_rank_gate": False}, {"mixer": "gla", "ratio": None}):
        found = config(linear, eos_token_id=[1, 2], attn_res_block_size=2)
        assert Config.of(found.json()) == found
        assert (
            found.json()["linear_attn_config"] == {"head_dim": 16, "num_heads": 2, "short_conv_kernel_size": 4} | linear
        )
    written = Config(num_hidden_layers=3, linear_attn_config=LinearAttention(ratio=1))
    assert Config.of(written.json()) == written


def test_ratios():
    layers = {0: "ffff", 1: "lflf", 2: "llff", 3: "lllf", 9: "lllf", None: "llll"}
    for ratio, expected in layers.items():
        assert "".join("lf"[full] for full in config({"ratio": ratio}).full_attention) == expected


def test_the_spelling_of_transformers():
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    own = {name: x for name, x in SMALL.items() if name != "num_hidden_layers"}
    said = {"layer_types": kinds, "mlp_layer_types": ["dense", "dense", "sparse"], "linear_head_dim": 32}
    said |= {"linear_num_heads": 2, "linear_conv_kernel_dim": 3, "attention_bias": False, "attention_dropout": 0.0}
    found = Config.of(own | said | {"num_hidden_layers": 3, "qk_head_dim": 24})
    assert found.full_attention == (False, True, False) and found.sparse == (False, False, True)
    linear = found.linear_attn_config
    assert (linear.head_dim, linear.num_heads, linear.short_conv_kernel_size) == (32, 2, 3)
    assert linear.kda_layers == (1, 3) and linear.full_attn_layers == (2,)
    assert Config.of(found.json()) == found


def test_nothing_is_imported_before_it_is_used():
    """Configs are read without torch, and no room of the compiler or the runtime knows of models."""
    script = "import sys; from kdagen.models import Config; Config(); print({'torch', 'sympy'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
    package = Path(kdagen.__file__).parent
    others = [path for path in package.glob("*/**/*.py") if package / "models" not in path.parents]
    assert len(others) > 100 and not [path for path in others if "kdagen.models" in path.read_text()]
