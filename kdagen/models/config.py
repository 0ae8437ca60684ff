"""The configuration of a hybrid model: the fields of the released config.json, and what kdagen adds to them.

Plain data, without torch. What was read is written again as it was (`Config.json`); how the JSON's spellings are read
is in kdagen.models.config_json, what the fields mean in the layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kdagen.errors import ArgumentError


@dataclass(frozen=True)
class LinearAttention:
    """The layers that scan: their heads, and which they are (numbers from 1).

    Without lists the pattern is `ratio` linear layers before each of full attention, which the last layer is too; a
    ratio of 0 is full attention throughout, None linear attention throughout.
    """

    head_dim: int = 128
    num_heads: int = 32
    short_conv_kernel_size: int = 4
    kda_layers: tuple[int, ...] | None = None
    full_attn_layers: tuple[int, ...] | None = None
    gate_lower_bound: float | None = None  # None: a softplus gate, without bound
    use_full_rank_gate: bool = False  # of the output gate: g_proj in place of g_a_proj and g_b_proj
    ratio: int | None = 3
    mixer: str = "kda"  # or a recurrence of the zoo, or file.py:name
    gate: str | None = None  # of KDA: "softplus", "bounded" or "clamped"; by gate_lower_bound unless given
    allow_neg_eigval: bool = False  # rates up to 2
    use_full_rank_forget_gate: bool = False  # f_proj in place of f_a_proj and f_b_proj

    @property
    def gate_kind(self) -> str:
        """The gate of KDA."""
        return self.gate or ("softplus" if self.gate_lower_bound is None else "bounded")


@dataclass(frozen=True)
class Config:
    """A hybrid model of linear and full attention. Defaults are those of the released model of 48B parameters."""

    vocab_size: int = 163840
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 27
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # as many as there are heads: latents are shared by all in any case
    linear_attn_config: LinearAttention = LinearAttention()
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64  # of the part of a key that all heads share; nothing is rotated
    v_head_dim: int = 128
    mla_use_nope: bool = True
    mla_use_output_gate: bool = False
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    num_experts: int = 256
    num_experts_per_token: int = 8
    num_shared_experts: int = 1
    moe_intermediate_size: int = 1024
    moe_router_activation_func: str = "sigmoid"
    moe_renormalize: bool = True
    routed_scaling_factor: float = 2.446
    use_grouped_topk: bool = True
    num_expert_group: int = 1
    topk_group: int = 1
    hidden_act: str = "silu"  # or "situ", whose two parts are bounded by the betas
    activation_situ_beta: float = 4.0
    activation_situ_linear_beta: float | None = 25.0
    attn_res_block_size: int | None = None  # layers a block of attention residuals; None: plain residuals
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    model_type: str = "kimi_linear"
    bos_token_id: int | None = 163584
    eos_token_id: int | tuple[int, ...] | None = 163586
    pad_token_id: int | None = 163839
    others: dict = field(default_factory=dict, hash=False)  # fields that mean nothing here, as they were read
    written: tuple[str, ...] | None = field(default=None, compare=False, repr=False)  # the fields that were read

    def __post_init__(self):
        from kdagen.models.config_json import check

        check(self)

    @cached_property
    def full_attention(self) -> tuple[bool, ...]:
        """Of each layer, whether it is one of full attention."""
        linear, count = self.linear_attn_config, self.num_hidden_layers
        if linear.full_attn_layers is not None:
            return tuple(n in linear.full_attn_layers for n in range(1, count + 1))
        if linear.ratio is None:
            return (False,) * count
        return tuple(n % (linear.ratio + 1) == 0 or n == count for n in range(1, count + 1))

    @cached_property
    def sparse(self) -> tuple[bool, ...]:
        """Of each layer, whether its MLP is a mixture of experts."""
        first, every = self.first_k_dense_replace, self.moe_layer_freq
        return tuple(bool(self.num_experts) and i >= first and i % every == 0 for i in range(self.num_hidden_layers))

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens after which nothing is generated."""
        found = self.eos_token_id
        return () if found is None else found if isinstance(found, tuple) else (found,)

    def json(self) -> dict:
        """The fields as config.json has them: those that were read, and those that differ from what is usual."""
        from kdagen.models.config_json import to_json

        return to_json(self)

    def save(self, folder) -> Path:
        """Writes config.json into a folder."""
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(self.json(), indent=2, sort_keys=True) + "\n")
        return path

    @classmethod
    def load(cls, folder) -> Config:
        """The config.json of a folder, or a file of another name."""
        path = Path(folder)
        path = path / "config.json" if path.is_dir() else path
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ArgumentError(f"{path}: expected the config.json of a model: {error}") from None
        return cls.of(found, str(path))

    @classmethod
    def of(cls, found: dict, where: str = "config") -> Config:
        """The configuration that a config.json's dict says, `where` for error messages.

        Raises:
            ArgumentError: fields that are unknown, contradict each other, or ask for what is not served.
        """
        from kdagen.models.config_json import from_json

        return from_json(found, where)
