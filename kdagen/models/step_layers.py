"""What each kind of module is in steps: the forward of mixer, mla, moe, layers and model, written down once.

A writer holds buffers of [sequences, channels] and appends a step for each operation on them; step.c has the
operations, in the order of whose words they are given here. What is not as expected raises Unlike.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from functools import partial

import torch
from torch import nn

from kdagen.models import layers, mixer, mla, moe
from kdagen.models.layers import Linear, RMSNorm, ShortConvolution
from kdagen.models.step import Program
from kdagen.runtime.cpu_native import CHECK_ALL, POOL
from kdagen.runtime.decode import Decoding

WORDS = 18  # of a step


class Unlike(Exception):
    """Why a layer must run by its own forward."""


def write(library, decoder, cache) -> Program:
    """The program of a decoder, for as many sequences as a cache holds."""
    writer = Writer(Program(library, cache.sequences, len(decoder.layers)), cache)
    writer.decoder(decoder)
    writer.program.seen.close()
    return writer.program


class Writer:
    """Writes a program."""

    def __init__(self, program: Program, cache):
        self.program, self.cache, self.rows = program, cache, program.rows
        program.kept.append(rooms := {})
        self.rooms: dict = rooms  # buffers
        self.begun = 0  # the step from which on none is in a part yet
        self.sources: list = []  # of attention residuals, before the sum so far

    # -- memory, and what modules are

    def room(self, name: str, size: int):
        """A buffer [sequences, size]; the same for the same name and size."""
        return self.rooms.setdefault((name, size), torch.zeros(self.rows, size))

    def address(self, numbers) -> int:
        """Of an array that is kept."""
        self.program.kept.append(kept := array("q", numbers))
        return kept.buffer_info()[0]

    def step(self, name: str, *words) -> None:
        """Appends an operation."""
        found = [self.function(name), *map(_word, words)]
        self.program.words.extend(found + [0] * (WORDS - len(found)))

    def function(self, name: str) -> int:
        return ctypes.cast(getattr(self.program.library, f"step_{name}"), ctypes.c_void_p).value

    def plain(self, module, kind: type, name: str):
        """A module, if it is of just this kind, and runs just that kind's forward."""
        if type(module) is not kind:
            raise Unlike(f"{name} is {type(module).__name__}, not {kind.__name__}")
        hooks = module._forward_hooks, module._forward_pre_hooks
        self.program.seen.hooks.extend(hooks)
        if self.program.seen.entry(vars(module), "forward") or any(hooks):
            raise Unlike(f"{name} has hooks")
        return module

    def child(self, parent, name: str, kind: type):
        """A child of a module, if it is plain."""
        return self.plain(self.program.seen.entry(parent._modules, name), kind, name)

    def tensor(self, module, name: str, *shape: int):
        """A parameter or buffer, if it may be read where it is."""
        x = self.program.seen.entry(module._buffers if name in module._buffers else module._parameters, name)
        plain = type(x) in (nn.Parameter, torch.Tensor) and x.device.type == "cpu" and x.dtype == torch.float32
        if not plain or not x.is_contiguous() or (x.shape != shape and shape):
            raise Unlike(f"{name} is {getattr(x, 'dtype', x)} {list(getattr(x, 'shape', []))}, in some way of its own")
        self.program.seen.tensors.append(x)
        return x

    def weight(self, parent, name: str, *shape: int):
        """The weight of a plain linear map without bias."""
        module = self.child(parent, name, Linear)
        if self.program.seen.entry(module._parameters, "bias") is not None:
            raise Unlike(f"{name} has a bias")
        return self.tensor(module, "weight", *shape)

    # -- operations

    def product(self, x, weight, y, add: bool = False) -> None:
        """y = W x, or y += W x; one step with that before, if this goes on where it ends."""
        (out, inner), words = weight.shape, self.program.words
        new = [*_at(x), weight.data_ptr(), out, inner, *_at(y), add]
        last = words[-WORDS:].tolist()
        before = [*new[:2], new[2] - 4 * last[4] * inner, last[4], inner, new[5] - 4 * last[4], *new[6:]] if last else []
        if len(words) > WORDS * self.begun and last[1:9] == before and last[0] == self.function("product"):
            words[-WORDS + 4] += out
        else:
            self.step("product", *new)

    def linear(self, parent, name: str, x, y, add: bool = False) -> None:
        """A linear map."""
        self.product(x, self.weight(parent, name, y.shape[1], x.shape[1]), y, add)

    def norm(self, parent, name: str, x, y, parts: int = 1, kind: type = RMSNorm) -> None:
        """Of each of the parts of a row."""
        module, size = self.child(parent, name, kind), x.shape[1] // parts
        eps = self.program.seen.entry(vars(module), "eps")
        self.step("norm", *_at(x), self.tensor(module, "weight", size), float(eps), parts, size, *_at(y))

    def gate(self, x, y) -> None:
        """y times the sigmoid of x."""
        self.step("gate", *_at(x), *_at(y), y.shape[1])

    def several(self, parent, names: list[str], x) -> list:
        """Linear maps of the same input."""
        sizes = [len(self.weight(parent, name)) for name in names]
        parts = list(self.room("several", sum(sizes)).split(sizes, 1))
        for name, y in zip(names, parts):
            self.linear(parent, name, x, y)
        return parts

    # -- layers

    def decoder(self, m) -> None:
        """All layers, those that are unlike by their own forward, and the last norm."""
        p, size = self.program, m.norm.weight.shape[0]
        p.h = self.h = self.room("h", size)
        for i in range(len(m.layers)):
            self.part(f"layer {i}", partial(self.layer, m, i), partial(self.own_forward, m, i))
        p.out = self.room("out", size)
        self.part("the last norm", partial(self.last, m), partial(self.own_last, m))
        self.finish()

    def part(self, name: str, native, by_torch) -> None:
        """Steps, or if these cannot be written what runs in their place."""
        p = self.program
        before = len(p.words), self.h, list(self.sources), dict(p.recurrences), list(p.expected)
        try:
            native()
        except Unlike as unlike:
            p.why[name] = str(unlike)
            del p.words[before[0] :]
            self.h, self.sources, p.recurrences, p.expected = before[1:]
            self.finish()
            p.parts.append(by_torch())

    def finish(self) -> None:
        """Steps so far are a part."""
        steps = len(self.program.words) // WORDS
        if steps > self.begun:
            self.program.parts.append(partial(self.program.native, self.begun, steps))
        self.begun = steps

    def own_forward(self, m, i: int):
        """A part that calls a layer."""
        layer, h, sources = m.layers[i], self.h, list(self.sources)
        if layer.block and layer.begins_block:
            self.begin_block()
        after = self.h

        def run(layout, cache):
            given = [x.clone().unsqueeze(1) for x in (*sources, h)]
            after.copy_(layer(given[-1], tuple(given[:-1]), layout, cache.layers[i])[0].squeeze(1))

        return run

    def own_last(self, m):
        """A part that calls what follows the layers."""
        h, sources, out = self.h, list(self.sources), self.program.out

        def run(layout, cache):
            given = [x.clone().unsqueeze(1) for x in (*sources, h)]
            found = layers.attended(given, m.output_attn_res_proj, m.output_attn_res_norm) if m.residuals else given[-1]
            out.copy_(m.norm(found).squeeze(1))

        return run

    def last(self, m) -> None:
        h = self.mixed(m, "output_attn_res") if m.residuals else self.h
        self.norm(m, "norm", h, self.program.out)

    def begin_block(self) -> None:
        """What was summed is a source, and the sum begins anew."""
        self.sources = [*self.sources, self.h]
        self.h = self.room(f"h {len(self.sources)}", self.h.shape[1])

    def mixed(self, m, name: str):
        """The attended sum of sources and the sum so far."""
        sources, size, y = [*self.sources, self.h], self.h.shape[1], self.room("mixed", self.h.shape[1])
        norm = self.child(m, f"{name}_norm", RMSNorm)
        self.step(
            "mix", self.address([x.data_ptr() for x in sources]), len(sources), size, self.tensor(norm, "weight", size),
            float(self.program.seen.entry(vars(norm), "eps")), self.weight(m, f"{name}_proj", 1, size), y,
            self.room("scores", len(sources) + size),
        )  # fmt: skip
        return y

    def layer(self, decoder, i: int) -> None:
        from kdagen.models.model import Layer

        m = self.child(decoder.layers, str(i), Layer)
        x, normed, begins = self.h, self.room("normed", self.h.shape[1]), m.block and m.begins_block
        if m.block:
            x = self.mixed(m, "self_attention_res")
        if begins:
            self.begin_block()
        self.norm(m, "input_layernorm", x, normed)
        kind = type(self.program.seen.entry(m._modules, "self_attn"))
        attention = {mixer.Mixer: self.mixer, mla.LatentAttention: self.latent}.get(kind, self.unknown)
        attention(self.plain(m.self_attn, kind, "self_attn"), normed, not begins, i)
        x = self.mixed(m, "mlp_res") if m.block else self.h
        self.norm(m, "post_attention_layernorm", x, normed)
        if "mlp" in m._modules:
            self.mlp(self.child(m, "mlp", layers.MLP), normed)
        else:
            self.sparse(self.child(m, "block_sparse_moe", moe.SparseMLP), normed)

    def unknown(self, m, *rest):
        raise Unlike(f"self_attn is {type(m).__name__}")

    def mixer(self, m: mixer.Mixer, x, add: bool, i: int) -> None:
        *parts, gate = self.several(m, m.packed.names, x)
        channels = m.heads * m.head_dim
        total, rows = channels * len(m.vectors), self.rows
        shapes = (rows, m.heads, m.head_dim, m.head_dim), (rows, m.past, total)
        self.program.expected[i] = mixer.RecurrentState, *shapes
        for n, name in enumerate(m.vectors):
            weight = self.tensor(self.child(m, f"{name}_conv1d", ShortConvolution), "weight", channels, 1, m.past + 1)
            y = self.room(f"convolved {n}", channels)
            cell = self.cell(i, 1)
            self.step("convolve", *_at(parts[n]), weight, channels, m.past + 1, cell, n * channels, total, *_at(y))
            parts[n] = y
        o = self.room("o", channels)
        self.recurrence(m, self.arguments(m, parts), o, i)
        self.norm(m, "o_norm", o, o, m.heads, layers.GatedRMSNorm)
        self.gate(gate if m.full_rank_gate else self.second(m, "g", gate, channels), o)
        self.linear(m, "o_proj", o, self.h, add)

    def second(self, m, module: str, x, size: int):
        """The second of two linear maps."""
        self.linear(m, f"{module}_b_proj", x, y := self.room(f"second {module}", size))
        return y

    def arguments(self, m: mixer.Mixer, parts: list) -> dict:
        """Mixer.arguments, of parts that are convolved already."""
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
        self.tensor(m, name)
        return m.of_head(name, axis, torch.float32).detach()

    def recurrence(self, m: mixer.Mixer, given: dict, out, i: int) -> None:
        """The op's own loop, on the pool that the cell has."""
        op, p = mixer.op_of(m.recurrence, m.head_dim), self.program
        out = out.view(self.rows, 1, m.heads, m.head_dim)
        ordered = [given[name] for name in op.signature.tensors]
        placed = Decoding(op).prepared((*ordered, self.cache.layers[i].state), out)
        if placed is None:
            raise Unlike(op.step.native.problem or "the recurrence decodes by torch")
        p.kept.append(placed)
        p.recurrences[len(p.words) // WORDS] = op, given, out, i
        function = ctypes.cast(op.step.native.function, ctypes.c_void_p).value
        self.step("recurrence", function, placed.address, placed.address + 8 * POOL, self.cell(i, 0), CHECK_ALL)

    def cell(self, layer: int, which: int) -> int:
        """The address of a cell."""
        return ctypes.addressof(self.program.cells) + 8 * (2 * layer + which)

    def latent(self, m: mla.LatentAttention, x, add: bool, i: int) -> None:
        q, latent, *gate = self.several(m, m.packed.names, x)
        width, per, own = m.rank + m.shared, m.own + m.value, m.own + m.shared
        self.program.expected[i] = mla.LatentState, (self.rows, None, width)
        if "q_proj" not in m._modules:
            self.norm(m, "q_a_layernorm", q, q)
            q = self.second(m, "q", q, m.heads * own)
        self.norm(m, "kv_a_layernorm", latent[:, : m.rank], latent[:, : m.rank])
        weight = self.weight(m, "kv_b_proj", m.heads * per, m.rank)
        query, mix = self.room("query", m.heads * width), self.room("mix", m.heads * m.rank)
        self.step("transposed", *_at(q), own, weight, per * m.rank, m.heads, m.own, m.rank, *_at(query), width, m.shared)
        past = ctypes.addressof(self.program.past)
        self.step("attend", query, *_at(latent), self.cell(i, 0), past, m.heads, m.rank, width, float(m.scale), mix)
        o = self.room("values", m.heads * m.value)
        for h, part in enumerate(o.split(m.value, 1)):
            self.product(mix[:, h * m.rank : (h + 1) * m.rank], weight[h * per + m.own : (h + 1) * per], part)
        if gate:
            self.gate(gate[0], o)
        self.linear(m, "o_proj", o, self.h, add)

    def mlp(self, m: layers.MLP, x) -> None:
        g, u = self.several(m, ["gate_proj", "up_proj"], x)
        self.step("activate", *_at(g), *_at(u), g.shape[1], *self.betas(m))
        self.linear(m, "down_proj", g, self.h, True)

    def betas(self, m) -> tuple[float, float]:
        """Of an activation; 0 for none."""
        a = self.program.seen.entry(vars(m), "activation")
        if type(a) is not layers.Activation:
            raise Unlike(f"activation is {type(a).__name__}")
        return (0.0, 0.0) if a.name == "silu" else (float(a.beta), float(a.linear_beta or 0))

    def sparse(self, m: moe.SparseMLP, x) -> None:
        router = self.child(m, "gate", moe.Router)
        c, size, inner = router.config, x.shape[1], router.config.moe_intermediate_size
        count, k = c.num_experts, c.num_experts_per_token
        groups, kept = (c.num_expert_group, c.topk_group) if c.use_grouped_topk else (1, 1)
        if k > kept * (count // groups):
            raise Unlike("fewer experts are allowed than chosen")
        self.product(x, self.tensor(router, "weight", count, size), scores := self.room("scores", count))
        bias, spare = self.tensor(router, "e_score_correction_bias", count), self.room("spare", 2 * count + groups)
        chosen, weights = self.address([0] * self.rows * k), self.room("weights", k)
        self.step(
            "choose", scores, bias, count, k, groups, kept, bool(c.moe_renormalize), float(c.routed_scaling_factor),
            spare, chosen, weights,
        )  # fmt: skip
        experts = self.child(m, "experts", nn.ModuleList)
        owners, room = self.address([0] * self.rows * k), self.room("experts", 2 * (size + inner))
        found = [self.expert(experts, str(e), size, inner) for e in range(count)]
        table = self.address([x.data_ptr() for e in found for x in e])
        betas = self.betas(experts[0])
        self.step(
            "experts", *_at(x), table, count, chosen, weights, k, size, inner, *betas, *_at(self.h), room, owners
        )
        if self.program.seen.entry(m._modules, "shared_experts") is not None:
            self.mlp(self.child(m, "shared_experts", layers.MLP), x)

    def expert(self, experts, name: str, size: int, inner: int) -> tuple:
        m = self.child(experts, name, moe.Expert)
        shapes = {"w1": (inner, size), "w3": (inner, size), "w2": (size, inner)}
        return tuple(self.weight(m, name, *shape) for name, shape in shapes.items())


def _at(x) -> tuple:
    """A buffer, and floats from a row to the next."""
    return x.data_ptr(), x.stride(0)


def _word(x) -> int:
    if isinstance(x, float):
        return struct.unpack("q", struct.pack("d", x))[0]
    return x.data_ptr() if isinstance(x, torch.Tensor) else int(x)
