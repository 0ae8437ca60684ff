"""What each kind of module is in steps: the forward of model, mixer, mla, layers and moe, once more.

In the order of those; step_writer has the operations. No numbers are computed here.
"""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import nn

from kdagen.models import layers, mixer, mla, moe
from kdagen.models.layers import Linear, ShortConvolution
from kdagen.models.step import Program, address
from kdagen.models.step_writer import Unlike, Writer, at
from kdagen.runtime.cpu_native import CHECK_ALL, POOL
from kdagen.runtime.decode import Decoding


def write(library, decoder, rows: int, size: int) -> Program:
    """The program of a decoder, for so many sequences."""
    with torch.inference_mode(False), torch.no_grad():
        program = Program(library, rows, len(decoder.layers))
        Layers(program).decoder(decoder, size)
        return program


class Layers(Writer):
    """Writes layers; `h` is the residual sum so far, `sources` what attention residuals attend to beside it."""

    def __init__(self, program: Program):
        super().__init__(program)
        self.sources: list = []

    # -- model

    def decoder(self, m, size: int) -> None:
        """All layers, those that are unlike by their own forward, and the last norm."""
        self.h, out = self.room("h", size), self.room("out", size)
        self.seen.entry(m._modules, "layers")
        for i in range(len(m.layers)):
            self.part(f"layer {i}", partial(self.layer, m, i), partial(self.own_layer, m.layers[i], i))
        self.part("the last norm", partial(self.last, m, out), partial(self.own_last, m, out))
        self.end_part()
        self.program.close(self.room("h", size), out)

    def part(self, name: str, native, by_torch) -> None:
        """Steps; or, if these cannot be written, what runs in their place."""
        p = self.program
        before = len(p.words), self.h, self.sources, dict(p.recurrences), list(p.expected)
        try:
            native()
        except Unlike as unlike:
            p.why[name] = str(unlike)
            del p.words[before[0] :]
            self.h, self.sources, p.recurrences, p.expected = before[1:]
            self.end_part()
            p.parts.append(by_torch())

    def end_part(self) -> None:
        """What was written is a part."""
        if self.steps > self.begun:
            self.program.parts.append(partial(self.program.native, self.begun, self.steps))
        self.begun = self.steps

    def own_layer(self, m, i: int):
        """A part that calls a layer."""
        before = [*self.sources, self.h]
        if getattr(m, "block", None) and m.begins_block:
            self.begin_block()
        after = self.h

        def run(layout, cache, dtype):
            *sources, h = (x.to(dtype, copy=True).unsqueeze(1) for x in before)
            after.copy_(m(h, tuple(sources), layout, cache.layers[i])[0].squeeze(1))

        return run

    def own_last(self, m, out):
        """A part that calls what follows the layers."""
        before = [*self.sources, self.h]

        def run(layout, cache, dtype):
            values = [x.to(dtype, copy=True).unsqueeze(1) for x in before]
            h = layers.attended(values, m.output_attn_res_proj, m.output_attn_res_norm) if m.residuals else values[0]
            out.copy_(m.norm(h).squeeze(1))

        return run

    def last(self, m, out) -> None:
        """What follows the layers."""
        self.norm(m, "norm", self.mixed(m, "output_attn_res") if m.residuals else self.h, out)

    def begin_block(self) -> None:
        """What was summed is a source, and the sum begins anew."""
        self.sources = [*self.sources, self.h]
        self.h = self.room(f"h {len(self.sources)}", self.h.shape[1])

    def mixed(self, m, name: str):
        """The attended sum of sources and the sum so far."""
        values, size = [*self.sources, self.h], self.h.shape[1]
        sources, y = self.integers([x.data_ptr() for x in values]), self.room("mixed", size)
        norm, proj = self.scale(m, f"{name}_norm", size), self.weight(m, f"{name}_proj", 1, size)
        self.step("mix", sources, len(values), size, *norm, proj, y, self.room("scores", len(values) + size))
        return y

    def layer(self, decoder, i: int) -> None:
        from kdagen.models.model import Layer

        m = self.child(decoder.layers, str(i), Layer, "it")
        normed, begins = self.room("normed", self.h.shape[1]), m.block and m.begins_block
        x = self.mixed(m, "self_attention_res") if m.block else self.h
        if begins:
            self.begin_block()
        self.norm(m, "input_layernorm", x, normed)
        kind = mla.LatentAttention if isinstance(m.self_attn, mla.LatentAttention) else mixer.Mixer
        attention = self.latent if kind is mla.LatentAttention else self.mixer
        attention(self.child(m, "self_attn", kind), normed, not begins, i)
        self.norm(m, "post_attention_layernorm", self.mixed(m, "mlp_res") if m.block else self.h, normed)
        if "mlp" in m._modules:
            self.mlp(self.child(m, "mlp", layers.MLP), normed)
        else:
            self.sparse(self.child(m, "block_sparse_moe", moe.SparseMLP), normed)

    # -- attention of both kinds: h = or += what comes out

    def mixer(self, m: mixer.Mixer, x, add: bool, i: int) -> None:
        channels, sizes = m.heads * m.head_dim, {}
        for j, name in zip([*m.projected, None], m.packed.names):
            outputs = channels if j is None or j.axis else m.heads
            sizes[name] = m.head_dim if name.endswith("_a_proj") else outputs
        *parts, gate = self.several(m, sizes, x)
        for n in range(len(m.vectors)):
            parts[n] = self.convolved(m, n, parts[n], i)
        o = self.room("o", channels)
        self.recurrence(m, self.arguments(m, parts), o.view(self.rows, 1, m.heads, m.head_dim), i)
        self.norm(m, "o_norm", o, o, m.heads, layers.GatedRMSNorm)
        self.gate(gate if m.full_rank_gate else self.second(m, "g", gate, channels), o)
        self.linear(m, "o_proj", o, self.h, add)

    def convolved(self, m: mixer.Mixer, n: int, x, i: int):
        """The n-th short convolution."""
        size, width, y = x.shape[1], m.past + 1, self.room(f"convolved {n}", x.shape[1])
        weight = self.tensor(self.child(m, f"{m.vectors[n]}_conv1d", ShortConvolution), "weight", size, 1, width)
        self.step("convolve", *at(x), weight, size, width, self.cell(i, 1), n * size, len(m.vectors) * size, *at(y))
        return y

    def second(self, m, module: str, x, size: int):
        """The second of two linear maps."""
        self.linear(m, f"{module}_b_proj", x, y := self.room(f"{module}_b", size))
        return y

    def arguments(self, m: mixer.Mixer, parts: list) -> dict:
        """Of the op, of parts that are convolved already."""
        given = {i.name: self.of_head(m, i.name, i.axis) for i in m.inputs if i.kind == "parameter"}
        for i, x in zip(m.projected, parts):
            if i.kind == "channel" and f"{i.module}_b_proj" in m._modules:
                x = self.second(m, i.module, x, m.heads * m.head_dim)
            given[i.name] = (x.unflatten(1, (m.heads, m.head_dim)) if i.axis else x).unsqueeze(1)
            if i.own:
                given[i.own[0]] = self.of_head(m, i.own[0], "")
                given[i.own[1]] = self.of_head(m, i.own[1], i.axis)
        return given

    def of_head(self, m: mixer.Mixer, name: str, axis: str):
        """A parameter of the head."""
        size = m.heads * (m.head_dim if axis else 1)
        self.tensor(m, name, *((1, 1, size, 1) if name == "A_log" else (size,)), dtypes=(torch.float32,))
        return m.of_head(name, axis, torch.float32).detach()

    def recurrence(self, m: mixer.Mixer, given: dict, out, i: int) -> None:
        """The op's own loop, on the pool that the cell has."""
        op, p, channels = mixer.op_of(m.recurrence, m.head_dim), self.program, len(m.vectors) * m.heads * m.head_dim
        shape = self.rows, m.heads, m.head_dim, m.head_dim
        p.expected[i] = mixer.RecurrentState, shape, (self.rows, m.past, channels)
        placed = Decoding(op).prepared((*(given[n] for n in op.signature.tensors), torch.zeros(shape)), out)
        if placed is None:
            raise Unlike(op.step.native.problem or "the recurrence decodes by torch")
        p.kept.append(placed)
        p.recurrences[self.steps] = op, given, out, i
        loop = ctypes.cast(op.step.native.function, ctypes.c_void_p).value
        self.step("recurrence", loop, placed.address, placed.address + 8 * POOL, self.cell(i, 0), CHECK_ALL)

    def latent(self, m: mla.LatentAttention, x, add: bool, i: int) -> None:
        width, per, queries = m.rank + m.shared, m.own + m.value, m.heads * (m.own + m.shared)
        first = self.child(m, "q_a_proj", Linear).out_features if "q_a_proj" in m._modules else queries
        sizes = dict(zip(m.packed.names, (first, width, m.heads * m.value)))
        q, latent, *gate = self.several(m, sizes, x)
        if "q_proj" not in m._modules:
            self.norm(m, "q_a_layernorm", q, q)
            q = self.second(m, "q", q, queries)
        self.norm(m, "kv_a_layernorm", latent[:, : m.rank], latent[:, : m.rank])
        weight = self.weight(m, "kv_b_proj", m.heads * per, m.rank)
        query, mix = self.room("query", m.heads * width), self.room("mix", m.heads * m.rank)
        apart = m.own + m.shared, weight, per * m.rank, m.heads, m.own, m.rank
        self.step("transposed", *at(q), *apart, *at(query), width, m.shared)
        self.program.expected[i] = mla.LatentState, (self.rows, None, width)
        past = ctypes.addressof(self.program.past)
        self.step("attend", query, *at(latent), self.cell(i, 0), past, m.heads, m.rank, width, float(m.scale), mix)
        o = self.room("o", m.heads * m.value)
        for h, part in enumerate(o.split(m.value, 1)):
            self.product(mix[:, h * m.rank : (h + 1) * m.rank], weight[h * per + m.own : (h + 1) * per], part)
        if gate:
            self.gate(gate[0], o)
        self.linear(m, "o_proj", o, self.h, add)

    # -- MLPs: h += what comes out

    def mlp(self, m: layers.MLP, x) -> None:
        size = self.child(m, "down_proj", Linear).in_features
        g, u = self.several(m, {"gate_proj": size, "up_proj": size}, x)
        self.step("activate", *at(g), *at(u), size, *self.betas(m))
        self.linear(m, "down_proj", g, self.h, True)

    def betas(self, m) -> tuple[float, float]:
        """Of an activation; 0 for none."""
        a = self.seen.entry(vars(m), "activation")
        if type(a) is not layers.Activation:
            raise Unlike(f"activation is {type(a).__name__}")
        return (0.0, 0.0) if a.name == "silu" else (float(a.beta), float(a.linear_beta or 0))

    def sparse(self, m: moe.SparseMLP, x) -> None:
        router = self.child(m, "gate", moe.Router)
        c, size = router.config, x.shape[1]
        k, inner = c.num_experts_per_token, c.moe_intermediate_size
        weights = self.room("weights", k)
        chosen = self.choose(router, x, weights)
        experts = self.child(m, "experts", nn.ModuleList)
        table = self.integers(address(x) for e in range(c.num_experts) for x in self.expert(experts, e, size, inner))
        room, owners = self.room("experts", 2 * k * (size + inner)), self.integers([0] * self.rows * k)
        sizes = k, size, inner, *self.betas(experts[0])
        self.step("experts", *at(x), table, c.num_experts, chosen, weights, *sizes, *at(self.h), room, owners)
        if self.seen.entry(m._modules, "shared_experts") is not None:
            self.mlp(self.child(m, "shared_experts", layers.MLP), x)

    def choose(self, m: moe.Router, x, weights) -> int:
        """Each row's experts and their weights; the address of the first."""
        c, k = m.config, weights.shape[1]
        count, groups, kept = c.num_experts, c.num_expert_group, c.topk_group
        if not c.use_grouped_topk:
            groups = kept = 1
        if k > kept * (count // groups):
            raise Unlike("fewer experts are allowed than chosen")
        scores, spare = self.room("scores", count), self.room("spare", 2 * count + groups)
        self.product(x, self.tensor(m, "weight", count, x.shape[1]), scores)
        bias = self.tensor(m, "e_score_correction_bias", count, dtypes=(torch.float32,))
        chosen = self.integers([0] * self.rows * k)
        how = k, groups, kept, bool(c.moe_renormalize), float(c.routed_scaling_factor)
        self.step("choose", scores, bias, count, *how, spare, chosen, weights)
        return chosen

    def expert(self, experts, number: int, size: int, inner: int) -> list:
        """The weights of an expert."""
        m = self.child(experts, str(number), moe.Expert, f"expert {number}")
        shapes = {"w1": (inner, size), "w3": (inner, size), "w2": (size, inner)}
        return [self.weight(m, name, *shape) for name, shape in shapes.items()]
