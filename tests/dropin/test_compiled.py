"""Functions of kdagen.fla under torch's compiler: one graph for all lengths, with gradients."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import kdagen.fla

H, HV, K, V = 2, 4, 16, 8


def inputs(batch: int, tokens: int) -> list:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (H, K), (H, K), (HV, V), (HV, K), (HV,)
    return [torch.randn(batch, tokens, *shape, generator=generator).requires_grad_() for shape in shapes]


def kda(q, k, v, g, beta):
    A_log = torch.zeros(HV)
    options = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    return kdagen.fla.chunk_kda(q, k, v, g, beta, output_final_state=True, A_log=A_log, **options)


def delta_rule(q, k, v, g, beta):
    rate = beta.sigmoid()
    return kdagen.fla.fused_recurrent_gdn(q, 0.1 * k, v, -g[..., 0].abs(), beta=rate, output_final_state=True)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", [kda, delta_rule])
def test_one_graph(function, dynamic, gradients):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch, tokens in ((5, 65), (6, 70), (7, 91), (9, 130)):
        x = inputs(batch, tokens)
        with torch.set_grad_enabled(gradients):
            found, expected = compiled(*x), function(*x)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        if gradients:
            grads = [torch.autograd.grad(results[0].square().sum(), x) for results in (found, expected)]
            assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count == (1 if dynamic else 2)  # the first for fixed sizes, if they are not said to change
    torch._dynamo.reset()
