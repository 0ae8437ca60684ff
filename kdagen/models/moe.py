"""The sparse MLP: a router with sigmoid scores, experts, a shared expert."""

from __future__ import annotations

import torch
from torch import nn

from kdagen.models.layers import MLP, Activation, Linear, Packed, kept_wide, wide


class Router(nn.Module):
    """Scores of all experts in float32; the best are chosen by score + bias and weighted by score alone."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(config.num_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        return kept_wide(self, fn, recurse, ("e_score_correction_bias",))

    def forward(self, x):
        """Weights and numbers of the experts of each row of x, [rows, top k] both."""
        c = self.config
        scores = (wide(x) @ wide(self.weight).T).sigmoid()
        chosen = self.allowed(scores + self.e_score_correction_bias).topk(c.num_experts_per_token, -1, sorted=False)[1]
        weights = scores.gather(1, chosen)
        if c.moe_renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.routed_scaling_factor, chosen

    def allowed(self, scores):
        """Scores of the experts in the best groups, a group being as good as its best two experts; -inf for others."""
        c = self.config
        if not c.use_grouped_topk or c.num_expert_group == c.topk_group:
            return scores
        groups = scores.unflatten(-1, (c.num_expert_group, -1))
        best = groups.topk(min(2, groups.shape[-1]), -1)[0].sum(-1).topk(c.topk_group, -1, sorted=False)[1]
        kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
        return groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


class Expert(nn.Module):
    """w2(activation(w1(x), w3(x)))."""

    def __init__(self, config, activation: Activation):
        super().__init__()
        self.w1 = Linear(config.hidden_size, config.moe_intermediate_size)
        self.w2 = Linear(config.moe_intermediate_size, config.hidden_size)
        self.w3 = Linear(config.hidden_size, config.moe_intermediate_size)
        self.activation, self.packed = activation, Packed(self, Linear, ["w1", "w3"])

    def forward(self, x):
        return self.w2(self.activation(*self.packed.split(x)))


class SparseMLP(nn.Module):
    """The experts that the router chose, weighted, and the shared expert."""

    def __init__(self, config):
        super().__init__()
        activation = Activation(config)
        self.gate = Router(config)
        self.experts = nn.ModuleList(Expert(config, activation) for _ in range(config.num_experts))
        shared = config.num_shared_experts
        self.shared_experts = MLP(config, shared * config.moe_intermediate_size) if shared else None

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        found = self.routed(rows)
        if self.shared_experts is not None:
            found = found + self.shared_experts(rows)
        return found.view_as(x)

    def routed(self, rows):
        """Each expert once, on all of its rows; without gradients, those that have any."""
        weights, chosen = self.gate(rows)
        if len(rows) == 1:
            parts = [w * self.experts[e](rows) for e, w in zip(chosen[0].tolist(), weights[0])]
            return torch.stack(parts).sum(0).to(rows.dtype)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        source, weights = order // chosen.shape[1], weights.flatten()[order].unsqueeze(-1)
        found, start = torch.zeros_like(rows), 0
        for expert, count in zip(self.experts, counts):
            if count or torch.is_grad_enabled():  # in training all have gradients: processes must hold the same ones
                mine = source[start : start + count]
                out = expert(rows[mine]) * weights[start : start + count]
                found.index_add_(0, mine, out.to(rows.dtype))
                start += count
        return found
