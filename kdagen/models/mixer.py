"""The layer around a recurrence: projections, short convolutions, gates, the op, the gated norm.

With the recurrence "kda" this is the KDA layer of the release, parameter by parameter; with any other, the layer that
its arguments ask for (kdagen.models.roles).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import nn

from kdagen.errors import RecurrenceError
from kdagen.models.fused import fused
from kdagen.models.layers import GatedRMSNorm, Linear, Packed, ShortConvolution, kept_wide, short_convolution
from kdagen.models.layout import Layout
from kdagen.models.roles import Input, inputs, recurrence_of


@dataclass
class RecurrentState:
    """The state of each sequence, [N, heads, K, V] in float32, and the last inputs of all convolutions."""

    state: torch.Tensor
    convolved: torch.Tensor  # [N, width - 1, channels of all]

    def tensors(self) -> dict:
        """What it holds, by name."""
        return {"state": self.state, "conv": self.convolved}

    def select(self, sequences) -> RecurrentState:
        """The states of some of the sequences."""
        return RecurrentState(self.state[sequences], self.convolved[sequences])


@cache
def op_of(recurrence, head_dim: int, half: bool = False):
    """The op of a recurrence, on GPUs in bfloat16 or float16; layers alike share it."""
    import kdagen

    return kdagen.compile(recurrence, head_dim=head_dim, dtype="float16" if half else "bfloat16")


class Mixer(nn.Module):
    """A linear-attention layer by any recurrence."""

    def __init__(self, config):
        super().__init__()
        c = config.linear_attn_config
        self.heads, self.head_dim = c.num_heads, c.head_dim
        rate = 2 if c.allow_neg_eigval else 1
        recurrence = recurrence_of(c.mixer, c.head_dim, c.gate_kind, rate, c.gate_lower_bound)
        self.inputs, self.recurrence = inputs(recurrence), fused(recurrence, rate)
        self.wide: list[str] = []  # parameters that stay in float32
        self.past, self.vectors = c.short_conv_kernel_size - 1, [i.module for i in self.inputs if i.kind == "vector"]
        self.packed = self.convolutions = None  # below, once there is what they hold
        for i in self.inputs:
            self._build(i, config)
        self.op = op_of(self.recurrence, self.head_dim)
        inner = self.heads * self.head_dim
        self.full_rank_gate = c.use_full_rank_gate
        if self.full_rank_gate:
            self.g_proj = Linear(config.hidden_size, inner)
        else:
            self.g_a_proj, self.g_b_proj = Linear(config.hidden_size, self.head_dim), Linear(self.head_dim, inner)
        self.o_norm = GatedRMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = Linear(inner, config.hidden_size)
        self.packed = Packed(self, Linear, [self.first(i.module) for i in self.projected] + [self.first("g")])
        self.convolutions = Packed(self, ShortConvolution, [f"{m}_conv1d" for m in self.vectors])

    @cached_property
    def half_op(self):
        """The op of a GPU in float16."""
        return op_of(self.recurrence, self.head_dim, half=True)

    @cached_property
    def projected(self) -> list[Input]:
        """The inputs that are a token's, those that are convolved first."""
        return sorted((i for i in self.inputs if i.kind != "parameter"), key=lambda i: i.kind != "vector")

    def first(self, module: str) -> str:
        """The first linear map of an input, or of the output's gate ("g")."""
        return f"{module}_a_proj" if f"{module}_a_proj" in self._modules else f"{module}_proj"

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
        if i.own:
            self._parameter(i.own[0], self.heads)
            self._parameter(i.own[1], size)

    def _parameter(self, name: str, size: int) -> None:
        if hasattr(self, name):
            raise RecurrenceError(
                f"recurrence '{self.recurrence.name}': its parameter '{name}' is called as something that every layer "
                f"has: rename this argument"
            )
        shape = (1, 1, size, 1) if name == "A_log" else (size,)  # as the release has it
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=torch.float32)))
        self.wide.append(name)

    def _apply(self, fn, recurse=True):
        return kept_wide(self, fn, recurse, tuple(self.wide))

    def new_state(self, sequences: int, dtype, device) -> RecurrentState:
        """Zeros: before a sequence there is nothing."""
        full = torch.promote_types(dtype, torch.float32)
        state = torch.zeros(sequences, self.heads, self.head_dim, self.head_dim, dtype=full, device=device)
        channels = len(self.vectors) * self.heads * self.head_dim
        return RecurrentState(state, torch.zeros(sequences, self.past, channels, dtype=dtype, device=device))

    def forward(self, x, layout: Layout, state: RecurrentState | None = None):
        *parts, gate = self.packed.split(x)
        o = self.scan(self.arguments(parts, layout, state), layout, state)
        if not self.full_rank_gate:
            gate = self.g_b_proj(gate)
        return self.o_proj(self.o_norm(o, gate.view(o.shape)).flatten(-2))

    def scan(self, given: dict, layout: Layout, state: RecurrentState | None):
        """The op on its arguments; a state is replaced."""
        op = self.half_op if any(x.dtype == torch.float16 for x in given.values()) else self.op
        if layout.ranks is not None:
            op = layout.ranks.over(op)
        if state is None:
            return op(**given, cu_seqlens=layout.cu_seqlens)[0]
        if layout.steps:
            return op.decode(**given, state_pool=state.state)
        o, after = op(**given, cu_seqlens=layout.cu_seqlens, initial_state=state.state, output_final_state=True)
        state.state.copy_(after)
        return o

    def arguments(self, parts: list, layout: Layout, state: RecurrentState | None) -> dict:
        """The op's arguments, of what their first maps gave: [B, T, heads, channels] and [B, T, heads] a token,
        parameters of the head [heads, ..]."""
        count, dtype = len(self.vectors), parts[0].dtype
        past = None if state is None else state.convolved
        found = [*self.convolved(parts[:count], layout, past), *parts[count:]]
        given = {i.name: self.of_head(i.name, i.axis, dtype) for i in self.inputs if i.kind == "parameter"}
        for i, x in zip(self.projected, found):
            if (second := self._modules.get(f"{i.module}_b_proj")) is not None and i.kind == "channel":
                x = second(x)
            given[i.name] = x.unflatten(-1, (self.heads, self.head_dim)) if i.axis else x
            if i.own:
                given[i.own[0]] = self.of_head(i.own[0], "", dtype)
                given[i.own[1]] = self.of_head(i.own[1], i.axis, dtype)
        return given

    def convolved(self, parts: list, layout: Layout, past) -> tuple | list:
        """Of each vector its short convolution; the past is replaced."""
        if (weight := self.convolutions.weight()) is not None:
            together = short_convolution(torch.cat(parts, -1), weight, layout, past)
            return together.chunk(len(parts), -1)
        pasts = [None] * len(parts) if past is None else past.chunk(len(parts), -1)
        return [getattr(self, f"{m}_conv1d")(x, layout, p) for m, x, p in zip(self.vectors, parts, pasts)]

    def of_head(self, name: str, axis: str, dtype):
        """A parameter of the head, in float32 at least."""
        found = getattr(self, name)
        found = found if dtype != torch.float64 else found.double()
        return found.view(self.heads, self.head_dim) if axis else found.view(self.heads)
