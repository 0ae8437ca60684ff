"""Full attention from latents (MLA), without positions: what is kept of a token is one latent and one shared key.

A head's keys and values are linear in the latent, so that attention over many latents by one query needs no keys: the
query is taken to the latents instead (`absorbed`), which is how tokens are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from kdagen.models.layers import Linear, Packed, RMSNorm, wide
from kdagen.models.layout import Layout

LATENT_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps says: so it is in the release
KEY_ELEMENTS = 1 << 28  # of keys and values at a time: heads go one after another where latents are many
MASK_ELEMENTS = 1 << 26  # of a mask at a time: queries behind a long past go in blocks


@dataclass
class LatentState:
    """Latents of the tokens so far, [N, room, kv_lora_rank + qk_rope_head_dim]; the room grows."""

    latents: torch.Tensor

    def append(self, new, layout: Layout) -> None:
        """New latents, behind those of each sequence."""
        self.reserve(max(p + t for p, t in zip(layout.past, layout.lengths)) if layout.past else 0)
        if layout.alike:
            past = layout.past[0] if layout.past else 0
            self.latents[:, past : past + layout.tokens] = new
            return
        for n, (past, count) in enumerate(zip(layout.past, layout.lengths)):
            self.latents[n, past : past + count] = layout.of(new, n)[0]

    def reserve(self, tokens: int) -> None:
        """Makes room; half as much again as there was, at least."""
        room = self.latents.shape[1]
        if tokens > room:
            more = max(tokens, room + room // 2) - room
            self.latents = F.pad(self.latents, (0, 0, 0, -(-more // 64) * 64))

    def tensors(self) -> dict:
        """What it holds, by name."""
        return {"latents": self.latents}

    def select(self, sequences) -> LatentState:
        """The states of some of the sequences."""
        return LatentState(self.latents[sequences])


class LatentAttention(nn.Module):
    """MLA: keys [a part of their own; a part shared by all heads], both unrotated."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.heads, self.rank, self.shared = c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
        self.own, self.value = c.qk_nope_head_dim, c.v_head_dim
        self.scale = (self.own + self.shared) ** -0.5
        queries = self.heads * (self.own + self.shared)
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, queries)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(c.q_lora_rank, queries)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, self.rank + self.shared)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_EPS)
        self.kv_b_proj = Linear(self.rank, self.heads * (self.own + self.value))
        self.g_proj = Linear(c.hidden_size, self.heads * self.value) if c.mla_use_output_gate else None
        self.o_proj = Linear(self.heads * self.value, c.hidden_size)
        first = "q_proj" if c.q_lora_rank is None else "q_a_proj"
        gate = [] if self.g_proj is None else ["g_proj"]
        self.packed = Packed(self, Linear, [first, "kv_a_proj_with_mqa", *gate])

    def new_state(self, sequences: int, dtype, device) -> LatentState:
        """No token yet."""
        return LatentState(torch.zeros(sequences, 0, self.rank + self.shared, dtype=dtype, device=device))

    def forward(self, x, layout: Layout, state: LatentState | None = None):
        q, latent, *gate = self.packed.split(x)
        if not hasattr(self, "q_proj"):
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.unflatten(-1, (self.heads, -1))
        latent, shared = latent.split((self.rank, self.shared), -1)
        latents = torch.cat([self.kv_a_layernorm(latent), shared], -1)
        if state is not None:
            state.append(latents, layout)
        o = self.attention(q, latents, layout, state).flatten(-2)
        if gate:
            o = o * gate[0].sigmoid()
        return self.o_proj(o)

    def attention(self, q, latents, layout: Layout, state: LatentState | None):
        """[B, T, heads, value channels], by what is cheapest for a layout."""
        if layout.ranks is not None:
            return self.over_ranks(q, *layout.ranks.behind(latents), layout)
        if state is not None and layout.steps:
            return self.absorbed(q, state.latents, layout)
        if layout.alike:
            past = layout.past[0] if layout.past else 0
            return self.expanded(q, latents if not past else state.latents[:, : past + layout.tokens], past)
        past = layout.past or (0,) * layout.sequences
        parts = []
        for n, count in enumerate(layout.lengths):
            seen = state.latents[n : n + 1, : past[n] + count] if state else layout.of(latents, n)
            parts.append(self.expanded(layout.of(q, n), seen, past[n]))
        return layout.joined(parts)

    def over_ranks(self, q, before, latents, layout: Layout):
        """The same, the first sequence (of rows, all) behind its latents of other ranks."""
        if layout.ends is None:
            return self.expanded(q, torch.cat([before, latents], 1), before.shape[1])
        seen = [layout.of(latents, n) for n in range(layout.sequences)]
        seen[0] = torch.cat([before, seen[0]], 1)
        pasts = [before.shape[1]] + [0] * (len(seen) - 1)
        return layout.joined([self.expanded(layout.of(q, n), *x) for n, x in enumerate(zip(seen, pasts))])

    def expanded(self, q, latents, past: int):
        """By keys and values of all tokens, each query behind `past` of them; as many heads at a time as have room."""
        if not q.shape[1]:  # of the latents still: other ranks may ask for their gradients
            return latents[:, :0, None, :1].expand(-1, -1, self.heads, self.value)
        weights = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))
        count = max(1, KEY_ELEMENTS // max(1, latents[..., 0].numel() * (self.own + self.shared + self.value)))
        groups = [slice(h, h + count) for h in range(0, self.heads, count)]
        parts = [self.heads_expanded(q[:, :, group], latents, weights[group], past) for group in groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def heads_expanded(self, q, latents, weights, past: int):
        """The same for the heads of `weights`, [heads, key and value channels, rank]."""
        kv = F.linear(latents[..., : self.rank], weights.flatten(0, 1)).unflatten(-1, weights.shape[:2])
        k, v = kv.split((self.own, self.value), -1)
        shared = latents[..., self.rank :].unsqueeze(2).expand(-1, -1, len(weights), -1)
        v = F.pad(v, (0, q.shape[-1] - self.value)) if q.shape[-1] > self.value else v  # fused kernels want one size
        q, k, v = (x.transpose(1, 2) for x in (q, torch.cat([k, shared], -1), v))
        if not past:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            return o.transpose(1, 2)[..., : self.value]
        keys, rows = k.shape[2], max(1, MASK_ELEMENTS // k.shape[2])
        position = torch.arange(keys, device=q.device)
        parts = []
        for i in range(0, q.shape[2], rows):
            mask = position <= position[past + i : past + min(i + rows, q.shape[2])].unsqueeze(1)
            parts.append(F.scaled_dot_product_attention(q[:, :, i : i + rows], k, v, mask, scale=self.scale))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).transpose(1, 2)[..., : self.value]

    def absorbed(self, q, latents, layout: Layout):
        """One query of each sequence, [N, 1, heads, ..], on the latents themselves."""
        to_key, to_value = self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split((self.own, self.value), 1)
        own, shared = q[:, 0].split((self.own, self.shared), -1)
        inside = torch.einsum("nhc,hcr->nhr", own, to_key)
        lengths = [past + 1 for past in layout.past]
        latents = latents[:, : max(lengths)]
        scores = wide(torch.cat([inside, shared], -1) @ latents.mT) * self.scale
        if min(lengths) < max(lengths):
            ends = torch.tensor(lengths, device=q.device).view(-1, 1, 1)
            scores = scores.masked_fill(torch.arange(max(lengths), device=q.device) >= ends, float("-inf"))
        weights = scores.softmax(-1).to(q.dtype)
        return torch.einsum("nhr,hcr->nhc", weights @ latents[..., : self.rank], to_value).unsqueeze(1)
