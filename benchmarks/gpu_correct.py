"""Correct before fast in gpu.py: kernels by the tuner's check, then replays that must not move a single bit.

The check (kdagen.autotune.check) is against the recurrence in float64, on small adversarial cases, twice. Replays are
of a larger call, where blocks of many heads run at a time: bare launches, and a CUDA graph of them.
"""

from __future__ import annotations

import math

import gpu_contenders as contenders
from kdagen.autotune import launches
from kdagen.autotune.devices import clock
from kdagen.autotune.guarded import same_bits

from kdagen.runtime.loader import LoadedOp

SHAPES = {"inference": (1, 2048, 16), "training": (1, 1024, 8), "decode": (64, 1, 16)}  # B, T, H
REPLAYS = 8
RESULTS = ("out", "final_state", "gradient", "d_initial_state", "state_pool")


def check(op: str, kernels: LoadedOp) -> dict:
    """{"ok", "reason", "errors": {name: [found, most]}, "replays", "graphs"}: how often the same bits came."""
    found = contenders.check_kernels(op, kernels)
    found = {name: found[name] for name in ("ok", "reason", "errors")}
    if found["ok"]:
        if moved := replays(kernels, SHAPES[kernels.purpose]):
            return found | {"ok": False, "reason": moved}
        found |= {"replays": REPLAYS, "graphs": REPLAYS}
    return found


def replays(kernels: LoadedOp, shape: tuple[int, int, int]) -> str:
    """What moved between launches on the same inputs, and replays of their graph; nothing if all is well."""
    drawn = contenders.on_gpu(launches.arguments(kernels, shape))
    tensors = launches.memory(kernels, launches.shared_inputs(kernels, drawn, 0))
    call = launches.whole_call(kernels)
    names = [n for n, spec in kernels.plan["tensors"].items() if spec["role"] in RESULTS and n in tensors]
    before = {n: tensors[n].clone() for n in names if kernels.plan["tensors"][n]["role"] == "state_pool"}
    first = _once(call, tensors, names, before)
    if unwritten := [n for n in names if not first[n].isfinite().all()]:
        return f"NaN in {', '.join(unwritten)} at {shape}: not written, or computed from what no tensor holds"
    graph = clock.replays(call, [tensors])
    for what, run in (("launch", call), ("replay of a graph", graph)):
        for i in range(REPLAYS):
            again = _once(run, tensors, names, before)
            if moved := [n for n in names if not same_bits(again[n], first[n])]:
                return f"{what} {i + 1} of {REPLAYS} at {shape} differs in {', '.join(moved)}"
    return ""


def _once(run, tensors: dict, names: list[str], before: dict) -> dict:
    """Results of a call whose results were poisoned beforehand; states of a pool are as they were."""
    import torch

    for name in names:
        tensors[name].copy_(before[name]) if name in before else tensors[name].fill_(math.nan)
    run(tensors)
    torch.cuda.synchronize()
    return {name: tensors[name].clone() for name in names}
