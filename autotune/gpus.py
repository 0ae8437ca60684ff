"""Facts about GPUs, as their vendors give them; what was measured on one stands beside it.

Unlike kdagen.target, which says what the compiler may use of an architecture, these say how much of it a chip has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20
REACHED = 0.9  # of the data sheet's rate of memory, what a large copy reaches where none was measured
REACHED_FLOPS = 0.8  # of the data sheet's FLOPs, likewise: those of H100 that were measured


@dataclass(frozen=True)
class Gpu:
    """A chip. Rates are a second's, FLOPs those of dense bf16 products with sums in fp32."""

    name: str
    calls_itself: str  # pattern of the device's own name
    target: str  # of kdagen.target.TARGETS
    processors: int  # multiprocessors, or compute units
    memory: float  # bytes from memory, by the data sheet
    flops: float
    l2: int  # bytes
    shared: int  # bytes a multiprocessor
    shared_block: int  # bytes that a block may take of it
    registers: int  # of 32 bits, a multiprocessor
    threads: int  # most of a multiprocessor at a time
    clock: float  # Hz, at which the data sheet's FLOPs are counted
    source: str
    measured_copy: float = 0  # bytes read and written by a large copy
    measured_flops: float = 0

    @property
    def copy(self) -> float:
        """The rate of memory that a kernel can hope for."""
        return self.measured_copy or REACHED * self.memory

    @property
    def products(self) -> float:
        """The rate of FLOPs that a kernel can hope for."""
        return self.measured_flops or REACHED_FLOPS * self.flops

    @property
    def size(self) -> tuple[float, ...]:
        """By which chips are compared."""
        return self.processors, self.memory, self.flops, self.shared


HOPPER = {"l2": 50 * MIB, "shared": 228 * KIB, "shared_block": 227 * KIB, "registers": 65536, "threads": 2048}
SMALL = {"shared": 100 * KIB, "shared_block": 99 * KIB, "registers": 65536, "threads": 1536}

# Shared memory, registers and threads: CUDA C++ Programming Guide, technical specifications per compute capability.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "H100", r"H100 (80GB HBM3|SXM)", "sm90", 132, 3.35e12, 989.4e12, **HOPPER, clock=1.83e9,
            source="NVIDIA H100 data sheet and Hopper white paper, SXM5", measured_copy=3.0e12, measured_flops=790e12,
        ),
        Gpu(
            "H200", r"H200", "sm90", 132, 4.8e12, 989.4e12, **HOPPER, clock=1.83e9,
            source="NVIDIA H200 data sheet, SXM", measured_copy=4.3e12,
        ),
        Gpu(
            "A100", r"A100.*80GB", "sm80", 108, 2.039e12, 312e12, l2=40 * MIB, shared=164 * KIB, shared_block=163 * KIB,
            registers=65536, threads=2048, clock=1.41e9, source="NVIDIA A100 80GB data sheet, SXM4",
        ),
        Gpu(
            # the cache as devices report it: no data sheet gives it
            "B200", r"\bB200", "sm100", 148, 8.0e12, 2250e12, l2=126 * MIB, shared=228 * KIB, shared_block=227 * KIB,
            registers=65536, threads=2048, clock=1.85e9, source="NVIDIA Blackwell architecture brief, HGX B200",
        ),
        Gpu(
            "RTX 4090", r"RTX 4090\b(?! (D|Laptop))", "sm89", 128, 1.008e12, 165.2e12, l2=72 * MIB, **SMALL,
            clock=2.52e9, source="NVIDIA Ada white paper",
        ),
        Gpu(
            "RTX 5090", r"RTX 5090\b(?! (D|Laptop))", "sm120", 170, 1.792e12, 209.5e12, l2=96 * MIB, **SMALL,
            clock=2.407e9, source="NVIDIA RTX Blackwell white paper",
        ),
        Gpu(
            # vector registers of 512 KiB a compute unit; behind the 4 MiB of L2 of each of 8 dies lie 256 MiB of L3
            "MI300X", r"MI300X", "gfx942", 304, 5.3e12, 1307.4e12, l2=32 * MIB, shared=64 * KIB, shared_block=64 * KIB,
            registers=131072, threads=2048, clock=2.1e9, source="AMD Instinct MI300X data sheet, ROCm's table of GPUs",
        ),
    )
}  # fmt: skip


def find(name: str) -> Gpu | None:
    """The GPU of that name ("H100"), or the one that calls itself so ("NVIDIA H100 80GB HBM3")."""
    named = {n.lower(): gpu for n, gpu in GPUS.items()}
    if name.lower() in named:
        return named[name.lower()]
    return next((gpu for gpu in GPUS.values() if re.search(gpu.calls_itself, name)), None)


def nearest(gpu: Gpu, among: Iterable[Gpu]) -> Gpu | None:
    """Of these the one most like it: of the same target if there is any, then by size."""
    return min(among, key=lambda other: (other.target != gpu.target, _distance(gpu, other), other.name), default=None)


def _distance(a: Gpu, b: Gpu) -> float:
    return sum(abs(math.log(x / y)) for x, y in zip(a.size, b.size))
