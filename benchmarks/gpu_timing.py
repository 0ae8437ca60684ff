"""Timing on one GPU: contenders taken in turn, in one process, on inputs that the L2 cache does not hold.

Knows nothing of recurrences: a contender is a callable that takes one set of inputs, or a Call. How one call is timed
is the tuner's too (kdagen.autotune.devices.clock); here are tables' figures of many, ceilings, and facts.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdagen.autotune.devices.clock import Call, replays, timed, warm_up
from kdagen.autotune.devices.cuda import installed, smi

MODES = {
    "device": "the GPU's time: it is kept busy while the host issues the launches",
    "eager": "as called: what the host does between launches counts where the GPU waits for it",
    "graph": "replays of a CUDA graph",
}
SMI = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


@dataclass(frozen=True)
class Times:
    """Milliseconds a call."""

    median: float
    p25: float
    p75: float
    least: float
    calls: int


def measure(
    contenders: dict[str, Callable | Call], sets: Sequence, calls: int, mode: str, mark: Callable = lambda label: None
) -> dict[str, Times]:
    """Times of each contender, `calls` each: in every round each has one call, and the order moves on by one.

    `mark` hears which one is warmed up, for a process that does not survive it.
    """
    import torch

    for label, call in contenders.items():
        mark(label)
        warm_up(call, sets)
    mark("")
    run = {label: replays(call, sets) if mode == "graph" else call for label, call in contenders.items()}
    samples: dict[str, list] = {label: [] for label in contenders}
    turn, labels = itertools.count(), list(contenders)
    for round_ in range(calls):
        for label in labels[round_ % len(labels) :] + labels[: round_ % len(labels)]:
            samples[label].append(timed(run[label], sets[next(turn) % len(sets)], mode))
        torch.cuda.synchronize()
    return {label: _times([start.elapsed_time(end) for start, end in pairs]) for label, pairs in samples.items()}


def _times(ms: list[float]) -> Times:
    quarters = statistics.quantiles(ms, n=4) if len(ms) > 1 else [ms[0]] * 3
    return Times(statistics.median(ms), quarters[0], quarters[2], min(ms), len(ms))


def peak_bytes(call: Callable, given) -> int:
    """The most memory that a call has at once, beyond what was there before it; not its first, which may tune."""
    import torch

    call(given)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(given)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(calls: int = 20) -> dict[str, float]:
    """What this GPU does at best, measured: a large copy (bytes read and written), a large bf16 product."""
    import torch

    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copied = measure({"copy": lambda _: target.copy_(source)}, [None], calls, "device")["copy"]
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = measure({"product": lambda _: a @ b}, [None], calls, "device")["product"]
    return {
        "copy_bytes_a_second": 2 * source.nbytes / (copied.median * 1e-3),
        "bf16_flops_a_second": 2 * 8192**3 / (product.median * 1e-3),
    }


def facts() -> dict:
    """The GPU, its state now, and versions: what a figure depends on."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "state": state(),
        "versions": {"cuda": torch.version.cuda, **versions()},
    }


def state() -> dict[str, str]:
    """Its clocks, temperature and power as they are now."""
    return smi("0", SMI)


def versions() -> dict[str, str]:
    """Of the packages that take part; those that are not installed are left out."""
    return installed("torch", "triton", "apache-tvm-ffi", "fla-core")
