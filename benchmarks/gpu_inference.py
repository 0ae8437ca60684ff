"""Inference in gpu.py: the forward that nothing follows, checked on a small shape, and what is timed of it."""

from __future__ import annotations

import gpu_contenders as contenders

from kdagen.tolerance import TOLERANCE, relative_error

GATES = ("mild", "bounded", "reset")  # that kernels are checked with
PEER_TOLERANCE = 2e-2  # a peer that is further off computes something else


def check_kernels(op: str, kernels, given: dict) -> dict[str, tuple[float, float]]:
    """Errors of output and final state, and what they may be, on arguments on the CPU."""
    made = kernels.launch(contenders.on_gpu(given))
    found = made[kernels.by_role["out"]], made[kernels.by_role["final_state"]]
    found = found[0], contenders.plain(kernels, found[1])
    return errors(contenders.reference(op, kernels, given), found, TOLERANCE[kernels.plan["dtype"]])


def check_peer(op: str, peer, kernels, given: dict) -> dict[str, tuple[float, float]]:
    """The same of a peer."""
    return errors(contenders.reference(op, kernels, given), peer(contenders.on_gpu(given)), PEER_TOLERANCE)


def errors(expected, found, most: float) -> dict[str, tuple[float, float]]:
    """Against the recurrence, token by token in float64."""
    named = zip(("out", "final_state"), found, expected)
    return {name: (relative_error(f.cpu(), e), most) for name, f, e in named}


def inputs(kernels, arguments: dict, seed: int) -> dict:
    """What all contenders share."""
    return {"arguments": arguments}


def with_results(kernels, shared: dict) -> dict:
    """The tensors that these kernels are launched on."""
    return contenders.with_results(kernels, shared["arguments"])


def calls(case, mode: str, peer) -> dict:
    """What is timed, by label. Eager: ops as people call them, which allocate; else bare launches, and each kernel."""
    found = {}
    for label, kernels in case.kernels.items():
        if mode == "eager":
            op = contenders.called(kernels)
            found[f"kdagen {label}"] = lambda given, op=op: op(given["arguments"])
            continue
        found[f"kdagen {label}"] = contenders.pass_call(kernels, label, "forward")
        for name, alone in contenders.kernel_calls(kernels, label).items():
            found[f"kdagen {label}: {name}"] = alone
    if peer:
        found[peer.label] = lambda given: peer(given["arguments"])
    return found


def whole(case, peer) -> dict:
    """Calls whose memory is measured: in inference nothing outlives a call but its results."""
    return {}
