"""Decoding in gpu.py: one token for each sequence of a pool of states, in place.

It is bound by memory: states are read and written once, so `copy` in the table, the bandwidth over that of a large
copy, says how good it is. Each call decodes the same token, on the states that the last one left.
"""

from __future__ import annotations

import gpu_contenders as contenders
from gpu_inference import PEER_TOLERANCE, errors

from kdagen.tolerance import TOLERANCE

GATES = ("mild", "bounded", "reset")  # that kernels are checked with


def states(kernels, arguments: dict, seed: int = 0):
    """States to begin with, [B, HV, K, V] in float32, where the arguments are."""
    import torch

    dims, device = kernels.dims(arguments), next(iter(arguments.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    shape = (dims[d] for d in ("B", "HV", "K", "V"))
    return 0.1 * torch.randn(*shape, generator=generator, device=device)


def check_kernels(op: str, kernels, given: dict) -> dict[str, tuple[float, float]]:
    """Errors of output and states, and what they may be, on arguments on the CPU."""
    pool = contenders.of_type(kernels, states(kernels, given))
    expected = contenders.reference(op, kernels, given, contenders.plain(kernels, pool).double())
    pool = pool.to(contenders.DEVICE, copy=True)
    made = kernels.launch({**contenders.on_gpu(given), "state_pool": pool}, "decode")
    found = made[kernels.by_role["out"]], contenders.plain(kernels, pool)
    return errors(expected, found, TOLERANCE[kernels.plan["dtype"]])


def check_peer(op: str, peer, kernels, given: dict) -> dict[str, tuple[float, float]]:
    """The same of a peer."""
    state = states(kernels, given)
    found = peer(contenders.on_gpu({**given, "initial_state": state}))
    return errors(contenders.reference(op, kernels, given, state.double()), found, PEER_TOLERANCE)


def inputs(kernels, arguments: dict, seed: int) -> dict:
    """What all contenders share."""
    return {"arguments": arguments, "states": states(kernels, arguments, seed)}


def with_results(kernels, shared: dict) -> dict:
    """The tensors that these kernels are launched on."""
    pool = contenders.of_type(kernels, shared["states"]).clone()
    return contenders.with_results(kernels, {**shared["arguments"], "state_pool": pool})


def calls(case, mode: str, peer) -> dict:
    """What is timed, by label. Eager: ops as people call them, which allocate the output; else bare launches."""
    found = {}
    for label, kernels in case.kernels.items():
        found[f"kdagen {label}"] = contenders.pass_call(kernels, label, "decode")
        if mode == "eager":
            found[f"kdagen {label}"] = as_called(kernels, label)
    if peer:
        found[peer.label] = lambda given: peer({**given["arguments"], "initial_state": given["states"]})
    return found


def as_called(kernels, label: str):
    """The op that people call, in place on a pool."""
    op = contenders.op_of(kernels)
    return lambda given: op.decode(**given["arguments"], state_pool=given[label]["state_pool"])


def whole(case, peer) -> dict:
    """Calls whose memory is measured: none, for nothing outlives a call but its output."""
    return {}
