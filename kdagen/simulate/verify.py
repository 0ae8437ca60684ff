"""Executes an op's generated program on sample inputs and compares it with the float64 recurrence.

run.py executes; here inputs are drawn in the dtypes that the kernels take, and the oracle is asked. Behind
`kdagen simulate` and the examples.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from kdagen.codegen.source import KernelSource, OpSource, TensorSpec
from kdagen.ir.canonical_json import from_json
from kdagen.reference import recurrence_reference
from kdagen.runtime import manifest as manifests
from kdagen.simulate.memory import Statistics
from kdagen.simulate.run import simulate

# Relative error below which a program computes its recurrence, as far as its operands' dtype allows.
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}
STATES = ("initial_state", "final_state")


@dataclass(frozen=True)
class Verdict:
    """Relative errors (norm of the difference over norm) and what each kernel did."""

    output: float
    final_state: float
    tolerance: float
    statistics: dict[str, Statistics]
    shape: tuple[int, int, int]  # B, T, H
    seconds: float  # that the simulation took

    @property
    def ok(self) -> bool:
        """Whether both errors are within the tolerance (NaN is not)."""
        return self.output <= self.tolerance and self.final_state <= self.tolerance

    def bytes(self, kernel: str) -> float:
        """Bytes that a kernel moves between memory and chip, a token a head; those of states are not in it."""
        return (self.statistics[kernel].bytes_moved - self._states(kernel)) / math.prod(self.shape)

    def state_bytes(self) -> float:
        """Bytes of initial and final states, a sequence a head: however long it is."""
        return sum(map(self._states, self.statistics)) / (self.shape[0] * self.shape[2])

    def _states(self, kernel: str) -> int:
        traffic = self.statistics[kernel].traffic
        return sum(traffic[name].read + traffic[name].written for name in STATES if name in traffic)

    def flops(self, kernel: str) -> float:
        """Floating-point operations of a kernel's matrix products, a token a head."""
        return self.statistics[kernel].gemm_flops / math.prod(self.shape)


def verify(
    source: OpSource, recurrence, shape=(1, 80, 2), gate: str = "mild", seed: int = 0, check_schedules: bool = False
) -> Verdict:
    """Draws inputs for `shape` (B, T, H), executes the program of `source`, compares with `recurrence`."""
    tensors, state = draw(source, shape, gate, seed)
    started = time.perf_counter()
    o, final, statistics = simulate(source, tensors, state, check_schedules=check_schedules)
    seconds = time.perf_counter() - started
    expected = recurrence_reference(recurrence, tensors, state)
    errors = relative_error(o, expected[0]), relative_error(final, expected[1])
    return Verdict(*errors, TOLERANCE[source.dtype], statistics, tuple(shape), seconds)


def draw(source: OpSource, shape: tuple[int, int, int], gate: str = "mild", seed: int = 0) -> tuple[dict, object]:
    """Arguments as the kernels take them, and an initial state that is not zero."""
    import torch

    from kdagen import zoo

    k, v = source.dims["K"], source.dims["V"]
    drawn = zoo.sample(from_json(source.recurrence["canonical"]), (*shape, k, v), gate, seed)
    dtypes = {p.name: getattr(torch, p.dtype) for kernel in source.kernels for p in kernel.params}
    generator = torch.Generator().manual_seed(seed)
    state = 0.1 * torch.randn(shape[0], shape[2], k, v, generator=generator)
    return {name: x.to(dtypes[name]) for name, x in drawn.items() if name in dtypes}, state


def relative_error(found, expected) -> float:
    """Norm of the difference over norm."""
    return float((found.double() - expected).norm() / expected.norm())


def built_source(folder: str | Path) -> OpSource:
    """The program in a folder that `kdagen build` left, its hashes checked."""
    folder = Path(folder)
    manifest = manifests.read(folder)
    plan, reports = manifest["plan"], {k["name"]: k for k in manifest["kernels"]}

    def kernel(launch: dict) -> KernelSource:
        specs = (plan["tensors"][name] for name in launch["params"])
        report = reports[launch["name"]]
        return KernelSource(
            name=launch["name"],
            family=report["family"],
            text=(folder / report["source"]).read_text(),
            params=tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in specs),
            threads=report["block"][0],
            shared_bytes=report["shared_bytes"],
            bytes_a_token=launch["bytes_a_token"],
        )

    return OpSource(
        name=plan["name"],
        kernels=tuple(kernel(launch) for launch in plan["kernels"]),
        chunk_size=plan["chunk_size"],
        dims=plan["dims"],
        dtype=plan["dtype"],
        schedule=plan["schedule"],
        target=plan["target"],
        arguments=tuple(plan["arguments"]),
        recurrence=plan["recurrence"],
    )
