"""Training in gpu.py: forward and backward, together and each by itself; how a peer's gradients are checked.

A loss of the output alone: peers go through torch's autograd, and so does kdagen where ops are timed as people call
them; else its kernels are launched bare, with the sum that a head's parameter needs.
"""

from __future__ import annotations

import gpu_contenders as contenders
from kdagen.autotune import launches
from kdagen.autotune.devices.clock import Call

from kdagen import zoo
from kdagen.tolerance import reference_gradients, relative_error

PEER_TOLERANCE = 5e-2  # of gradients too
AHEAD = 20_000_000  # clock cycles of sleep, 10 ms or so: autograd's host side takes longer than a launch


def check_peer(op: str, peer, kernels, given: dict) -> dict[str, tuple[float, float]]:
    """Errors of its output, its states and its gradients, and what they may be, on arguments on the CPU."""
    import torch

    shared = launches.leaves(contenders.on_gpu(given))
    with torch.enable_grad():
        out, final = peer(shared)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = dict(zip((f"d_{n}" for n in shared), torch.autograd.grad(out, list(shared.values()), d_out)))
    return errors(op, found | {"out": out.detach(), "final_state": final.detach()}, given, d_out)


def errors(op: str, found: dict, given: dict, d_out) -> dict[str, tuple[float, float]]:
    """Against float64 autograd through the recurrence, on the CPU and without any state."""
    import torch

    zero = torch.zeros(found["final_state"].shape)
    with torch.enable_grad():
        out, final, gradients = reference_gradients(zoo.get(op), given, zero, d_out.cpu(), zero)
    expected = {"out": out, "final_state": final, **{f"d_{n}": x for n, x in gradients.items()}}
    return {name: (relative_error(x.cpu(), expected[name]), PEER_TOLERANCE) for name, x in found.items()}


def calls(case, mode: str, peer) -> dict:
    """What is timed, by label: both passes, each by itself and, where launches are bare, each kernel."""
    found = {}
    for label, kernels in case.kernels.items():
        found |= through_autograd(f"kdagen {label}", called(kernels)) if mode == "eager" else bare(label, kernels)
    return found | (through_autograd(peer.label, peer) if peer else {})


def called(kernels):
    """The op that people call, on these kernels and arguments by name."""
    op = launches.op_of(kernels)
    return lambda tensors: op(**tensors, output_final_state=True)


def through_autograd(label: str, function) -> dict[str, Call]:
    """Forward and backward of a function that torch differentiates."""
    forward, backward = launches.through_autograd(function)
    return {
        label: Call(lambda given: backward(forward(given)), ahead=AHEAD),
        f"{label}: forward": Call(forward, ahead=AHEAD),
        f"{label}: backward": Call(backward, forward, AHEAD),
    }


def bare(label: str, kernels) -> dict[str, Call]:
    """The same of kdagen's kernels."""
    forward, reverse = (contenders.of(label, launches.pass_call(kernels, which)) for which in ("forward", "backward"))

    def after_forward(given):
        forward(given)
        return given

    passes = {
        f"kdagen {label}": Call(lambda given: reverse(after_forward(given))),
        f"kdagen {label}: forward": Call(forward),
        f"kdagen {label}: backward": Call(reverse, after_forward),
    }
    alone = launches.kernel_calls(kernels)
    return passes | {f"kdagen {label}: {name}": Call(contenders.of(label, f)) for name, f in alone.items()}


def whole(case, peer) -> dict:
    """Calls whose memory is measured: forward and backward as people call them."""
    ops = {f"kdagen {label}": called(kernels) for label, kernels in case.kernels.items()}
    if peer:
        ops[peer.label] = peer
    return {label: through_autograd(label, function)[label] for label, function in ops.items()}
