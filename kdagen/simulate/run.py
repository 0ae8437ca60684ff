"""Runs a whole op in simulation: its kernels in launch order on torch tensors, workspaces between them.

program.py and schedule.py run one kernel on arrays; here an OpSource says which tensors there are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from kdagen import target as targets
from kdagen.build import adapter
from kdagen.codegen.source import KernelSource, OpSource, TensorSpec
from kdagen.errors import ArgumentError, SimulationError
from kdagen.runtime.capacities import NEVER, PADDED, ZERO, capacities
from kdagen.simulate.memory import Statistics
from kdagen.simulate.program import Simulator
from kdagen.simulate.schedule import check_schedule
from kdagen.simulate.torch_arrays import to_numpy

if TYPE_CHECKING:
    import torch

GARBAGE = 2**31 - 7  # integers that nobody wrote


def simulate(
    op_source: OpSource,
    tensors: dict[str, torch.Tensor],
    initial_state: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    states_every: int = 0,
    check_schedules: bool = False,
    check_races: bool = False,
    seeds=range(6),
) -> tuple:
    """(output, final state, statistics of each kernel by name); with `states_every` the states come before these.

    Tensors are as the op takes them: [B, T, ..], or [1, T, ..] and `cu_seqlens`. Workspaces and results start as NaN
    (or, of integers, as garbage). `check_schedules` also runs each kernel as its target specialises it, once a seed,
    and refuses one whose synchronisation fails; `check_races` refuses blocks that touch each other's results.
    """
    others = {"initial_state": initial_state, "cu_seqlens": cu_seqlens}
    run = Run(op_source, tensors, others, check_schedules, check_races, seeds, states_every)
    memory, statistics = run("forward")
    states = (memory[run.of_role("states")],) if states_every else ()
    return run.unpacked(memory[run.of_role("out")]), memory[run.of_role("final_state")], *states, statistics


def simulate_training(
    op_source: OpSource,
    tensors: dict[str, torch.Tensor],
    initial_state: torch.Tensor | None = None,
    d_out: torch.Tensor | None = None,
    d_final_state: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    check_schedules: bool = False,
    check_races: bool = False,
    seeds=range(6),
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor, dict[str, dict[str, Statistics]]]:
    """(output, final state, gradient of each argument, d_initial_state, statistics of each pass's kernels by name).

    The forward of an op in training, and then its backward from the cotangents of output and final state (zero where
    not given). Of the forward's workspaces only those that are kept outlive it. Options as `simulate` has them; a
    parameter's gradient is added up as the runtime does, so is a key's over its group of heads, and an argument that
    nothing depends on has a gradient of 0.
    """
    if not op_source.training:
        raise ArgumentError(f"{op_source.name}: has a forward only: expected what pipeline.compile_training gives")
    given = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "d_out": d_out, "d_final_state": d_final_state}
    run = Run(op_source, tensors, given, check_schedules, check_races, seeds)
    forward, before = run("forward")
    backward, after = run("backward", {name: forward[name] for name in op_source.kept})
    gradients = {name: x.new_zeros(x.shape) for name, x in tensors.items()}
    for spec in run.specs.values():
        if spec.of:
            gradients[spec.of] = run.gradient(spec, backward[spec.name], tensors[spec.of])
    out, final = run.unpacked(forward[run.of_role("out")]), forward[run.of_role("final_state")]
    d_initial = backward[run.of_role("d_initial_state")]
    return out, final, gradients, d_initial, {"forward": before, "backward": after}


class Run:
    """An op with what it is given: `run(which)` executes a pass in memory of its own."""

    def __init__(
        self, op: OpSource, tensors: dict, others: dict, check_schedules: bool, check_races: bool, seeds, states_every=0
    ):
        self.op, self.specs = op, {spec.name: spec for kernel in op.kernels for spec in kernel.params}
        self.batch, self.ragged = _batch(op, self.specs, tensors), others["cu_seqlens"] is not None
        self.given = _given(
            op, self.specs, tensors, {**others, "cu_seqlens": _offsets(others["cu_seqlens"], self.batch)}
        )
        self.sizes = _sizes(op, self.specs, self.given, states_every)
        self.given |= {name: self.value(name, states_every) for name in _of_role(self.specs, "scalar")}
        self.check_schedules, self.check_races, self.seeds = check_schedules, check_races, seeds

    def value(self, scalar: str, states_every: int) -> int:
        """What is passed by value."""
        return {"every": states_every // self.op.chunk_size or NEVER}[scalar]

    def of_role(self, role: str) -> str:
        (name,) = _of_role(self.specs, role)
        return name

    def unpacked(self, x: torch.Tensor) -> torch.Tensor:
        """What there is of each token, as the caller has it."""
        return x.unflatten(0, self.batch)

    def gradient(self, spec: TensorSpec, found: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Of an argument, from what the kernels leave for each chunk or each head of values."""
        if spec.role == "partial_gradient":
            return found.sum(1)
        found = self.unpacked(found)
        return found if found.shape == like.shape else found.unflatten(2, (like.shape[2], -1)).sum(3)

    def __call__(self, which: str, kept: dict | None = None) -> tuple[dict, dict[str, Statistics]]:
        """All tensors of a pass, and statistics of its kernels; what is neither given nor kept starts as NaN."""
        memory, statistics = {**self.given, **(kept or {})}, {}
        for kernel in self.op.kernels_of(which):
            for spec in kernel.params:
                if spec.name not in memory:
                    memory[spec.name] = _new(spec, self.sizes, self.ragged)
            values = [memory[spec.name] for spec in kernel.params]
            statistics[kernel.name] = self.execute(kernel, [x if isinstance(x, int) else to_numpy(x) for x in values])
        return memory, statistics

    def execute(self, kernel: KernelSource, arrays: list) -> Statistics:
        checked = _check_schedule(kernel, self.op.target, arrays, self.seeds) if self.check_schedules else None
        simulator = _simulator(kernel, self.check_races)
        simulator(*arrays)
        simulator.statistics.schedule = checked
        return simulator.statistics


def traffic_per_token_head(statistics: dict[str, Statistics], tokens: int, heads: int) -> float:
    """Bytes that the kernels of an op move between memory and chip, a token a head; `tokens` is B T."""
    return sum(s.bytes_moved for s in statistics.values()) / (tokens * heads)


@lru_cache(maxsize=256)
def _prim_func(kernel: KernelSource):
    return adapter.trace(kernel.text, kernel.name, f"<{kernel.name}.py>")


@lru_cache(maxsize=256)
def _simulator(kernel: KernelSource, check_races: bool) -> Simulator:
    return Simulator(_prim_func(kernel), check_races=check_races)


def _check_schedule(kernel: KernelSource, target: str, arrays, seeds):
    report = check_schedule(_prim_func(kernel), targets.target(target), arrays, seeds)
    if not report.ok:
        raise SimulationError(str(report))
    return report


def _of_role(specs: dict[str, TensorSpec], role: str) -> list[str]:
    return [name for name, spec in specs.items() if spec.role == role]


def _batch(op: OpSource, specs, tensors: dict) -> tuple[int, int]:
    """B and T, in which all arguments agree; these must be all that the op takes."""
    expected = _of_role(specs, "argument")
    if sorted(expected) != sorted(tensors):
        names = ", ".join(sorted(tensors)), ", ".join(sorted(expected))
        raise ArgumentError(f"{op.name}: got tensors {names[0]}; expected {names[1]}")
    tokens = {name: x for name, x in tensors.items() if specs[name].shape[0] == "T"}
    batch = tuple(next(iter(tokens.values())).shape[:2])
    for name, x in tokens.items():
        written = ["B", *specs[name].shape]
        if x.dim() != len(written) or tuple(x.shape[:2]) != batch:
            of = f"expected {written}, of the same B and T as others: {list(batch)}"
            raise ArgumentError(f"{op.name}: '{name}' has shape {list(x.shape)}, {of}")
    return batch


def _given(op: OpSource, specs, tensors: dict, others: dict) -> dict:
    """The caller's tensors by name, checked for dtype, tokens in a row; `others` by role."""
    given = dict(tensors)
    for role, tensor in others.items():
        if tensor is not None:
            if not (names := _of_role(specs, role)):
                raise ArgumentError(f"{op.name}: takes no {role}")
            given[names[0]] = tensor
    for name, tensor in given.items():
        dtype = _torch_dtype(specs[name])
        if tensor.dtype != dtype or tensor.device.type != "cpu":
            what = f"'{name}' is {tensor.dtype} on {tensor.device}, expected {dtype} on cpu"
            raise ArgumentError(f"{op.name}: {what}: convert it with {name}.to('cpu', {dtype})")
    return {name: (x.flatten(0, 1) if specs[name].shape[0] == "T" else x).contiguous() for name, x in given.items()}


def _offsets(cu_seqlens, batch) -> torch.Tensor:
    """Where each sequence begins, and the last one ends."""
    import torch

    if cu_seqlens is not None:
        return cu_seqlens.int()
    return torch.arange(batch[0] + 1, dtype=torch.int32) * batch[1]


def _sizes(op: OpSource, specs, memory: dict, states_every: int) -> dict[str, int]:
    """Values of the symbols in shapes, from the given tensors, which must agree."""
    sizes = {"N": len(memory["cu_seqlens"]) - 1}
    for name, tensor in memory.items():
        shape, written = list(tensor.shape), specs[name].shape
        if len(shape) == len(written):
            for symbol, n in zip(written, shape, strict=True):
                if isinstance(symbol, str):
                    sizes.setdefault(symbol, n)
        expected = [n if isinstance(n, int) else sizes.get(n, n) for n in written]
        if shape != expected:
            raise ArgumentError(f"{op.name}: '{name}' has shape {shape}, expected {list(written)} = {expected}")
    sizes.setdefault("HV", sizes.get("H"))
    return sizes | capacities(sizes["T"], sizes["N1"] - 1, op.chunk_size, op.schedule, states_every)


def _new(spec: TensorSpec, sizes: dict[str, int], ragged: bool) -> torch.Tensor:
    """NaN where a kernel is to write; zero where the runtime makes it so."""
    import torch

    zero = spec.role in ZERO or (ragged and spec.role in PADDED)
    dtype = _torch_dtype(spec)
    value = 0 if zero else float("nan") if dtype.is_floating_point else GARBAGE
    return torch.full([n if isinstance(n, int) else sizes[n] for n in spec.shape], value, dtype=dtype)


def _torch_dtype(spec: TensorSpec):
    import torch

    return getattr(torch, spec.dtype)
