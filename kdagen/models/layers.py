"""What every layer is made of: linear maps, norms, the dense MLP, the short convolution, attention residuals.

Parameters are left as memory was; a model gives them their first values (kdagen.models.initial).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from kdagen.models.layout import Layout


class Linear(nn.Linear):
    """A linear map without bias, [out, in], not initialised."""

    def __init__(self, inside: int, outside: int):
        super().__init__(inside, outside, bias=False)

    def reset_parameters(self) -> None:
        pass


class Packed:
    """Weights of some of a module's children, one behind another in memory: one product or convolution for all.

    The children stay, with their parameters, which become parts of the whole: `pack` (KimiLinear.new_cache calls it)
    copies these into it. Whoever replaces or moves a parameter or a child, or wants gradients, has the children run one
    by one, as `split` does.
    """

    def __init__(self, owner: nn.Module, kind: type, names: list[str]):
        self.children, self.kind, self.names = owner._modules, kind, names
        self.whole, self.places, self.sizes = None, [], []

    def modules(self) -> list | None:
        """The children, if all are plain ones that nobody has hooked."""
        found = [self.children[name] for name in self.names]
        return found if all(map(self._plain, found)) else None

    def _plain(self, child) -> bool:
        changed = child._forward_hooks, child._forward_pre_hooks, "forward" in vars(child)
        return type(child) is self.kind and not any(changed) and child._parameters.get("bias") is None

    @torch.no_grad()
    def pack(self) -> None:
        """Makes the weights parts of one tensor, unless they are."""
        if self.weight() is None and (found := self.modules()) and len({m.weight.dtype for m in found}) == 1:
            self.whole = torch.cat([m.weight for m in found])
            self.sizes = [len(m.weight) for m in found]
            for m, part in zip(found, self.whole.split(self.sizes)):
                m.weight.data = part
            self.places = [m.weight.data_ptr() for m in found]

    def weight(self):
        """All weights, if they may be used as one."""
        if self.whole is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        found = self.modules()
        return self.whole if found and [m.weight.data_ptr() for m in found] == self.places else None

    def split(self, x) -> tuple:
        """Each of the linear maps of x."""
        if (weight := self.weight()) is not None:
            return F.linear(x, weight).split(self.sizes, -1)
        return tuple(self.children[name](x) for name in self.names)


def wide(x):
    """In float32 at least."""
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the division in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x):
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(wide(x), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight


class GatedRMSNorm(RMSNorm):
    """A head's output, normalised and gated by a sigmoid, all in float32."""

    def forward(self, x, gate):
        normed = F.rms_norm(wide(x), self.weight.shape, wide(self.weight), self.eps)
        return (normed * wide(gate).sigmoid()).to(x.dtype)


class MLP(nn.Module):
    """down(activation(gate(x), up(x)))."""

    def __init__(self, config, size: int):
        super().__init__()
        self.gate_proj, self.up_proj = Linear(config.hidden_size, size), Linear(config.hidden_size, size)
        self.down_proj = Linear(size, config.hidden_size)
        self.activation, self.packed = Activation(config), Packed(self, Linear, ["gate_proj", "up_proj"])

    def forward(self, x):
        return self.down_proj(self.activation(*self.packed.split(x)))


class Activation:
    """silu(g) u; or "situ", with both parts bounded: b tanh(g / b) sigmoid(g) * l tanh(u / l)."""

    def __init__(self, config):
        self.name = config.hidden_act
        self.beta, self.linear_beta = config.activation_situ_beta, config.activation_situ_linear_beta

    def __call__(self, g, u):
        if self.name == "silu":
            return F.silu(g) * u
        gate = self.beta * torch.tanh(g / self.beta) * torch.sigmoid(g)
        return gate * (u if self.linear_beta is None else self.linear_beta * torch.tanh(u / self.linear_beta))


class ShortConvolution(nn.Module):
    """Each channel a causal sum over the last few tokens, then SiLU."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def forward(self, x, layout: Layout, state=None):
        return short_convolution(x, self.weight, layout, state)


def short_convolution(x, weight, layout: Layout, state=None):
    """Of x [B, T, C] by weights [C, 1, width], the same shape; a state [N, width - 1, C] is replaced."""
    past = weight.shape[-1] - 1
    before = x.new_zeros(layout.sequences, past, x.shape[-1]) if state is None else state
    if layout.ranks is not None:
        came, x = layout.ranks.behind(x, past)
        before = torch.cat([came, before[len(came) :]])
    if layout.ends is None:
        seen = torch.cat([before, x], 1)
        found, last = convolved(seen, weight), seen[:, seen.shape[1] - past :]
    else:  # each sequence behind its own past
        parts = [torch.cat([before[n], x[0, piece]]) for n, piece in enumerate(layout.pieces)]
        whole = convolved(torch.cat(parts).unsqueeze(0), weight)
        starts = [piece.start + n * past for n, piece in enumerate(layout.pieces)]
        rows = [whole[:, at : at + len(part) - past] for at, part in zip(starts, parts)]
        found, last = torch.cat(rows, 1), torch.stack([part[len(part) - past :] for part in parts])
    if state is not None:
        state.copy_(last)
    return F.silu(found)


def convolved(seen, weight):
    """Sums over each token and those before it; the first tokens have too few, and no sum."""
    tokens = seen.shape[1] - weight.shape[-1] + 1
    if tokens == 1:
        return (seen * weight[:, 0].mT).sum(1, keepdim=True)
    taps = weight[:, 0].unbind(-1)
    found = seen[:, :tokens] * taps[0]
    for i, w in enumerate(taps[1:], 1):
        found = torch.addcmul(found, seen[:, i : i + tokens], w)
    return found


def attended(sources: list, proj: Linear, norm: RMSNorm):
    """sum_i p_i v_i, p = softmax_i <w, RMSNorm(v_i)> in float32."""
    values = torch.stack(sources)
    weights = torch.softmax(wide(norm(values)) @ wide(proj.weight[0]), 0)
    return (weights.unsqueeze(-1) * wide(values)).sum(0).to(values.dtype)


def kept_wide(module: nn.Module, fn, recurse: bool, names: tuple[str, ...]):
    """nn.Module._apply, after which the named tensors of a module are in float32 at least, whatever `fn` casts to."""
    if recurse:
        for child in module.children():
            child._apply(fn)
    named = [getattr(module, name) for name in names]
    kept = {id(x) for tensor in named for x in (tensor, tensor.grad)}

    def apply(tensor):
        found = fn(tensor)
        is_wide = found.dtype == torch.promote_types(found.dtype, torch.float32)
        return found if is_wide or id(tensor) not in kept else tensor.to(found.device)

    return nn.Module._apply(module, apply, recurse=False)
