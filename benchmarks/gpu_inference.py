"""Inference in gpu.py: the forward that nothing follows; what is timed of it, and how a peer is checked."""

from __future__ import annotations

import gpu_contenders as contenders
from kdagen.autotune import launches

from kdagen.tolerance import relative_error

PEER_TOLERANCE = 2e-2  # a peer that is further off computes something else


def check_peer(op: str, peer, kernels, given: dict) -> dict[str, tuple[float, float]]:
    """Errors of its output and final state, and what they may be, on arguments on the CPU."""
    return errors(contenders.reference(op, given), peer(contenders.on_gpu(given)))


def errors(expected, found) -> dict[str, tuple[float, float]]:
    """Against the recurrence, token by token in float64."""
    named = zip(("out", "final_state"), found, expected)
    return {name: (relative_error(f.cpu(), e), PEER_TOLERANCE) for name, f, e in named}


def calls(case, mode: str, peer) -> dict:
    """What is timed, by label. Eager: ops as people call them, which allocate; else bare launches, and each kernel."""
    found = {}
    for label, kernels in case.kernels.items():
        if mode == "eager":
            found[f"kdagen {label}"] = launches.as_called(kernels)
            continue
        found[f"kdagen {label}"] = contenders.of(label, launches.pass_call(kernels, "forward"))
        for name, alone in launches.kernel_calls(kernels).items():
            found[f"kdagen {label}: {name}"] = contenders.of(label, alone)
    if peer:
        found[peer.label] = lambda given: peer(given["arguments"])
    return found


def whole(case, peer) -> dict:
    """Calls whose memory is measured: in inference nothing outlives a call but its results."""
    return {}
