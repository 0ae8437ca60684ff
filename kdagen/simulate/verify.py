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
from kdagen.simulate.run import simulate, simulate_training
from kdagen.state import StateType
from kdagen.tolerance import TOLERANCE, gradient_tolerance, reference_gradients, relative_error

STATES = ("initial_state", "final_state", "d_initial_state", "d_final_state")


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
    def errors(self) -> dict[str, tuple[float, float]]:
        """Error of each result, and what it may be at most."""
        return {"output": (self.output, self.tolerance), "final state": (self.final_state, self.tolerance)}

    @property
    def ok(self) -> bool:
        """Whether every error is within its tolerance (NaN is not)."""
        return all(error <= most for error, most in self.errors.values())

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


@dataclass(frozen=True)
class TrainingVerdict(Verdict):
    """The same of both passes; `statistics` are by pass and kernel: "backward kda_reverse"."""

    gradients: dict[str, tuple[float, float]]  # error and tolerance, by argument and of the initial state

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """Error of each result and gradient, and what it may be at most."""
        return super().errors | {f"d_{name}": error for name, error in self.gradients.items()}


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


def verify_training(
    source: OpSource, recurrence, shape=(1, 80, 2), gate: str = "mild", seed: int = 0, check_schedules: bool = False
) -> TrainingVerdict:
    """The same for an op in training: its gradients against those of `recurrence` in float64, by torch's autograd."""
    tensors, state = draw(source, shape, gate, seed)
    d_out, d_final = draw_cotangents(source, shape, seed)
    started = time.perf_counter()
    o, final, gradients, d_state, statistics = simulate_training(
        source, tensors, state, d_out, d_final, check_schedules=check_schedules
    )
    seconds = time.perf_counter() - started
    expected_o, expected_final, expected = reference_gradients(recurrence, tensors, state, d_out, d_final)
    errors = relative_error(o, expected_o), relative_error(final, expected_final)
    most = gradient_tolerance(from_json(source.recurrence["canonical"]), source.dtype)
    found = {**gradients, "initial_state": d_state}
    by_name = {n: (relative_error(found[n], e), most[n]) for n, e in expected.items()}
    did = {f"{which} {kernel}": s for which, kernels in statistics.items() for kernel, s in kernels.items()}
    return TrainingVerdict(*errors, TOLERANCE[source.dtype], did, tuple(shape), seconds, by_name)


def draw_cotangents(source: OpSource, shape: tuple[int, int, int], seed: int = 0) -> tuple:
    """Cotangents of output and final state, as the kernels take them."""
    import torch

    b, t, h = shape
    generator = torch.Generator().manual_seed(seed + 1)
    d_out = torch.randn(b, t, h, source.dims["V"], generator=generator).to(getattr(torch, source.dtype))
    return d_out, torch.randn(b, h, source.dims["K"], source.dims["V"], generator=generator)


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


def built_source(folder: str | Path) -> OpSource:
    """The program in a folder that `kdagen build` left, its hashes checked."""
    folder = Path(folder)
    manifest = manifests.read(folder)
    plan, reports = manifest["plan"], {k["name"]: k for k in manifest["kernels"]}

    def kernel(launch: dict) -> KernelSource:
        specs = [{k: v for k, v in plan["tensors"][name].items() if k != "of"} for name in launch["params"]]
        report = reports[launch["name"]]
        return KernelSource(
            name=launch["name"],
            family=report["family"],
            text=(folder / report["source"]).read_text(),
            params=tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in specs),
            threads=report["block"][0],
            shared_bytes=report["shared_bytes"],
            bytes_a_token=launch["bytes_a_token"],
            flops_a_token=launch.get("flops_a_token", 0.0),
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
        passes=plan.get("passes"),
        kept=tuple(plan.get("kept", ())),
        state=StateType(**plan["state"]),
    )
