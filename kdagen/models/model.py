"""The model: embedding, layers of linear and full attention with dense and sparse MLPs, the head.

Parameters are called as in the release, so checkpoints need no map. Reading and writing them is in checkpoint, caches
in cache, generating in generation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kdagen.errors import ArgumentError
from kdagen.models.config import Config
from kdagen.models.layers import MLP, Linear, Packed, RMSNorm, attended
from kdagen.models.layout import Layout, layout_of
from kdagen.models.mixer import Mixer
from kdagen.models.mla import LatentAttention
from kdagen.models.moe import SparseMLP
from kdagen.models.step import Steps


class Layer(nn.Module):
    """Attention of one kind, then an MLP of one kind, each behind a norm and added to what came before."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = LatentAttention(config) if config.full_attention[index] else Mixer(config)
        if config.sparse[index]:
            self.block_sparse_moe = SparseMLP(config)
        else:
            self.mlp = MLP(config, config.intermediate_size)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.block = config.attn_res_block_size
        if self.block:
            self.begins_block = index % self.block == 0
            self.self_attention_res_proj, self.self_attention_res_norm = Linear(size, 1), RMSNorm(size, eps)
            self.mlp_res_proj, self.mlp_res_norm = Linear(size, 1), RMSNorm(size, eps)

    def forward(self, h, sources: tuple, layout: Layout, state=None) -> tuple:
        """The residual sum and, of attention residuals, the sums of blocks before it."""
        if not self.block:
            h = h + self.attention(h, layout, state)
            return h + self.feed_forward(h), sources
        x = attended([*sources, h], self.self_attention_res_proj, self.self_attention_res_norm)
        if self.begins_block:
            sources, h = (*sources, h), None
        found = self.attention(x, layout, state)
        h = found if h is None else h + found
        return h + self.feed_forward(attended([*sources, h], self.mlp_res_proj, self.mlp_res_norm)), sources

    def attention(self, x, layout: Layout, state):
        """Of the normed input."""
        return self.self_attn(self.input_layernorm(x), layout, state)

    def feed_forward(self, x):
        """Of the normed input."""
        mlp = self.mlp if hasattr(self, "mlp") else self.block_sparse_moe
        return mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """All layers, from tokens to the normed last hidden states."""

    def __init__(self, config: Config):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, size, _weight=torch.empty(config.vocab_size, size))
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, eps)
        self.residuals, self.steps = bool(config.attn_res_block_size), Steps()
        if self.residuals:
            self.output_attn_res_proj, self.output_attn_res_norm = Linear(size, 1), RMSNorm(size, eps)

    def forward(self, input_ids, layout: Layout, cache=None):
        h, sources = self.embed_tokens(input_ids), ()
        if cache is not None and (found := self.steps.run(self, h, layout, cache)) is not None:
            return found
        for i, layer in enumerate(self.layers):
            h, sources = layer(h, sources, layout, None if cache is None else cache.layers[i])
        if self.residuals:
            h = attended([*sources, h], self.output_attn_res_proj, self.output_attn_res_norm)
        return self.norm(h)


class KimiLinear(nn.Module):
    """A hybrid language model: `logits = model(input_ids)`.

    `KimiLinear(config, seed=0)` has random parameters; `KimiLinear.from_pretrained(folder)` those of a checkpoint.
    """

    def __init__(self, config: Config, seed: int | None = None):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        if not self.model.norm.weight.is_meta:
            from kdagen.models.initial import initialise

            generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
            initialise(self, config.initializer_range, generator)

    @property
    def device(self):
        """Where the parameters are."""
        return self.model.norm.weight.device

    @property
    def dtype(self):
        """That of activations; some parameters stay in float32 whatever it is."""
        return self.model.norm.weight.dtype

    def forward(self, input_ids, cache=None, cu_seqlens=None, last: bool = False, group=None):
        """Logits [B, T, vocab_size] of tokens [B, T].

        Args:
            cu_seqlens: 0 and the end of each of N sequences that stand behind each other in a single row.
            cache: what came before (`new_cache`); it is brought up to date, and no gradient flows.
            last: of the last token of each sequence alone, [N, vocab_size].
            group: of torch.distributed, such as dist.group.WORLD: each rank has consecutive tokens of every sequence,
                and gives its own (cu_seqlens too: see kdagen.sequence_parallel). Gradients of parameters are its own
                contribution, to be summed over the group.

        Raises:
            ArgumentError: shapes or sequences that do not fit each other, the cache, or those of other ranks.
        """
        if group is not None and (cache is not None or last):
            raise ArgumentError(
                f"{'a cache' if cache is not None else 'last=True'} was given beside a group: expected neither, for "
                f"sequences are split over ranks in training and scoring alone; generate in one process"
            )
        layout = layout_of(input_ids, cu_seqlens, None if cache is None else tuple(cache.lengths), group)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            h = self.model(input_ids, layout, cache)
            if cache is not None:
                cache.advance(layout.lengths)
            if last:
                h = h[:, -1] if layout.ends is None else h[0, [end - 1 for end in layout.ends[1:]]]
            return F.linear(h, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(h)

    def new_cache(self, sequences: int = 1):
        """An empty cache of so many sequences."""
        from kdagen.models.cache import Cache

        self.pack()
        make = lambda layer: layer.self_attn.new_state(sequences, self.dtype, self.device)  # noqa: E731
        return Cache([make(layer) for layer in self.model.layers], [0] * sequences)

    @torch.no_grad()
    def pack(self) -> None:
        """Lays weights that read the same input behind each other in memory, for speed; parameters stay what they are.

        Not under FSDP, which has a memory of its own for them.
        """
        if not any(type(m).__name__.startswith("FSDP") for m in self.modules()):
            for m in self.modules():
                for packed in vars(m).values():
                    if isinstance(packed, Packed):
                        packed.pack()

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens: int, **options) -> list[list[int]]:
        """New tokens for each prompt: see kdagen.models.generation.generate."""
        from kdagen.models.generation import generate

        return generate(self, prompts, max_new_tokens, **options)

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu") -> KimiLinear:
        """The model of a folder of config.json and safetensors: see kdagen.models.checkpoint.load."""
        from kdagen.models.checkpoint import load

        return load(cls, folder, dtype, device)

    def save_pretrained(self, folder, shard_bytes: int = 5 << 30) -> None:
        """Writes config.json and safetensors: see kdagen.models.checkpoint.save."""
        from kdagen.models.checkpoint import save

        save(self, folder, shard_bytes)
