"""The GPUs that kdagen compiles for: one line a target, facts only."""

from __future__ import annotations

from dataclasses import dataclass

from kdagen.errors import TargetError


@dataclass(frozen=True)
class Target:
    """A GPU architecture as the compiler needs to know it."""

    name: str  # what the user types: "sm90"
    arch: str  # what TileLang and nvcc are given: "sm_90a"
    backend: str  # "cuda", or "hip" (source only)
    shared_bytes: int  # most dynamic shared memory a block may use
    warp_specialised: bool  # has wgmma and register reallocation
    bulk_copies: bool  # has TMA
    runs_on: tuple[str, ...]  # compute capabilities that can load the result
    example: str  # a GPU of this kind, for people

    @property
    def compiles(self) -> bool:
        """Whether machine code is produced, not source alone."""
        return self.backend == "cuda"


KIB = 1024
TARGETS = {
    t.name: t
    for t in (
        Target("sm80", "sm_80", "cuda", 163 * KIB, False, False, ("8.0",), "A100"),
        Target("sm89", "sm_89", "cuda", 99 * KIB, False, False, ("8.9",), "RTX 4090, L40S"),
        Target("sm90", "sm_90a", "cuda", 227 * KIB, True, True, ("9.0",), "H100, H200"),
        Target("sm100", "sm_100a", "cuda", 227 * KIB, False, True, ("10.0",), "B200"),
        Target("sm120", "sm_120a", "cuda", 99 * KIB, False, True, ("12.0",), "RTX 5090"),
        Target("gfx942", "gfx942", "hip", 64 * KIB, False, False, ("gfx942",), "MI300X (source only)"),
    )
}


def running(capability: str) -> Target | None:
    """The target whose kernels a GPU of this compute capability ("9.0") runs."""
    return next((t for t in TARGETS.values() if capability in t.runs_on), None)


def target(name: str | Target) -> Target:
    """The target called `name` ("sm90"; "sm_90" and "sm_90a" are accepted too)."""
    if isinstance(name, Target):
        return name
    known = {alias: t for t in TARGETS.values() for alias in (t.name, t.arch, t.name.replace("sm", "sm_"))}
    if name not in known:
        raise TargetError(f"unknown arch '{name}': expected one of {', '.join(TARGETS)}")
    return known[name]
