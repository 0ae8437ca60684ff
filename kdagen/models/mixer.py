"""The layer around a recurrence: projections, short convolutions, gates, the op, the gated norm.

With the recurrence "kda" this is the KDA layer of the release, parameter by parameter; with any other, the layer that
its arguments ask for (kdagen.models.roles).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from kdagen.models.layers import GatedRMSNorm, Linear, ShortConvolution, kept_wide, wide
from kdagen.models.layout import Layout
from kdagen.models.roles import Input, inputs, recurrence_of


@dataclass
class RecurrentState:
    """The state of each sequence, [N, heads, K, V] in float32, and the last inputs of each convolution."""

    state: torch.Tensor
    convolutions: dict

    def tensors(self) -> dict:
        """What it holds, by name."""
        return {"state": self.state, **{f"conv.{name}": x for name, x in self.convolutions.items()}}

    def select(self, sequences) -> RecurrentState:
        """The states of some of the sequences."""
        return RecurrentState(self.state[sequences], {name: x[sequences] for name, x in self.convolutions.items()})


@cache
def op_of(recurrence, head_dim: int, dtype: str, wide_gates: bool):
    """The op of a recurrence; layers alike share it."""
    import kdagen

    return kdagen.compile(recurrence, head_dim=head_dim, dtype=dtype, gate_dtype="float32" if wide_gates else None)


class Mixer(nn.Module):
    """A linear-attention layer by any recurrence."""

    def __init__(self, config):
        super().__init__()
        c = config.linear_attn_config
        self.heads, self.head_dim = c.num_heads, c.head_dim
        rate = 2 if c.allow_neg_eigval else 1
        self.recurrence = recurrence_of(c.mixer, c.head_dim, c.gate_kind, rate, c.gate_lower_bound)
        self.inputs, self.rate = inputs(self.recurrence), rate
        self.shapes = any(i.shape in ("decay", "rate", "range") for i in self.inputs)
        self.wide: list[str] = []  # parameters that stay in float32
        for i in self.inputs:
            self._build(i, config)
        inner = self.heads * self.head_dim
        self.full_rank_gate = c.use_full_rank_gate
        if self.full_rank_gate:
            self.g_proj = Linear(config.hidden_size, inner)
        else:
            self.g_a_proj, self.g_b_proj = Linear(config.hidden_size, self.head_dim), Linear(self.head_dim, inner)
        self.o_norm = GatedRMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = Linear(inner, config.hidden_size)

    def _build(self, i: Input, config) -> None:
        """The parameters behind one argument."""
        c = config.linear_attn_config
        size = self.heads * (self.head_dim if i.axis else 1)
        if i.kind == "parameter":
            self._parameter(i.name, size)
        elif i.kind == "channel" and not c.use_full_rank_forget_gate:
            setattr(self, f"{i.module}_a_proj", Linear(config.hidden_size, self.head_dim))
            setattr(self, f"{i.module}_b_proj", Linear(self.head_dim, size))
        else:
            setattr(self, f"{i.module}_proj", Linear(config.hidden_size, size))
        if i.kind == "vector":
            setattr(self, f"{i.module}_conv1d", ShortConvolution(size, c.short_conv_kernel_size))
        if i.shape == "decay" and i.kind != "parameter":
            self._parameter(self._own("A_log", i), self.heads)
            self._parameter(self._own("dt_bias", i), size)

    def _own(self, name: str, i: Input) -> str:
        """The name of a parameter that is the layer's, not the recurrence's; with the argument's if there are more."""
        same = [other for other in self.inputs if other.shape == "decay" and other.kind != "parameter"]
        taken = any(other.name == name for other in self.inputs)
        return f"{i.module}_{name}" if taken or len(same) > 1 else name

    def _parameter(self, name: str, size: int) -> None:
        shape = (1, 1, size, 1) if name == "A_log" else (size,)  # as the release has it
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self.wide.append(name)

    def _apply(self, fn, recurse=True):
        return kept_wide(self, fn, recurse, tuple(self.wide))

    def new_state(self, sequences: int, dtype, device) -> RecurrentState:
        """Zeros."""
        full = torch.promote_types(dtype, torch.float32)
        state = torch.zeros(sequences, self.heads, self.head_dim, self.head_dim, dtype=full, device=device)
        vectors = [i.module for i in self.inputs if i.kind == "vector"]
        convolutions = {m: getattr(self, f"{m}_conv1d").new_state(sequences, dtype, device) for m in vectors}
        return RecurrentState(state, convolutions)

    def forward(self, x, layout: Layout, state: RecurrentState | None = None):
        o = self.scan({i.name: self.argument(i, x, layout, state) for i in self.inputs}, layout, state)
        gate = self.g_proj(x) if self.full_rank_gate else self.g_b_proj(self.g_a_proj(x))
        return self.o_proj(self.o_norm(o, gate.view(o.shape)).flatten(-2))

    def scan(self, given: dict, layout: Layout, state: RecurrentState | None):
        """The op on its arguments; a state is replaced."""
        dtype = next(given[i.name].dtype for i in self.inputs if i.kind == "vector")
        op = op_of(self.recurrence, self.head_dim, "float16" if dtype == torch.float16 else "bfloat16", self.shapes)
        if self.shapes:  # gates made here are in float32, and then kernels take all of them so
            gating, tokens = op.signature.gating, [i.name for i in self.inputs if i.kind != "parameter"]
            given |= {name: wide(given[name]) if name in gating else given[name].to(dtype) for name in tokens}
        if state is None:
            return op(**given, cu_seqlens=layout.cu_seqlens)[0]
        if layout.steps:
            return op.decode(**given, state_pool=state.state)
        o, after = op(**given, cu_seqlens=layout.cu_seqlens, initial_state=state.state, output_final_state=True)
        state.state.copy_(after)
        return o

    def argument(self, i: Input, x, layout: Layout, state: RecurrentState | None):
        """The tensor of one argument: [B, T, heads, channels], [B, T, heads], or a parameter's [heads, ..]."""
        if i.kind == "parameter":
            found = getattr(self, i.name).to(torch.promote_types(x.dtype, torch.float32))
            return self.shaped(i, found.view(self.heads, *([self.head_dim] if i.axis else [])))
        if hasattr(self, f"{i.module}_a_proj"):
            found = getattr(self, f"{i.module}_b_proj")(getattr(self, f"{i.module}_a_proj")(x))
        else:
            found = getattr(self, f"{i.module}_proj")(x)
        if i.kind == "vector":
            past = None if state is None else state.convolutions[i.module]
            found = getattr(self, f"{i.module}_conv1d")(found, layout, past)
        return self.shaped(i, found.unflatten(-1, (self.heads, self.head_dim)) if i.axis else found)

    def shaped(self, i: Input, x):
        """What the recurrence does not do itself: norms, decays below 0, rates and ranges, in float32."""
        if i.shape == "raw":
            return x
        if i.shape == "unit":
            return (wide(x) * torch.rsqrt(wide(x).square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
        x = wide(x)
        if i.shape == "rate":
            return self.rate * x.sigmoid()
        if i.shape == "range":
            return i.lower + (i.upper - i.lower) * x.sigmoid()
        g = -F.softplus(x) if i.kind == "parameter" else self.log_decay(i, x)
        return g if i.logarithm else g.exp()

    def log_decay(self, i: Input, x):
        """-exp(A_log) softplus(x + dt_bias)."""
        A_log, dt_bias = (wide(getattr(self, self._own(name, i))) for name in ("A_log", "dt_bias"))
        shape = (self.heads, self.head_dim) if i.axis else (self.heads,)
        rate = A_log.exp().view(self.heads, *([1] if i.axis else []))
        return -rate * F.softplus(x + dt_bias.view(shape))
