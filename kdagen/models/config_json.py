"""How config.json is read, written and checked: spellings, fields that mean nothing here, contradictions.

Two spellings are read: that of the release (linear_attn_config, layers from 1) and that which transformers 5 writes
(layer_types, linear_head_dim and so on). The first is written.
"""

from __future__ import annotations

from dataclasses import asdict, fields

from kdagen.errors import ArgumentError
from kdagen.models.config import Config, LinearAttention

OWN = tuple(f.name for f in fields(Config) if f.name not in ("others", "written"))
LINEAR = tuple(f.name for f in fields(LinearAttention))

# Fields that say nothing about what is computed here: kept, and written as they were.
UNUSED = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "topk_method"),
    *("use_cache", "head_dim", "qk_head_dim", "rope_theta", "rope_parameters", "model_max_length", "return_dict"),
    *("max_position_embeddings", "pretraining_tp", "output_router_logits", "output_hidden_states", "output_attentions"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "problem_type", "id2label", "label2id"),
)

# Fields that must have one value, if they are there: another asks for what these models do not have.
FIXED = {"attention_bias": (False,), "attention_dropout": (0, None), "rope_scaling": (None,)}

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank"),
    *("qk_nope_head_dim", "v_head_dim", "moe_layer_freq"),
)
KINDS = {"linear_attention": "kda_layers", "full_attention": "full_attn_layers"}
MLPS = {"dense": True, "sparse": False}


def from_json(found: dict, where: str) -> Config:
    """A Config of what a config.json says."""
    read = respelled(found, where)
    unknown = [name for name in read if name not in (*OWN, *UNUSED, *FIXED)]
    if unknown:
        raise ArgumentError(
            f"{where}: unknown {', '.join(sorted(unknown))}: expected fields of the released model "
            f"({', '.join(OWN)}); remove what should be ignored"
        )
    for name, legal in FIXED.items():
        if name in read and read[name] not in legal:
            raise ArgumentError(f"{where}: {name} is {read[name]!r}, expected {legal[0]!r}: others are not served")
    own = {name: _tuple(read[name]) for name in OWN if name in read}
    if isinstance(own.get("linear_attn_config"), dict):
        own["linear_attn_config"] = _linear(own["linear_attn_config"], where)
    others = {name: read[name] for name in (*UNUSED, *FIXED) if name in read}
    try:
        linear = read.get("linear_attn_config")
        inner = [f"linear_attn_config.{name}" for name in linear] if isinstance(linear, dict) else []
        return Config(**own, others=others, written=(*found, *inner))
    except ArgumentError as error:
        raise ArgumentError(str(error).replace("config:", f"{where}:", 1)) from None


def _linear(found: dict, where: str) -> LinearAttention:
    if unknown := sorted(set(found) - set(LINEAR)):
        raise ArgumentError(
            f"{where}: unknown {', '.join(unknown)} in linear_attn_config: expected some of {', '.join(LINEAR)}"
        )
    return LinearAttention(**{name: _tuple(value) for name, value in found.items()})


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def respelled(found: dict, where: str) -> dict:
    """What transformers 5 writes, in the names of the release; both may be there, if they agree."""
    found = dict(found)
    theirs = {name: found.pop(f"linear_{name}") for name in ("head_dim", "num_heads") if f"linear_{name}" in found}
    if "linear_conv_kernel_dim" in found:
        theirs["short_conv_kernel_size"] = found.pop("linear_conv_kernel_dim")
    kinds = _kinds(found.pop("layer_types", None), KINDS, "layer_types", where)
    if kinds is not None:
        theirs |= {name: [n for n, k in enumerate(kinds, 1) if k == name] for name in KINDS.values()}
    if theirs:
        linear = found.get("linear_attn_config") or {}
        found["linear_attn_config"] = _agreed(linear, theirs, where)
    dense = _kinds(found.pop("mlp_layer_types", None), MLPS, "mlp_layer_types", where)
    if dense is not None:
        first = dense.index(False) if False in dense else len(dense)
        if any(dense[first:]):
            raise ArgumentError(
                f"{where}: mlp_layer_types has a dense layer after a sparse one: expected dense layers first"
            )
        found = _agreed(found, {"first_k_dense_replace": first}, where)
    return found


def _kinds(kinds: list | None, legal: dict, name: str, where: str) -> list | None:
    if wrong := sorted({str(kind) for kind in kinds or ()} - set(legal)):
        raise ArgumentError(f"{where}: {name} hold {', '.join(wrong)}: expected {' or '.join(legal)}")
    return kinds and [legal[kind] for kind in kinds]


def _agreed(own: dict, theirs: dict, where: str) -> dict:
    for name, value in theirs.items():
        if own.get(name, value) != value:
            raise ArgumentError(
                f"{where}: {name} is {own[name]!r}, but what transformers writes beside it says {value!r}: expected "
                f"one of both, or that they agree"
            )
    return own | theirs


def to_json(config: Config) -> dict:
    """The fields that were read, as they were, and those that are not as usual."""
    usual, every = Config(), config.written is None
    written = config.written or ()
    said = {
        name: getattr(config, name)
        for name in OWN
        if every or name in written or name == "model_type" or getattr(config, name) != getattr(usual, name)
    }
    if "linear_attn_config" in said:
        usual_linear = asdict(LinearAttention())
        linear = asdict(config.linear_attn_config)
        always = ("head_dim", "num_heads", "short_conv_kernel_size")
        said["linear_attn_config"] = {
            name: _list(x)
            for name, x in linear.items()
            if name in always or f"linear_attn_config.{name}" in written or x != usual_linear[name]
        }
    return {name: _list(x) for name, x in (said | config.others).items()}


def _list(value):
    return list(value) if isinstance(value, tuple) else value


def check(config: Config) -> None:
    """Refuses fields that contradict each other, or that ask for what is not served."""
    for problems in (_sizes, _layers, _choices, _experts):
        for problem in problems(config):
            raise ArgumentError(f"config: {problem}")


def _sizes(c: Config):
    linear = c.linear_attn_config
    if not isinstance(linear, LinearAttention):
        yield f"linear_attn_config is a {type(linear).__name__}, expected a LinearAttention, or a dict in config.json"
        return
    found = {name: getattr(c, name) for name in SIZES}
    found |= {name: getattr(linear, name) for name in ("head_dim", "num_heads", "short_conv_kernel_size")}
    for name, size in found.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            yield f"{name} is {size!r}, expected a number from 1 up"
    if c.num_key_value_heads not in (None, c.num_attention_heads):
        yield (
            f"num_key_value_heads is {c.num_key_value_heads}, num_attention_heads {c.num_attention_heads}: expected "
            f"the same, for each head reads keys of its own from the latents"
        )


def _layers(c: Config):
    kda, full = c.linear_attn_config.kda_layers, c.linear_attn_config.full_attn_layers
    if (kda is None) != (full is None):
        yield "linear_attn_config has one of kda_layers and full_attn_layers: expected both lists, or none and a ratio"
    elif kda is not None and sorted((*kda, *full)) != list(range(1, c.num_hidden_layers + 1)):
        every = set(range(1, c.num_hidden_layers + 1))
        found = {
            "in neither": sorted(every - {*kda, *full}),
            "in both": sorted({*kda} & {*full}),
            "beyond the model": sorted({*kda, *full} - every),
        }
        said = "; ".join(f"{what}: {', '.join(map(str, which))}" for what, which in found.items() if which)
        yield (
            f"kda_layers and full_attn_layers do not divide layers 1 to {c.num_hidden_layers} among them "
            f"({said or 'a layer is listed twice'}): expected each layer in one of the lists, counted from 1"
        )
    ratio = c.linear_attn_config.ratio
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 0):
        yield f"ratio is {ratio!r}, expected a number of linear layers before each of full attention, or None"


def _choices(c: Config):
    linear = c.linear_attn_config
    legal = {
        "model_type": (c.model_type, ("kimi_linear",)),
        "moe_router_activation_func": (c.moe_router_activation_func, ("sigmoid",)),
        "hidden_act": (c.hidden_act, ("silu", "situ")),
        "mla_use_nope": (c.mla_use_nope, (True,)),
        "num_nextn_predict_layers": (c.num_nextn_predict_layers, (0, None)),
        "gate": (linear.gate, (None, "softplus", "bounded", "clamped")),
    }
    for name, (value, allowed) in legal.items():
        if value not in allowed:
            yield f"{name} is {value!r}, expected {' or '.join(map(repr, allowed))}: others are not served"
    if (linear.gate_kind == "softplus") != (linear.gate_lower_bound is None):
        yield (
            f"gate is {linear.gate_kind!r} and gate_lower_bound {linear.gate_lower_bound!r}: expected a bound with "
            f"'bounded' and 'clamped', and none with 'softplus'"
        )
    if linear.gate_lower_bound is not None and not linear.gate_lower_bound < 0:
        yield f"gate_lower_bound is {linear.gate_lower_bound!r}, expected a log decay below 0, such as -5.0"


def _experts(c: Config):
    if not c.num_experts or not any(c.sparse):
        return
    if not 0 < c.num_experts_per_token <= c.num_experts:
        yield f"num_experts_per_token is {c.num_experts_per_token}, expected 1 to num_experts = {c.num_experts}"
    groups, kept = (c.num_expert_group, c.topk_group) if c.use_grouped_topk else (1, 1)
    if c.num_experts % groups or not 0 < kept <= groups:
        yield (
            f"num_expert_group is {groups} and topk_group {kept} for {c.num_experts} experts: expected groups of equal "
            f"size, and no more of them kept than there are"
        )
    elif c.num_experts // groups * kept < c.num_experts_per_token:
        yield (
            f"topk_group is {kept}: so many groups of {c.num_experts // groups} experts hold fewer than "
            f"num_experts_per_token = {c.num_experts_per_token}; expected more of them"
        )
