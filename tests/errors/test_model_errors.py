"""Every error of kdagen.models: what was given, what was expected, how to fix it."""

import json

import pytest
import torch

from kdagen import ArgumentError, RecurrenceError
from kdagen.models import Cache, Config, KimiLinear, LinearAttention
from kdagen.models.checkpoint import INDEX

SMALL = {
    **{"vocab_size": 11, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4, "num_experts": 0},
    "linear_attn_config": {"head_dim": 8, "num_heads": 1},
}
THEIRS = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
EXPERTS = {"num_experts": 8, "moe_intermediate_size": 4, "num_experts_per_token": 4}

CONFIGS = {
    r"config: unknown depth: expected fields of the released model \(vocab_size, .*\); remove what": {"depth": 3},
    r"config: unknown conv in linear_attn_config: expected some of head_dim, ": {"linear_attn_config": {"conv": 4}},
    r"config: attention_bias is True, expected False: others are not served": {"attention_bias": True},
    r"config: rope_scaling is \{.*\}, expected None: others": {"rope_scaling": {"factor": 2}},
    r"config: hidden_size is 0, expected a number from 1 up": {"hidden_size": 0},
    r"config: head_dim is '8', expected a number from 1 up": {"linear_attn_config": {"head_dim": "8"}},
    r"config: num_key_value_heads is 1, num_attention_heads 2: expected the same, for each head reads": {
        "num_key_value_heads": 1
    },
    r"config: linear_attn_config has one of kda_layers and full_attn_layers: expected both lists, or none": {
        "linear_attn_config": {"kda_layers": [1, 2]}
    },
    r"among them \(in neither: 2; in both: 1; beyond the model: 0\): expected each layer in one": {
        "linear_attn_config": {"kda_layers": [0, 1], "full_attn_layers": [1]}
    },
    r"do not divide layers 1 to 2 among them \(a layer is listed twice\)": {
        "linear_attn_config": {"kda_layers": [1, 1], "full_attn_layers": [2]}
    },
    r"config: ratio is -1, expected a number of linear layers before each of full attention, or None": {
        "linear_attn_config": {"ratio": -1}
    },
    r"config: model_type is 'llama', expected 'kimi_linear': others are not served": {"model_type": "llama"},
    r"config: moe_router_activation_func is 'softmax', expected 'sigmoid'": {"moe_router_activation_func": "softmax"},
    r"config: hidden_act is 'gelu', expected 'silu' or 'situ'": {"hidden_act": "gelu"},
    r"config: mla_use_nope is False, expected True": {"mla_use_nope": False},
    r"config: gate is 'linear', expected None or 'softplus' or 'bounded' or 'clamped'": {
        "linear_attn_config": {"gate": "linear", "gate_lower_bound": -5.0}
    },
    r"config: gate is 'clamped' and gate_lower_bound None: expected a bound with 'bounded' and 'clamped', and none": {
        "linear_attn_config": {"gate": "clamped"}
    },
    r"config: gate_lower_bound is 5.0, expected a log decay below 0, such as -5.0": {
        "linear_attn_config": {"gate_lower_bound": 5.0}
    },
    r"config: num_experts_per_token is 9, expected 1 to num_experts = 8": EXPERTS | {"num_experts_per_token": 9},
    r"config: num_expert_group is 3 and topk_group 1 for 8 experts: expected groups of equal size, and no more": EXPERTS
    | {"num_expert_group": 3},
    r"config: topk_group is 1: so many groups of 2 experts hold fewer than num_experts_per_token = 4": EXPERTS
    | {"num_expert_group": 4},
    r"config: layer_types hold sliding: expected linear_attention or full_attention": THEIRS
    | {"layer_types": ["sliding", "full_attention"]},
    r"config: mlp_layer_types has a dense layer after a sparse one: expected dense layers first": THEIRS
    | {"mlp_layer_types": ["sparse", "dense"]},
    r"config: mlp_layer_types hold odd: expected dense or sparse": THEIRS | {"mlp_layer_types": ["odd", "dense"]},
    r"config: first_k_dense_replace is 2, but what transformers writes beside it says 1: expected one of both": THEIRS
    | {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 2},
}


@pytest.mark.parametrize("message", CONFIGS)
def test_configs(message):
    fields = SMALL | CONFIGS[message]
    if "layer_types" in fields:
        del fields["linear_attn_config"]
    with pytest.raises(ArgumentError, match=message):
        Config.of(fields)


def test_configs_in_files_and_in_python(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"hidden_size": -1}))
    with pytest.raises(ArgumentError, match=r"config\.json: hidden_size is -1, expected a number from 1 up"):
        Config.load(tmp_path)
    with pytest.raises(ArgumentError, match=r"nowhere: expected the config.json of a model"):
        Config.load(tmp_path / "nowhere")
    with pytest.raises(
        ArgumentError, match="linear_attn_config is a dict, expected a LinearAttention, or a dict in conf"
    ):
        Config(linear_attn_config={})
    assert Config(linear_attn_config=LinearAttention(ratio=None)).full_attention == (False,) * 27


@pytest.fixture(scope="module")
def small():
    return KimiLinear(Config.of(SMALL), seed=0)


def test_mixers(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import kdagen as kg\n\n@kg.recurrence\ndef mine(S, q, k, v, heads: kg.HeadParameter):\n"
        "    S = S + kg.outer(k, kg.sigmoid(heads) * v)\n    return S, S.T @ q\n"
    )
    linear = SMALL["linear_attn_config"] | {"mixer": f"{path}:mine"}
    with pytest.raises(
        RecurrenceError, match="recurrence 'mine': its parameter 'heads' is called as something that eve"
    ):
        KimiLinear(Config.of(SMALL | {"linear_attn_config": linear}))
    with pytest.raises(RecurrenceError, match="no recurrence 'lstm' in the zoo"):
        KimiLinear(Config.of(SMALL | {"linear_attn_config": linear | {"mixer": "lstm"}}))


def test_tokens(small):
    row = torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(
        ArgumentError, match=r"input_ids has shape \[6\], expected \[B, T\]: call input_ids.unsqueeze\(0\)"
    ):
        small(row[0])
    wrong = r"for input_ids of shape \[1, 6\]: expected one row of tokens, and 0 and the end of each sequence, the last"
    for ends in ([0, 7], [1, 6], [0, 4, 2, 6], [0, 5]):
        with pytest.raises(ArgumentError, match=wrong):
            small(row, cu_seqlens=torch.tensor(ends))
    with pytest.raises(
        ArgumentError, match=r"the cache holds 2 sequences, input_ids 1: expected as many, such as model"
    ):
        small(row, cache=small.new_cache(2))


def test_generation(small):
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ArgumentError, match="expected numbers from 0 up, and a top_p above 0 and at most 1"):
            small.generate([[1]], 3, **options)
    with pytest.raises(ArgumentError, match="chunk = 0, expected a number of tokens from 1 up"):
        small.generate([[1]], 3, chunk=0)
    with pytest.raises(
        ArgumentError, match="a prompt is empty, or prompts are not a list of lists: expected at least one"
    ):
        small.generate([[1], []], 3)


def test_caches(small, tmp_path):
    cache = small.new_cache(1)
    small(torch.zeros(1, 6, dtype=torch.int64), cache=cache)
    cache.save(tmp_path / "cache")
    other = KimiLinear(Config.of(SMALL | {"linear_attn_config": {"head_dim": 4, "num_heads": 1}}))
    with pytest.raises(
        ArgumentError, match=r"the cache of another model: 0.state is \[1, 1, 8, 8\] there, \[1, 1, 4, 4\]"
    ):
        Cache.load(tmp_path / "cache", other)
    with pytest.raises(ArgumentError, match="missing: expected a cache that was saved by Cache.save"):
        Cache.load(tmp_path / "missing", small)
    small.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match="expected a cache that was saved by Cache.save, format kdagen-cache-1"):
        Cache.load(tmp_path / "model.safetensors", small)


def test_checkpoints(small, tmp_path):
    from safetensors.torch import load_file, save_file

    small.config.save(tmp_path)
    with pytest.raises(
        ArgumentError, match="expected model.safetensors, or model.safetensors.index.json and its shards"
    ):
        KimiLinear.from_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["extra"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:3].contiguous()
    save_file(tensors, path)
    with pytest.raises(ArgumentError) as raised:
        KimiLinear.from_pretrained(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}: 3 tensors do not fit the model that config.json describes\n"
        "  missing (1):\n    model.norm.weight\n"
        "  surplus (1):\n    extra is [16]\n"
        "  of another shape (1):\n    lm_head.weight is [3, 16], expected [11, 16]\n"
        "expected the checkpoint and the config.json of one model"
    )
    path.write_bytes(b"no tensors")
    with pytest.raises(ArgumentError, match="model.safetensors: expected a safetensors file"):
        KimiLinear.from_pretrained(tmp_path)


def test_many_wrong_tensors(tmp_path):
    KimiLinear(Config.of(SMALL), seed=0).save_pretrained(tmp_path)
    Config.of(SMALL | EXPERTS).save(tmp_path)
    with pytest.raises(ArgumentError, match=r"missing \(29\):(?s:.*)and 9 more"):
        KimiLinear.from_pretrained(tmp_path)


def test_shards(small, tmp_path):
    small.save_pretrained(tmp_path, 4000)
    lost = sorted(set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values()))[0]
    (tmp_path / lost).unlink()
    with pytest.raises(ArgumentError, match=f"{INDEX} names {lost}, which is not there: expected all shards"):
        KimiLinear.from_pretrained(tmp_path)
