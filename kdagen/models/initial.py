"""First values of a model's parameters: by their kind, and those of parameters of the head by their name."""

from __future__ import annotations

import math

import torch
from torch import nn

from kdagen.models.layers import RMSNorm, ShortConvolution
from kdagen.models.mixer import Mixer
from kdagen.models.moe import Router


@torch.no_grad()
def initialise(model: nn.Module, std: float, generator=None) -> None:
    """Normal weights, norms of ones; scores of sources in attention residuals begin at zero, for equal weights."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding, Router)):
            module.weight.normal_(0.0, 0.0 if name.endswith("_res_proj") else std, generator=generator)
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        if isinstance(module, ShortConvolution):
            bound = module.weight.shape[-1] ** -0.5
            module.weight.uniform_(-bound, bound, generator=generator)
        if isinstance(module, Router):
            module.e_score_correction_bias.zero_()
        if isinstance(module, Mixer):
            for i, parameter in [(i, getattr(module, i)) for i in module.wide]:
                _head_parameter(i, parameter, generator)
            for i in module.inputs:  # bounded parameters are learned through a sigmoid
                if i.kind == "parameter" and i.shape == "range":
                    getattr(module, i.name).copy_(-_steps_of_memory(module.heads).logit())


def _head_parameter(name: str, parameter, generator) -> None:
    if name.endswith("A_log"):  # rates of decay from 1 to 16
        parameter.uniform_(1.0, 16.0, generator=generator).log_()
    elif name.endswith("dt_bias"):  # softplus of it, a step, from 1e-3 to 1e-1
        step = parameter.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
        parameter.copy_(step + torch.log(-torch.expm1(-step)))
    elif name == "D":
        parameter.fill_(1.0)
    else:
        parameter.zero_()


def _steps_of_memory(heads: int):
    """2^-5, 2^-6 and so on: how much of a state each head forgets in a step, as in RetNet."""
    return 2.0 ** -(5.0 + torch.arange(heads, dtype=torch.float64))
