"""Decoding in gpu.py: one token for each sequence of a pool of states, in place.

It is bound by memory: states are read and written once, so `copy` in the table, the bandwidth over that of a large
copy, says how good it is. Each call decodes the same token, on the states that the last one left.
"""

from __future__ import annotations

import gpu_contenders as contenders
from gpu_inference import errors
from kdagen.autotune import launches


def check_peer(op: str, peer, kernels, given: dict) -> dict[str, tuple[float, float]]:
    """Errors of a peer's output and states, and what they may be, on arguments on the CPU."""
    state = launches.states(kernels, given)
    found = peer(contenders.on_gpu({**given, "initial_state": state}))
    return errors(contenders.reference(op, given, state.double()), found)


def calls(case, mode: str, peer) -> dict:
    """What is timed, by label. Eager: ops as people call them, which allocate the output; else bare launches."""
    found = {}
    for label, kernels in case.kernels.items():
        found[f"kdagen {label}"] = contenders.of(label, launches.pass_call(kernels, "decode"))
        if mode == "eager":
            found[f"kdagen {label}"] = as_called(kernels, label)
    if peer:
        found[peer.label] = lambda given: peer({**given["arguments"], "initial_state": given["states"]})
    return found


def as_called(kernels, label: str):
    """The op that people call, in place on a pool."""
    op = launches.as_called(kernels)
    return lambda given: op({"arguments": given["arguments"], "state_pool": given[label]["state_pool"]})


def whole(case, peer) -> dict:
    """Calls whose memory is measured: none, for nothing outlives a call but its output."""
    return {}
