"""Prepare beside scan: a forward over segments of its sequences, on two streams.

A segment is a call of the built kernels on a slice of the arguments, which lies in a row where there is one sequence:
its states go from one to the next, its output into a slice of the whole. What does not read the state runs on one
stream, ahead of the rest on the other. Workspaces are few and used in turn, small enough for the L2 cache, so that a
segment is prepared only once the scan before the last one is done with its workspace.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdagen.autotune import launches

from kdagen.runtime.loader import LoadedOp

AHEAD = ("index", "prepare")  # families that read no state
RING = 2  # segments that have workspaces at a time
PIECES = (2, 4, 8, 16)
MADE = ("workspace",)


def pieces_of(kernels: LoadedOp, tokens: int) -> list[int]:
    """Numbers of segments that a sequence falls into evenly, each of whole chunks."""
    return [n for n in PIECES if tokens % (n * kernels.plan["chunk_size"]) == 0]


@dataclass(frozen=True)
class Segments:
    """The tensors of each segment by name, and the results of all: output and last state."""

    parts: list[dict]
    results: dict


def cut(kernels: LoadedOp, given: dict, pieces: int) -> Segments:
    """Memory for the segments of one sequence's arguments [1, T, ..]."""
    import torch

    roles, parts = kernels.by_role, []
    dims = kernels.dims(given)
    tokens = dims["tokens"] // pieces
    shape = dims["T"], *kernels.shape(roles["out"], dims)[1:]
    out = torch.empty(shape, dtype=getattr(torch, kernels.plan["dtype"]), device=next(iter(given.values())).device)
    for i in range(pieces):
        cut_at = slice(i * tokens, (i + 1) * tokens)
        of = {n: x[:, cut_at] if "T" in kernels.plan["tensors"][n]["shape"] else x for n, x in given.items()}
        of[roles["out"]] = out[cut_at]
        if parts:
            of[roles["initial_state"]] = parts[-1][roles["final_state"]]
        if i >= RING:
            of |= _workspaces(kernels, parts[i - RING])
        parts.append(launches.memory(kernels, {"arguments": of}))
    return Segments(parts, {"out": out, "final_state": parts[-1][roles["final_state"]]})


def _workspaces(kernels: LoadedOp, tensors: dict) -> dict:
    specs = kernels.plan["tensors"]
    return {n: x for n, x in tensors.items() if specs[n]["role"] in MADE}


def stages(kernels: LoadedOp) -> tuple[list, list]:
    """Launches of a forward that need no state, and the rest; each takes tensors by name."""
    alone = launches.kernel_calls(kernels)
    families = {k["name"]: k["family"] for k in kernels.manifest["kernels"]}
    ahead, after = [], []
    for launch in kernels.passes["forward"]:
        first = families[launch["name"]] in AHEAD and not after
        (ahead if first else after).append(alone[launches.short(kernels, launch["name"])])
    return ahead, after


def in_turn(kernels: LoadedOp):
    """All kernels of a segment, then the next one: what cutting alone costs."""
    call = launches.pass_call(kernels, "forward")
    return lambda segments: [call(part) for part in segments.parts]


def side_by_side(kernels: LoadedOp):
    """Prepare of the next segments beside the scan of this one."""
    import torch

    ahead, after = stages(kernels)
    preparing, scanning = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)  # the scan's blocks come first

    def call(segments: Segments) -> None:
        caller, count = torch.cuda.current_stream(), len(segments.parts)
        prepared, scanned = ([torch.cuda.Event() for _ in range(count)] for _ in range(2))
        preparing.wait_stream(caller)
        scanning.wait_stream(caller)
        for i, part in enumerate(segments.parts):
            with torch.cuda.stream(preparing):
                if i >= RING:
                    preparing.wait_event(scanned[i - RING])
                for launch in ahead:
                    launch(part)
                prepared[i].record(preparing)
            with torch.cuda.stream(scanning):
                scanning.wait_event(prepared[i])
                for launch in after:
                    launch(part)
                scanned[i].record(scanning)
        caller.wait_stream(scanning)

    return call
