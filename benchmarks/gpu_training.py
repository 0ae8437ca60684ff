"""Training in gpu.py: forward and backward, together and each by itself; gradients are checked on a small shape.

A loss of the output alone: peers go through torch's autograd, and so does kdagen where ops are timed as people call
them; else its kernels are launched bare, with the sum that a head's parameter needs.
"""

from __future__ import annotations

import gpu_contenders as contenders
from gpu_timing import Call

from kdagen import zoo
from kdagen.ir.canonical_json import from_json
from kdagen.tolerance import TOLERANCE, gradient_tolerance, reference_gradients, relative_error

GATES = ("mild", "bounded", "reset")
PEER_TOLERANCE = 5e-2  # of gradients too
AHEAD = 20_000_000  # clock cycles of sleep, 10 ms or so: autograd's host side takes longer than a launch


def check_kernels(op: str, kernels, given: dict) -> dict[str, tuple[float, float]]:
    """Errors of results and gradients, and what they may be, on arguments on the CPU."""
    d_out = cotangent(kernels, given)
    moved = contenders.on_gpu(given)
    forward = kernels.launch(moved)
    kept = {name: forward[name] for name in kernels.kept}
    backward = kernels.launch({**moved, **kept, kernels.by_role["d_out"]: d_out}, "backward")
    found = {f"d_{n}": x for n, x in kernels.gradients(backward).items()}
    found["out"] = forward[kernels.by_role["out"]]
    found["final_state"] = contenders.plain(kernels, forward[kernels.by_role["final_state"]])
    dtype, canonical = kernels.plan["dtype"], from_json(kernels.plan["recurrence"]["canonical"])
    most = {f"d_{n}": tolerance for n, tolerance in gradient_tolerance(canonical, dtype).items()}
    return errors(op, found, given, d_out, {"out": TOLERANCE[dtype], "final_state": TOLERANCE[dtype], **most})


def check_peer(op: str, peer, kernels, given: dict) -> dict[str, tuple[float, float]]:
    """The same of a peer: its output and its gradients."""
    import torch

    shared = leaves(contenders.on_gpu(given))
    with torch.enable_grad():
        out, final = peer(shared)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = dict(zip((f"d_{n}" for n in shared), torch.autograd.grad(out, list(shared.values()), d_out)))
    found |= {"out": out.detach(), "final_state": final.detach()}
    return errors(op, found, given, d_out, dict.fromkeys(found, PEER_TOLERANCE))


def errors(op: str, found: dict, given: dict, d_out, most: dict) -> dict[str, tuple[float, float]]:
    """Against float64 autograd through the recurrence, on the CPU and without any state."""
    import torch

    b, _, h, k = next(x for n, x in given.items() if n == "k").shape
    zero = torch.zeros(found["final_state"].shape)
    with torch.enable_grad():
        out, final, gradients = reference_gradients(zoo.get(op), given, zero, d_out.cpu(), zero)
    expected = {"out": out, "final_state": final, **{f"d_{n}": x for n, x in gradients.items()}}
    return {name: (relative_error(x.cpu(), expected[name]), most[name]) for name, x in found.items()}


def cotangent(kernels, arguments: dict, seed: int = 0):
    """That of the output, on the GPU."""
    import torch

    dims, generator = kernels.dims(arguments), torch.Generator().manual_seed(seed + 1)
    tokens = min(dims["tokens"], contenders.SAMPLED)
    drawn = torch.randn(dims["B"], tokens, dims["HV"], dims["V"], generator=generator)
    drawn = drawn.to(getattr(torch, kernels.plan["dtype"])).to(contenders.DEVICE)
    return drawn[:, torch.arange(dims["tokens"], device=contenders.DEVICE) % tokens]


def leaves(arguments: dict) -> dict:
    """The same memory, as tensors whose gradients are wanted."""
    return {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in arguments.items()}


def inputs(kernels, arguments: dict, seed: int) -> dict:
    """What all contenders share."""
    return {"arguments": arguments, "leaves": leaves(arguments), "d_out": cotangent(kernels, arguments, seed)}


def with_results(kernels, shared: dict) -> dict:
    """The tensors that these kernels are launched on."""
    return contenders.with_results(kernels, {**shared["arguments"], kernels.by_role["d_out"]: shared["d_out"]})


def calls(case, mode: str, peer) -> dict:
    """What is timed, by label: both passes, each by itself and, where launches are bare, each kernel."""
    found = {}
    for label, kernels in case.kernels.items():
        if mode == "eager":
            found |= through_autograd(f"kdagen {label}", contenders.called(kernels))
        else:
            found |= bare(label, kernels)
    return found | (through_autograd(peer.label, peer) if peer else {})


def through_autograd(label: str, function) -> dict[str, Call]:
    """Forward and backward of a function that torch differentiates."""
    import torch

    def forward(given):
        return given, function(given["leaves"])[0]

    def backward(made):
        given, out = made
        wanted = [x for x in given["leaves"].values() if x.requires_grad]
        return torch.autograd.grad(out, wanted, given["d_out"], allow_unused=True)

    return {
        label: Call(lambda given: backward(forward(given)), ahead=AHEAD),
        f"{label}: forward": Call(forward, ahead=AHEAD),
        f"{label}: backward": Call(backward, forward, AHEAD),
    }


def bare(label: str, kernels) -> dict[str, Call]:
    """The same of kdagen's kernels."""
    forward, reverse = (contenders.pass_call(kernels, label, which) for which in ("forward", "backward"))

    def backward(given):
        reverse(given)
        return kernels.gradients(given[label])

    def after_forward(given):
        forward(given)
        return given

    passes = {
        f"kdagen {label}": Call(lambda given: backward(after_forward(given))),
        f"kdagen {label}: forward": Call(forward),
        f"kdagen {label}: backward": Call(backward, after_forward),
    }
    alone = contenders.kernel_calls(kernels, label)
    return passes | {f"kdagen {label}: {name}": Call(f) for name, f in alone.items()}


def whole(case, peer) -> dict:
    """Calls whose memory is measured: forward and backward as people call them."""
    ops = {f"kdagen {label}": contenders.called(kernels) for label, kernels in case.kernels.items()}
    if peer:
        ops[peer.label] = peer
    return {label: through_autograd(label, function)[label] for label, function in ops.items()}
